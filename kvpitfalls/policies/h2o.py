"""H2O."""

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Call, Inputs, Policy
from .votes import Vote


@dataclass(frozen=True)
class H2O(Policy):
    """Keep what all tokens attend to, on average.

    score[k] = mean over the key head's query heads of (sum over q >= k of A[h, q, k]) / (T - k): the mean over the
    queries that can see k, where the H2O paper sums (which favours early tokens). Fair: only queries of the key's own
    segment vote. Exact at any length in O(T) memory; no attention matrix is formed. While a budget is held, the sums
    run on over the tokens that are there.

    References
    ----------
    "H2O: Heavy-Hitter Oracle", arXiv 2306.14048; the mean is the one of arXiv 2510.00231. Fair: there, appendix E.5.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.H2O(), keys, keys, budget=4).positions[0].tolist()
    [[6, 7, 8, 9], [2, 5, 6, 8]]
    """

    name = "h2o"
    aliases = ("observed_attention",)
    needs_queries = True
    running = True

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        if inputs.paper:
            return inputs.attention([_paper_votes(*row) for row in zip(inputs.valid, inputs.spans, strict=True)])
        return inputs.attention([[_vote((begin, end), end) for begin, end in row] for row in inputs.segments])


def _vote(keys: tuple[int, int], end: int) -> Vote:
    """Every query from the first key on, up to ``end``, votes."""
    return Vote(keys=keys, queries=(keys[0], end), weight="age", age_end=end)


def _paper_votes(valid: tuple[int, int], spans: Sequence[tuple[int, int]]) -> list[Vote]:
    """The authors' spans: the raw later span does not vote on the raw earlier one, whose divisor ends with it; all else
    is as unfair."""
    (begin, cut), (_, end) = spans
    own = Vote(keys=(begin, cut), queries=(begin, cut), more_queries=(end, valid[1]), weight="age", age_end=cut)
    return [_vote((valid[0], begin), valid[1]), own, _vote((cut, valid[1]), valid[1])]
