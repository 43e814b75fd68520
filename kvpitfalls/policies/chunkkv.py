"""ChunkKV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ..eviction.arrays import Array
from ..numbers import is_whole
from .base import Inputs, Policy, get_policy
from .snapkv import SnapKV

_SNAPKV = SnapKV()
Spans: TypeAlias = Sequence[tuple[int, int]]


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
        if self._scorer.allocation != "uniform":
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

        scores: Array = self._scorer.scored(inputs) + 0  # its own may be a view
        tokens = torch.as_tensor(scores)
        of_all = tokens.sum(1)
        for row, segments in enumerate(inputs.segments):
            for begin, end, n in self._alike(segments, inputs.spans[row], inputs.valid[row]):
                means = of_all[row, begin:end].unflatten(0, (-1, n)).mean(-1)
                tokens[row, :, begin:end] = means.repeat_interleave(n)
        return scores

    def _alike(self, segments: Spans, spans: Spans, valid: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Ranges that are whole chunks of n tokens each."""
        if not isinstance(self.chunks, int):
            yield from ((begin, end, end - begin) for begin, end in self._instructions(segments, spans, valid))
            return
        for begin, end in segments:
            last = end - (end - begin) % self.chunks
            if begin < last:
                yield begin, last, self.chunks
            if last < end:
                yield last, end, end - last

    def _instructions(self, segments: Spans, spans: Spans, valid: tuple[int, int]) -> list[tuple[int, int]]:
        if not spans or len(segments) > 1:
            marked = "no instructions" if not spans else "segments that have quotas"
            raise ValueError(
                f"policy {self!r} was given {marked}; expected instructions, and fair=False or a floor, since it keeps "
                "them whole"
            )
        edges = sorted({*valid, *(edge for span in spans for edge in span)})
        return list(pairwise(edges))
