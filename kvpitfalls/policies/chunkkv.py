"""ChunkKV."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..eviction.allocation import UNIFORM, get_allocation
from ..eviction.arrays import Array, as_torch
from ..numbers import is_whole
from .base import Inputs, Policy, get_policy
from .snapkv import SnapKV

if TYPE_CHECKING:
    import torch

_SNAPKV = SnapKV()
Spans: TypeAlias = Sequence[tuple[int, int]]
Ranges: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class ChunkKV(Policy):
    """Keep whole chunks of text, by the scores of another policy.

    score[k] = mean over k's chunk of the sum over key heads of the policy's scores, the same for all heads. Chunks are
    kept whole, the best first; the last one that fits only in part keeps its first tokens, so budgets are exact
    (kvpress's press rounds down to whole chunks, and lets the first row of a batch choose for all).

    Fair: the policy scores each segment as it does when fair, and chunks begin anew in each segment, so none lies in
    two instructions.

    Parameters
    ----------
    policy : Policy or str
        Whose scores. One that scores a window above all others, such as SnapKV, keeps the window's chunks first.
    chunks : int or "instructions"
        Tokens of a chunk; the last of a segment may be shorter. "instructions": each instruction is a chunk, and so is
        the text before, between and after them. Instructions then are kept whole or lost, which contradicts fair
        shares: such a policy is refused as a fair one, and without instructions.

    Notes
    -----
    Defined for what the other policy is defined for. Not while a budget is held, where chunks are no longer whole text.

    References
    ----------
    "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", arXiv 2502.00299.
    Chunks that are instructions are of this package.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.ChunkKV("keydiff", chunks=3), keys, budget=6).positions[0].tolist()
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    >>> policy = kvp.ChunkKV("keydiff", chunks="instructions")
    >>> kvp.keep(policy, keys, budget=5, spans={"a": (1, 5), "b": (5, 8)}).positions[0, 0].tolist()
    [0, 1, 2, 3, 4]
    """

    policy: Policy | str = _SNAPKV
    chunks: int | str = 20
    name = "chunkkv"
    holds = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", get_policy(self.policy))
        if isinstance(self.policy, ChunkKV):
            raise ValueError("policy is a ChunkKV itself; expected one that scores tokens")
        if get_allocation(self._scorer.allocation) != UNIFORM:
            raise ValueError(
                f"policy is {self.policy!r}, which shares its budget by itself; expected one that scores tokens"
            )
        if self._scorer.needs_again:
            raise ValueError(
                f"policy is {self.policy!r}, which judges part by part what the model reads after the prompt; expected "
                "one that scores all tokens at once"
            )
        is_length = is_whole(self.chunks) and self.chunks >= 1
        if not is_length and self.chunks != "instructions":
            raise ValueError(f"chunks is {self.chunks!r}; expected a whole number, at least 1, or 'instructions'")

    @property
    def _scorer(self) -> Policy:
        return get_policy(self.policy)

    @property
    def needs_queries(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether the other policy does."""
        return self._scorer.needs_queries

    @property
    def needs_rotary(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether the other policy does."""
        return self._scorer.needs_rotary

    @property
    def needs_values(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether the other policy does."""
        return self._scorer.needs_values

    @property
    def needs_output(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether the other policy does."""
        return self._scorer.needs_output

    @property
    def paper_quotas(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """As the other policy."""
        return self._scorer.paper_quotas

    def check(self, n_token: int, n_kept: int) -> None:
        """What the other policy checks."""
        self._scorer.check(n_token, n_kept)

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        import torch

        scores: Array = self._scorer.scored(inputs)
        tokens = as_torch(scores).detach()
        length = inputs.n_token if isinstance(self.chunks, str) else self.chunks
        lengths, chunk_of = _chunks_of(self._ranges(inputs), length, inputs.n_token, tokens.device)
        of_all = tokens.sum(1, dtype=torch.float64)
        # Not checked by torch, for which a GPU would be waited for: the lengths are ours, and have the right sum.
        means = torch.segment_reduce(of_all, "mean", lengths=lengths, axis=1, unsafe=True)
        of_tokens = torch.empty_like(tokens).copy_(means.gather(1, chunk_of)[:, None])
        return of_tokens.numpy() if isinstance(scores, np.ndarray) else of_tokens

    def _ranges(self, inputs: Inputs) -> Ranges:
        """Per row, what is cut into chunks, the last of which may be shorter."""
        if not isinstance(self.chunks, str):
            return tuple(map(tuple, inputs.segments))
        rows = zip(inputs.segments, inputs.spans, inputs.valid, strict=True)
        return tuple(tuple(self._instructions(*row)) for row in rows)

    def _instructions(self, segments: Spans, spans: Spans, valid: tuple[int, int]) -> list[tuple[int, int]]:
        if not spans or len(segments) > 1:
            marked = "no instructions" if not spans else "segments that have quotas"
            raise ValueError(
                f"policy {self!r} was given {marked}; expected instructions, and fair=False or a floor, since it keeps "
                "them whole"
            )
        edges = sorted({*valid, *(edge for span in spans for edge in span)})
        return list(pairwise(edges))


@lru_cache(maxsize=64)
def _chunks_of(ranges: Ranges, length: int, n_token: int, device: "torch.device") -> "list[torch.Tensor]":
    """How many tokens each chunk of a row has, (B,C), and which chunk a token is in, (B,T); the same for all layers of
    a prompt, so made once. Padding has chunks of its own, and rows with fewer chunks end in empty ones."""
    import torch

    rows = []
    for of_row in ranges:
        begins = {0, *(begin for begin, _ in of_row), *(end for _, end in of_row)}
        begins.update(*(range(begin, end, length) for begin, end in of_row))
        rows.append(np.diff(sorted({*begins, n_token})))
    lengths = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for to, row in zip(lengths, rows, strict=True):
        to[: len(row)] = row
    chunk_of = np.stack([np.repeat(np.arange(len(row)), row) for row in rows])
    return [torch.from_numpy(x).to(device) for x in (lengths, chunk_of)]
