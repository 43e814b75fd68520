"""Which queries judge which keys: votes, and the table of them that the core takes."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..numbers import is_whole

_WEIGHTS = {"sum": 0, "mean": 1, "age": 2, "max": 3}


class Vote(NamedTuple):
    """Which queries judge which keys; the Python face of a vote in ``csrc/kvp.h``.

    Parameters
    ----------
    keys : (int, int)
        The keys that are judged, ``[begin, end)``.
    queries, more_queries : (int, int)
        The positions whose queries vote on them, each on keys not after itself.
    weight : {"mean", "age", "sum", "max"}
        A key's sum of attention is divided by the number of voters, by ``max(1, age_end - key)``, or not at all; or
        what counts is the most attention that any voter's head pays to it (on a GPU in all of a call's votes or none).
    age_end : int
        See ``weight``.
    window : (int, int)
        Keys that score above any attention, the newest highest.

    Examples
    --------
    TOVA over 10 tokens: the last one judges all others, and is itself kept first.

    >>> Vote(keys=(0, 9), queries=(9, 10), window=(9, 10)).weight
    'mean'
    """

    keys: tuple[int, int]
    queries: tuple[int, int]
    more_queries: tuple[int, int] = (0, 0)
    weight: str = "mean"
    age_end: int = 0
    window: tuple[int, int] = (0, 0)


def of_keys(keys: tuple[int, int]) -> Vote:
    return Vote(keys, queries=(0, 0), weight="sum")


@lru_cache(maxsize=256)
def pack(votes: tuple[tuple[Vote, ...], ...]) -> npt.NDArray[np.int32]:
    """Votes as the core takes them, int32 (B, V, 10): the same for every layer, so made once. Rows with fewer votes end
    in empty ones."""
    packed = np.zeros((len(votes), max(map(len, votes), default=0) or 1, 10), np.int32)
    for row, of_row in zip(packed, votes, strict=True):
        for packed_vote, vote in zip(row, of_row, strict=False):
            packed_vote[:] = _packed(vote)
    return packed


def _packed(vote: Vote) -> list[int]:
    if not isinstance(vote, Vote):
        raise TypeError(f"votes hold a {type(vote).__name__} for a row; expected a list of Vote for each row")
    if vote.weight not in _WEIGHTS:
        raise ValueError(f"a vote has weight {vote.weight!r}; expected one of {', '.join(map(repr, _WEIGHTS))}")
    ranges = vote.keys, vote.queries, vote.more_queries, vote.window
    numbers = [x for pair in (*ranges, (0, vote.age_end)) for x in (pair if isinstance(pair, tuple) else ())]
    if len(numbers) != 10 or not all((type(x) is int or is_whole(x)) and abs(int(x)) < 2**31 for x in numbers):
        raise ValueError(f"votes hold {vote}; expected ranges (begin, end) and an age_end, of whole numbers")
    return [*vote.keys, *vote.queries, *vote.more_queries, _WEIGHTS[vote.weight], vote.age_end, *vote.window]


def packed_rows(votes: Sequence[Sequence[Vote]], n_row: int) -> npt.NDArray[np.int32]:
    """:func:`pack`, of whatever was given."""
    try:
        rows = tuple(map(tuple, votes))
    except TypeError:
        raise TypeError(f"votes is {votes!r}; expected a list of Vote for each row") from None
    try:
        packed = pack(rows)
    except TypeError:  # without a hash, if it is not said below
        for vote in (vote for row in rows for vote in row):
            _packed(vote)
        raise
    if len(packed) != n_row:
        raise ValueError(f"votes are of {len(packed)} rows; expected {n_row}, a list of Vote for each row of the keys")
    return packed
