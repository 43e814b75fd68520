"""SnapKV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..eviction.arrays import as_torch
from .base import Call, Inputs, Policy
from .votes import Vote, pack

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keep what the last ``window_size`` tokens attend to, smoothed over neighbours; the window itself comes first.

    score[k] = mean over the key head's query heads of pool(mean over the window's queries q of A[h, q, k]). Fair: the
    window is shared out, and each part judges its own segment only. Of N segments, unmarked text included, each has
    ``max(1, window_size // N)`` tokens at its end, or all that it has; what a shorter one leaves goes to the next, and
    the last one has what is left of ``window_size``, at least one. So no part is larger than the window, and with
    ``window_size`` segments or more each part is one token.

    Parameters
    ----------
    window_size : int
        Observation window in tokens. The paper of this package uses 16, SnapKV's own code 32 to 64. A prompt no longer
        than the window is all window: its newest tokens are kept.
    kernel_size : int
        Odd width of the mean over neighbouring keys; neighbours that are missing, or in the window, count as zero.

    References
    ----------
    "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. Fair: arXiv 2510.00231, appendix
    E.4.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.SnapKV(window_size=2), keys, keys, budget=4).positions[0].tolist()
    [[2, 5, 8, 9], [4, 5, 8, 9]]
    """

    window_size: int = 16
    kernel_size: int = 5
    name = "snapkv"
    aliases = ("snap",)
    least = (("window_size", 1), ("kernel_size", 1))
    needs_queries = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; expected an odd number")

    @property
    def recent_queries(self) -> int:  # type: ignore[override] # read only, as whoever asks takes it
        """The window."""
        return self.window_size

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        return inputs.attention([self._votes(row) for row in inputs.segments], kernel_size=self.kernel_size)

    def windows(self, inputs: Inputs) -> Iterator[tuple[int, tuple[int, int, int], "torch.Tensor"]]:
        """Per segment: its row; where keys begin, the window begins, and both end; the window's queries (Hq, W, D)."""

        queries = as_torch(inputs.queries).detach()
        first = inputs.keys.shape[2] - queries.shape[2]
        votes = [self._votes(segments) for segments in inputs.segments]
        inputs.check_voters(pack(tuple(map(tuple, votes))))
        for row, of_row in enumerate(votes):
            for vote in of_row:
                (begin, cut), (_, end) = vote.keys, vote.window
                yield row, (begin, cut, end), queries[row, :, cut - first : end - first]

    def _votes(self, segments: Sequence[tuple[int, int]]) -> list[Vote]:
        share, unused, votes = max(1, self.window_size // len(segments)), 0, []
        for i, (begin, end) in enumerate(segments):
            is_last = i == len(segments) - 1
            wanted = (self.window_size - share * i if is_last else share) + unused
            width = min(max(1, wanted), end - begin)
            unused = max(0, wanted - width)
            votes.append(Vote(keys=(begin, end - width), queries=(end - width, end), window=(end - width, end)))
        return votes
