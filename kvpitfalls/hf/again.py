"""What a policy has the model read after a prompt, before anything of the prompt is evicted.

The decoder's own forward is called once more for each turn, with a cache that is lent: its layers share the prompt's
keys and values, so that what is read leaves nothing behind. Each layer's attention then hands queries, keys and values
of what was read to the action of the prompt's cache, and when all was read, each layer is evicted from.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..numbers import is_whole
from ..policies import Again, Policy
from .alone import copied, options_of
from .arguments import CACHE_NAMES, cache_argument
from .cache import KeptCache, why_not_compressed
from .evict import Action
from .forward import AttentionCall, Forward
from .layer import KeptLayer
from .parts import n_known_of
from .rows import holds_nothing, is_kept_alone, takes_padding
from .threads import local

_OF_ALL = (bool, int, float, str)  # what a forward is told of all its tokens
# What each forward is told anew, or what says nothing of its tokens.
_OWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache", *CACHE_NAMES}


def each_once(policies: Iterable[Policy]) -> list[Policy]:
    """Equal policies once; a policy need not be hashable."""
    once: list[Policy] = []
    for policy in policies:
        if policy not in once:
            once.append(policy)
    return once


@dataclass(frozen=True)
class _Turn:
    """One forward after the prompt.

    Attributes
    ----------
    policy : Policy
        Which asked for it.
    number : int
        Of the policy's turns.
    texts : list of list of int
        The ids of each row.
    """

    policy: Policy
    number: int
    texts: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(text) for text in self.texts]

    def padded(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, n), padded on the right, of ``like``'s type and device; and which of them are no padding, bool."""
        width, some = max(self.lengths), next(text[0] for text in self.texts if text)
        ids = [[*text, *[some] * (width - len(text))] for text in self.texts]
        real = [[True] * len(text) + [False] * (width - len(text)) for text in self.texts]
        return torch.tensor(ids, device=like.device, dtype=like.dtype), torch.tensor(real, device=like.device)


class _Read(Action):
    """The lent cache's action: tell the prompt's cache what was read."""

    holds = True  # acts after a forward that is no prefill

    def __init__(self, cache: KeptCache, turn: _Turn, n_token: int) -> None:
        self.cache, self.turn, self.n_token = cache, turn, n_token

    def after_step(self, layer: KeptLayer, call: AttentionCall) -> None:
        cache, cut, own = self.cache, self.n_token, self.cache.layers[layer.index]
        grown = sum(x.nbytes for x in (layer.keys, layer.values))
        cache.peak_bytes = max(cache.peak_bytes, cache.held_bytes + grown)
        again = Again(call.queries, call.keys[:, :, cut:], call.values[:, :, cut:], self.turn.number)
        prompt = replace(call, keys=call.keys[:, :, :cut], queries=None, values=call.values[:, :, :cut], again=again)
        if cache.action is not None and isinstance(own, KeptLayer):
            cache.action.after_turn(own, prompt, self.turn.policy)
            layer.keys, layer.values = own.keys, own.values  # one layer at a time is longer than the prompt


def plan(decoder, record: Forward, policies: Sequence[Policy], bound: dict) -> Callable:
    """What is to be read after a prompt's forward, as a function (decoder, forward, record); raises, before any layer
    is touched, if that is not possible."""
    ids, asking = bound.get("input_ids"), ", ".join(repr(policy.name) for policy in policies)
    if ids is None:
        raise UnsupportedModelError(
            f"policy {asking} has the model read the prompt again, and {type(decoder).__name__} was given embeddings, "
            "as of a multimodal model; expected token ids"
        )
    for i, layer in enumerate(record.cache.layers):
        if not (is_kept_alone(layer) or getattr(layer, "is_sliding", False) or holds_nothing(layer)):
            raise UnsupportedModelError(
                f"policy {asking} has the model read on after the prompt and then forget that, which layer {i} of "
                f"{type(decoder).__name__} cannot ({why_not_compressed(layer)}); expected another policy"
            )
    positions = bound.get("position_ids")
    if positions is not None and positions.ndim != 2:
        raise UnsupportedModelError(
            f"policy {asking} has the model read on after the prompt, whose positions have shape "
            f"{tuple(positions.shape)}; expected (B, T)"
        )
    told = {name: x for name, x in bound.items() if x is not None and name not in _OWN}
    if of_tokens := sorted(name for name, x in told.items() if not isinstance(x, _OF_ALL)):
        raise UnsupportedModelError(
            f"policy {asking} has the model read on after the prompt, for which {type(decoder).__name__} was given "
            f"{of_tokens[0]}, and there is none of what it reads then; expected a prompt without, or another policy"
        )
    turns = [turn for policy in policies for turn in _turns_of(policy, ids, record.valid or [])]
    _check_ids(decoder, turns)
    _check_padding(decoder, record, turns, ids.shape[1])
    _check_positions(decoder, turns, record.valid or [])
    _check_angles(decoder, record, turns, ids.shape[1], positions)
    return _Reading(turns, ids, positions, told)


def _turns_of(policy: Policy, ids: torch.Tensor, valid: Sequence[tuple[int, int]]) -> list[_Turn]:
    """What a policy asks for."""
    rows = [_texts_of(policy, row[begin:end]) for row, (begin, end) in zip(ids.tolist(), valid, strict=True)]
    numbers = range(max(map(len, rows)))
    turns = [_Turn(policy, i, [row[i] if i < len(row) else [] for row in rows]) for i in numbers]
    if not turns or not all(any(turn.texts) for turn in turns):
        raise ValueError(f"policy {policy.name!r} has the model read nothing after the prompt; expected some tokens")
    return turns


def _texts_of(policy: Policy, tokens: list[int]) -> list[list[int]]:
    given: object = policy.again(tokens)
    if not isinstance(given, Sequence) or not all(isinstance(x, Sequence) and all(map(is_whole, x)) for x in given):
        raise ValueError(
            f"policy {policy.name!r} has the model read {given!r:.80} after the prompt; expected a list of lists of "
            "ids, one list a forward"
        )
    return [list(text) for text in given]


def _check_ids(decoder, turns: Sequence[_Turn]) -> None:
    """A GPU's error for ids that the vocabulary lacks ends the process's use of it."""
    n_known = n_known_of(decoder)
    if n_known is None:
        return
    for turn in turns:
        if unknown := [x for text in turn.texts for x in text if not 0 <= x < n_known]:
            raise ValueError(
                f"policy {turn.policy.name!r} has the model read token {unknown[0]} after the prompt; "
                f"expected ids in [0, {n_known})"
            )


def _check_padding(decoder, record: Forward, turns: Sequence[_Turn], n_token: int) -> None:
    """Raise where padding stands between a prompt and what is read, and a window would count it."""
    n_all, ends = n_token + max(n for turn in turns for n in turn.lengths), [end for _, end in record.valid or []]
    if min(ends, default=n_token) < n_token and not all(takes_padding(x, n_all) for x in record.cache.layers):
        raise ValueError(
            f"the prompts are padded on the right, and policy {turns[0].policy.name!r} has the model read on after "
            f"them, where windows of {type(decoder).__name__} would count the padding; expected padding on the left"
        )


def _check_positions(decoder, turns: Sequence[_Turn], valid: Sequence[tuple[int, int]]) -> None:
    limit = getattr(decoder.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return
    for turn in turns:
        for (begin, end), n_read in zip(valid, turn.lengths, strict=True):
            if end - begin + n_read > limit:
                raise ValueError(
                    f"policy {turn.policy.name!r} has {type(decoder).__name__} read {n_read} tokens after a prompt of "
                    f"{end - begin}; expected at most its {limit} positions together"
                )


@torch.no_grad()
def _check_angles(
    decoder, record: Forward, turns: Sequence[_Turn], n_token: int, positions: torch.Tensor | None
) -> None:
    """Raise if the prompt's positions end before, and those of what is read after, the length from which on
    longrope turns by other angles: the prompt's keys would stand there turned by those of short inputs."""
    embedding: Any = getattr(decoder, "rotary_emb", None)
    kinds = getattr(embedding, "rope_type", None)
    if "longrope" not in (kinds.values() if isinstance(kinds, dict) else [kinds]):
        return
    n_place = n_token if positions is None else int(positions.max()) + 1
    asked, one = copied(embedding), next(decoder.parameters()).new_zeros(1, 1, 1)
    n_read = max(n for turn in turns for n in turn.lengths)
    for options in (options_of(decoder, embedding, i) for i in set(record.own.values())):
        ends = (torch.tensor([[1, n - 1]], device=one.device) for n in (n_place, n_place + n_read))
        near, far = (asked(one, end, **options)[0][:, :1] for end in ends)
        if not torch.equal(near, far):
            raise UnsupportedModelError(
                f"policy {turns[0].policy.name!r} has {type(decoder).__name__} read {n_read} tokens after a prompt of "
                f"{n_place}, from short inputs to those that its longrope turns by other angles; expected a prompt "
                "so short, or so long, that both are of one kind"
            )


@dataclass(frozen=True)
class _Reading:
    """All that is read, as ids ``like`` the prompt's, at the positions after its own; ``told``: what else the decoder
    was."""

    turns: Sequence[_Turn]
    like: torch.Tensor
    positions: torch.Tensor | None
    told: Mapping[str, Any]

    def __call__(self, decoder, forward, record: Forward) -> None:
        """Read all turns, then evict from each layer, whose kept rows keep their gradients."""
        outer = local.forward
        try:
            with torch.no_grad():
                for turn in self.turns:
                    self._read(turn, decoder, forward, record)
        finally:
            local.forward = outer
        for layer in record.cache.kept_layers:
            if record.cache.action is not None:
                record.cache.action.after_turns(layer, record.valid or [])

    def _read(self, turn: _Turn, decoder, forward, record: Forward) -> None:
        cache, valid = record.cache, record.valid or []
        n_token = cache.n_seen
        lent = copy.copy(cache)
        lent.layers, lent.action = [copy.copy(layer) for layer in cache.layers], _Read(cache, turn, n_token)
        lent.progress = None
        inner = Forward(lent, record.own, prefill=False, n_seen=n_token, ids=None, valid=record.valid)
        inner.rotaries, inner.projections = record.rotaries, record.projections
        local.forward = inner
        ids, real = turn.padded(self.like)
        arguments = {**self.told, "input_ids": ids, "use_cache": True, **cache_argument(decoder, lent)}
        if len(set(turn.lengths)) > 1 or any(row != (0, n_token) for row in valid):
            arguments["attention_mask"] = torch.cat([_real_of(valid, n_token, ids.device), real], 1).long()
        if self.positions is not None:
            last = torch.tensor([end - 1 for _, end in valid], device=self.positions.device)[:, None]
            steps = torch.arange(1, 1 + ids.shape[1], device=self.positions.device)
            arguments["position_ids"] = self.positions.expand(len(valid), -1).gather(1, last) + steps
        forward(**arguments)
        inner.check(decoder)


def _real_of(valid: Sequence[tuple[int, int]], n_token: int, device: torch.device) -> torch.Tensor:
    """Which of a prompt's tokens are no padding, bool (B, T)."""
    begin, end = (torch.tensor(column, device=device)[:, None] for column in zip(*valid, strict=True))
    places = torch.arange(n_token, device=device)
    return (places >= begin) & (places < end)
