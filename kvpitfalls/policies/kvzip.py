"""KVzip."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..eviction.arrays import Array, as_torch
from ..numbers import is_whole
from ..prompts.chats import apply_template
from .attention_sinks import n_at_once
from .base import Inputs, Policy
from .votes import Vote

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KVzip(Policy):
    """Keep what the model attends to when it repeats the prompt; the first ``n_sink`` tokens are kept first.

    After the prompt, the model reads a request to repeat it and then the prompt's own tokens, by parts of
    ``chunk_size``, each right after the whole prompt; of this nothing stays in the cache. score[k] = max over all that
    was read with k's part, queries q and the key head's query heads h of A[h, q, k], where A is the softmax over the
    row's first ``n_sink`` keys, the part's, and those read up to q. A later part's request ends with the ``n_overlap``
    tokens before the part.

    Fair: a segment's keys are judged only by the repeat of the segment's own tokens, in the same softmax. Else the
    repeat of one instruction, or the request, could lift what it attends to in another: an instruction would be kept
    for what others need of it. Where there is one segment, the request judges, too.

    Defined for budgets of more than ``n_sink`` tokens, prompts given as token ids, of at most half of the positions
    that the model knows (less the request), and models whose layers can go on from a prompt and then be left as they
    were, which linear attention cannot. Not defined while a budget is held: it has the model repeat a prompt that is
    whole.

    kvpress's KVzipPress is this with ``allocation=Ada(0)`` where it is ``layerwise``; else it cuts at one score for all
    layers, which no allocation here does. It never repeats a chat template's beginning, which therefore goes first; the
    authors keep all of the system prompt, which here is for ``protect="system"`` to say.

    Parameters
    ----------
    repeat_ids : tuple of int
        The request, as token ids. By default there is none, and the prompt is read twice: a policy knows no tokenizer.
        :meth:`for_tokenizer` has a sentence.
    part_ids : tuple of int, optional
        The request for a later part; ``repeat_ids`` by default.
    answer_ids : tuple of int
        What stands between a request and the repeat, such as a chat template's beginning of an answer.
    chunk_size : int
        Tokens of a part.
    n_overlap : int
    n_sink : int

    References
    ----------
    "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.KVzip(n_sink=1), keys, again=[(keys, keys)], budget=4).positions[0].tolist()
    [[0, 2, 3, 7], [0, 5, 6, 8]]
    """

    repeat_ids: tuple[int, ...] = ()
    part_ids: tuple[int, ...] | None = None
    answer_ids: tuple[int, ...] = ()
    chunk_size: int = 2048
    n_overlap: int = 8
    n_sink: int = 4
    name = "kvzip"
    needs_again = True
    holds = False
    least = (("chunk_size", 1), ("n_overlap", 0), ("n_sink", 0))

    def __post_init__(self) -> None:
        for field in ("repeat_ids", "part_ids", "answer_ids"):
            ids = getattr(self, field)
            if field == "part_ids" and ids is None:
                continue
            if not isinstance(ids, (list, tuple)) or not all(is_whole(x) and x >= 0 for x in ids):
                raise ValueError(f"{field} is {ids!r}; expected a list of token ids")
            object.__setattr__(self, field, tuple(map(int, ids)))
        super().__post_init__()

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        repeat: str = "Write down all of the text above once more, word for word.",
        part: str = "Write down the text above once more, word for word, from where it says:",
        **settings: Any,
    ) -> "KVzip":
        """With a request in words: as a user's message where the tokenizer has a chat template, else on a line of its
        own.

        Parameters
        ----------
        tokenizer : transformers tokenizer
        repeat, part : str
            The request for the beginning of the prompt, and for a later part of it.
        settings
            The class's other parameters.

        Raises
        ------
        ValueError
            If the chat template does not put a user's message, as it is, after what came before.

        Examples
        --------
        >>> import kvpitfalls as kvp
        >>> from kvpitfalls.hf.load import load
        >>> model, tokenizer = load()
        >>> tokenizer.decode(kvp.KVzip.for_tokenizer(tokenizer, "Once more:").repeat_ids)
        '<|im_start|>user\\nOnce more:'
        """
        (before, after), (before_part, _) = (_around(tokenizer, text) for text in (repeat, part))
        texts = {"repeat_ids": before + repeat, "part_ids": before_part + part, "answer_ids": after}
        ids: dict[str, Any] = {
            name: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for name, text in texts.items()
        }
        return cls(**ids, **settings)

    def always(self, n_token: int) -> int:
        """The sinks."""
        return self.n_sink

    def again(self, tokens: Sequence[int]) -> list[list[int]]:
        """See the class."""
        begins = range(0, len(tokens), self.chunk_size)
        return [[*self._lead(tokens, begin), *tokens[begin : begin + self.chunk_size]] for begin in begins]

    def _lead(self, tokens: Sequence[int], begin: int) -> list[int]:
        """What is read before the part that begins there."""
        if begin == 0:
            return [*self.repeat_ids, *self.answer_ids]
        later = self.repeat_ids if self.part_ids is None else self.part_ids
        overlap = tokens[begin - min(self.n_overlap, self.chunk_size) : begin]
        return [*later, *overlap, *self.answer_ids]

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        import torch

        again: Any = inputs.again
        keys, queries, read = (as_torch(x).detach() for x in (inputs.keys, again.queries, again.keys))
        n_row, n_head, n_token, _ = keys.shape
        if again.before is None:
            scores = torch.zeros(n_row, n_head, n_token, dtype=torch.float32, device=keys.device)
        else:
            scores = as_torch(again.before).clone()
        for row, (begin, end) in enumerate(inputs.valid):
            start = again.turn * self.chunk_size
            if start >= end - begin:
                continue
            first, last = begin + start, min(begin + start + self.chunk_size, end)
            n_lead, sink = len(self._lead(range(end - begin), start)), begin + min(self.n_sink, start)
            n_read = n_lead + last - first
            own, n_old = slice(row, row + 1), sink - begin + last - first
            seen = torch.cat([keys[own, :, begin:sink], keys[own, :, first:last], read[own, :, :n_read]], 2)
            arrays = {"keys": seen, "queries": queries[own, :, :n_read], "lse": None}
            part = Inputs.of(inputs, **arrays, valid=[(0, seen.shape[2])])
            votes = list(_votes(inputs.segments[row], first, last, n_lead, sink - begin))
            most: Any = part.attend([votes]) if part.sinks is None else _most(part, votes)
            scores[own, :, first:last] = most[..., sink - begin : n_old]
            scores[own, :, begin : min(begin + self.n_sink, end)] = 2  # attention is at most 1
        return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores


def _votes(segments: Sequence[tuple[int, int]], first: int, last: int, n_lead: int, n_sink: int) -> Iterator[Vote]:
    """Per segment of a part [first, last): which of the tokens read judge its keys there, where the ``n_sink`` sinks
    stand before the part, and what is read after it."""
    n_old = n_sink + last - first
    for begin, end in segments:
        low, high = max(begin, first) - first, min(end, last) - first
        if low < high:
            own = n_old + n_lead + low, n_old + n_lead + high
            judges = (n_old, n_old + n_lead + last - first) if len(segments) == 1 else own
            yield Vote((n_sink + low, n_sink + high), judges, weight="max")


def _most(part: Inputs, votes: Sequence[Vote]) -> "torch.Tensor":
    """What the core's attention gives by these votes, by torch: float32 (H, n). For learned sinks, since the
    denominators that the core would be given take longer than all of this."""
    import torch

    keys, read = (as_torch(x)[0].float() for x in (part.keys, part.queries))
    (n_head, n_key, n_dim), n_old = keys.shape, keys.shape[1] - read.shape[1]
    queries, most = read.unflatten(0, (n_head, -1)), keys.new_zeros(n_head, n_key)
    places = torch.arange(n_key, device=keys.device)
    step = n_at_once(keys.device, len(read) * n_key)
    for vote in votes:
        low, high = vote.keys
        for start in range(*vote.queries, step):
            stop = min(start + step, vote.queries[1])
            tile = queries[:, :, start - n_old : stop - n_old] * part.scaling
            logits = tile.reshape(n_head, -1, n_dim) @ keys[:, :stop].mT
            if part.softcap:
                logits = part.softcap * (logits / part.softcap).tanh()
            logits = logits.view(n_head, -1, stop - start, stop)
            logits[..., n_old:].masked_fill_(places[n_old:stop] > places[start:stop, None], -torch.inf)
            if part.sinks is not None:
                sinks = part.sinks.to(logits).view(n_head, -1, 1, 1)
                logits = torch.cat([logits, sinks.expand(*logits.shape[:3], 1)], -1)
            of_tile = logits.softmax(-1)[..., low:high].amax((1, 2))
            most[:, low:high] = torch.maximum(most[:, low:high], of_tile)
    return most


def _around(tokenizer: Any, text: str) -> tuple[str, str]:
    """What stands before a request that follows a prompt, and between it and its answer."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n", "\n"
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    asked = [*turns, {"role": "user", "content": text}]
    earlier = apply_template(tokenizer, turns, tokenize=False)
    whole = apply_template(tokenizer, asked, tokenize=False, add_generation_prompt=True)
    message = whole.removeprefix(earlier)
    if message == whole or message.count(text) != 1:
        raise ValueError(
            f"the chat template does not put {text!r} after the messages before; expected repeat_ids and answer_ids "
            "themselves, as token ids: KVzip(repeat_ids=...)"
        )
    before, after = message.split(text)
    return before, after
