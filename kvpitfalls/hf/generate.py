"""Greedy answers to many conversations at once, each going on from a compressed cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..eviction.arrays import as_torch
from ..prompts.prompt import Prompt
from . import rows
from .arguments import cache_argument
from .cache import KeptCache
from .given_prompts import pad_token
from .parts import device_of, takes

# Plain argmax, whatever the model's generation config says (Qwen2.5's, for one, holds a repetition penalty); the ids of
# one answer a row alone, and from the cache that is given.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "cache_implementation": None,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes
    ----------
    text : str
        Without special tokens, stripped.
    n_token : int
        Generated tokens, the one that ended it included.
    ended : bool
        The model ended by itself, before the limit.
    """

    text: str
    n_token: int
    ended: bool


@torch.no_grad()
def answers(
    model, contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]], cache: KeptCache, max_new_tokens: int
):
    """Continue each conversation greedily; the cache is used up.

    Parameters
    ----------
    model : transformers model
        Wrapped, as the cache was.
    contexts : list of Prompt, one per row
        What the cache has seen, padded on the left.
    conversations : list of list of int, one per row
        Token ids that begin with the context's.
    cache : KeptCache
        As many rows, in the same order.
    max_new_tokens : int

    Returns
    -------
    list of Answer

    Raises
    ------
    ValueError
        If logits that a token was chosen by are no numbers, as after an overflow in half precision.

    Notes
    -----
    Both halves of a row, context and rest, are padded on the left; the cache stands for the first half's columns.
    """
    device, ends = device_of(model), _end_tokens(model)
    said: dict[int, Answer] = {}
    for batch in batches(contexts, conversations, cache, max_new_tokens):
        watch = Watch()
        options = {"max_new_tokens": max_new_tokens, **GREEDY, **cache_argument(model, batch.cache)}
        tokens, mask = batch.tokens.to(device), batch.mask.to(device)
        out = model.generate(tokens, attention_mask=mask, logits_processor=[watch], **options)
        of_rows = zip(batch.rows, out[:, tokens.shape[1] :].tolist(), strict=True)
        made = {row: _answer(contexts[row].tokenizer, ids, ends) for row, ids in of_rows}
        watch.check([answer.n_token for answer in made.values()])
        said |= made
    return [said[row] for row in range(len(contexts))]


class Watch:
    """A processor of logits, for ``generate``, that leaves them as they are: the largest is chosen, and if they are NaN
    that is the vocabulary's first token, step by step, as if the model had said so."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See what a step has to choose from."""
        self.steps.append(logits.amax(-1).isfinite())
        return logits

    def check(self, lengths: Sequence[int]) -> None:
        """Raise if a token of a row was chosen by what is no number; those behind its length are padding. Nothing is
        known of a ``generate`` that shows no processor its logits."""
        is_number = torch.stack(self.steps, 1).tolist() if self.steps else []
        for of_row, n in zip(is_number, lengths, strict=bool(is_number)):
            if not all(of_row[:n]):
                raise ValueError("the logits of an answer are not finite; expected numbers, try dtype float32")


@dataclass(frozen=True)
class Batch:
    """Rows that a model runs together.

    Attributes
    ----------
    rows : list of int
        Of all.
    tokens, mask : LongTensor (B, T)
        Of :func:`pad_halves`.
    cache : KeptCache
        Of the contexts.
    """

    rows: Sequence[int]
    tokens: torch.Tensor
    mask: torch.Tensor
    cache: KeptCache


def batches(
    contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]], cache: KeptCache, n_new: int
) -> Iterator[Batch]:
    """All rows together; or, where a layer of the cache makes something else of a row with padding between context and
    rest, those whose rests are of one length. ``n_new``: how many tokens may follow."""
    tokens, mask = pad_halves(contexts, conversations)
    rests = [len(ids) - len(prompt) for ids, prompt in zip(conversations, contexts, strict=True)]
    if len(set(rests)) == 1 or all(rows.takes_padding(layer, tokens.shape[1] + n_new) for layer in cache.layers):
        yield Batch(range(len(rests)), tokens, mask, cache)
        return
    for n in sorted(set(rests)):
        chosen = [row for row, of_row in enumerate(rests) if of_row == n]
        of_both = [*range(tokens.shape[1] - max(rests)), *range(-n, 0)]
        yield Batch(chosen, tokens[chosen][:, of_both], mask[chosen][:, of_both], rows.taken(cache, chosen))


def pad_halves(contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, LongTensor (B, T): each row's context and the rest of its conversation, each padded on the
    left."""
    n_context = max(map(len, contexts))
    width = n_context + max(len(ids) - len(p) for ids, p in zip(conversations, contexts, strict=True))
    tokens = torch.full((len(contexts), width), pad_token(contexts[0].tokenizer), device="cpu")
    mask = torch.zeros_like(tokens)
    for row, seen, ids, prompt in zip(tokens, mask, conversations, contexts, strict=True):
        for part, end in ((ids[: len(prompt)], n_context), (ids[len(prompt) :], width)):
            row[end - len(part) : end], seen[end - len(part) : end] = as_torch(part), 1
    return tokens, mask


@torch.no_grad()
def logits_after(
    model: Any, contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]], cache: KeptCache, n_last: int
) -> list[torch.Tensor]:
    """Logits (N, V) of each row of what follows its context, which the cache has seen; it is used up.

    Parameters
    ----------
    model : transformers model
        Wrapped, as the cache was.
    contexts : list of Prompt, one per row
    conversations : list of list of int, one per row
        All token ids, the context's included.
    n_last : int
        How many tokens at the end are asked for. N may be larger: not every model can leave out the others.
    """
    device = device_of(model)
    n_context = max(map(len, contexts))
    told: dict[int, torch.Tensor] = {}
    for batch in batches(contexts, conversations, cache, 0):
        options: dict[str, Any] = {"attention_mask": batch.mask.to(device), "use_cache": True}
        options |= cache_argument(model, batch.cache)
        if takes(model, "position_ids"):
            options["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0)[:, n_context:].to(device)
        if takes(model, "logits_to_keep"):  # a large vocabulary's take up far more than all else
            options["logits_to_keep"] = n_last
        logits: torch.Tensor = model(batch.tokens[:, n_context:].to(device), **options).logits
        told |= zip(batch.rows, logits, strict=True)
    return [told[row] for row in range(len(contexts))]


def _end_tokens(model) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}


def _answer(tokenizer, ids: list[int], ends: set[int]) -> Answer:
    n = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return Answer(tokenizer.decode(ids[:n], skip_special_tokens=True).strip(), n, n > 0 and ids[n - 1] in ends)
