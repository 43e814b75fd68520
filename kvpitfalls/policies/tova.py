"""TOVA."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Call, Inputs, Policy
from .votes import Vote


@dataclass(frozen=True)
class TOVA(Policy):
    """Keep what the last token attends to.

    score[k] = mean over all query heads of A[h, last, k]; every head keeps the same tokens, and the last token itself
    is kept first. Fair: each segment's last token judges its own segment.

    References
    ----------
    "Transformers are Multi-State RNNs", arXiv 2401.06104. Fair: arXiv 2510.00231, appendix E.7.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.TOVA(), keys, keys, budget=4).positions[0].tolist()
    [[2, 6, 7, 9], [2, 6, 7, 9]]
    """

    name = "tova"
    needs_queries = True
    recent_queries: ClassVar[int] = 1

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        votes = [[_vote(*segment) for segment in row if segment[0] < segment[1]] for row in inputs.segments]
        if (
            inputs.paper
        ):  # the authors' code gives the earlier anchor a place of its own only if the earlier span is not empty
            for of_row, segments, ((begin, end), *_) in zip(votes, inputs.segments, inputs.spans, strict=True):
                if begin == end > segments[0][0]:
                    of_row[0] = of_row[0]._replace(window=(0, 0))
        return inputs.attention(votes, share_heads=True)


def _vote(begin: int, end: int) -> Vote:
    return Vote(keys=(begin, end - 1), queries=(end - 1, end), window=(end - 1, end))
