"""From a compression ratio to a number of tokens, and from a number of tokens to one quota per segment.

All rounding of this package happens here, in exact arithmetic.
"""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor, lcm
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..numbers import MOST, as_meant, beyond, is_real, is_whole
from .arrays import Int32

IntArray: TypeAlias = npt.NDArray[Any]  # whole numbers; of Python's where NumPy's are too small


def check_budget(compression_ratio: float | None, budget: int | None) -> None:
    """Raise unless exactly one of the two is given and in its range.

    Raises
    ------
    ValueError
        If both or none is given, the ratio is outside [0, 1), or the budget is not a whole number of at least 1.
    """
    if (compression_ratio is None) == (budget is None):
        amounts = "neither" if budget is None else f"compression_ratio={compression_ratio!r} and budget={budget!r}"
        raise ValueError(
            f"exactly one of compression_ratio (the share removed) and budget (tokens kept) is expected; {amounts} was "
            "given"
        )
    if budget is not None:
        if not is_whole(budget) or not 1 <= budget <= MOST:
            raise ValueError(f"budget is {budget!r}; expected a whole number of tokens, at least 1{beyond(budget)}")
    elif not is_real(compression_ratio) or not 0 <= compression_ratio < 1:
        raise ValueError(f"compression_ratio is {compression_ratio!r}; expected the share removed, a number in [0, 1)")


@lru_cache(maxsize=1024, typed=True)
def kept_tokens(n_token: int, compression_ratio: float | None = None, budget: int | None = None) -> int:
    """How many of ``n_token`` tokens are kept.

    ``floor(n_token * (1 - compression_ratio))`` in exact arithmetic on the ratio as it is meant in decimal (0.9 of 1000
    keeps 100, where binary floats keep 99, and so does 1 - 0.1), at least 1; or ``budget``, at most ``n_token``.

    Examples
    --------
    >>> kept_tokens(1000, compression_ratio=0.9), kept_tokens(5, compression_ratio=0.99), kept_tokens(10, budget=64)
    (100, 1, 10)
    """
    check_budget(compression_ratio, budget)
    if budget is not None:
        return min(int(budget), n_token)
    return max(1, floor(n_token * (1 - Fraction(str(as_meant(cast("float", compression_ratio)))))))


def apportion(
    total: int,
    lengths: Sequence[int],
    weights: Sequence[float | Fraction] | None = None,
    floors: Sequence[int] | None = None,
    payers: Sequence[bool] | None = None,
) -> list[int]:
    """Split ``total`` tokens over segments in proportion to weight times length, by largest remainder.

    Parameters
    ----------
    total : int
        Tokens to split; ``sum(floors) <= total <= sum(lengths)``.
    lengths : sequence of int
        Tokens each segment has; no segment gets more.
    weights : sequence of float, optional
        Relative share kept per token, 1 each by default.
    floors : sequence of int, optional
        Tokens each segment gets at least (protected ones), 0 each by default.
    payers : sequence of bool, optional
        Segments that take or give a token so that others with equal shares get equal quotas (unmarked text); none by
        default.

    Returns
    -------
    list of int
        Quotas with ``sum == total`` and ``floors <= quota <= lengths``, each within one token of its exact share (a
        payer: two). Equal remainders go to the later segment; but where rounding would give more to some of several
        equal shares, all of them are rounded down if the payers can take what that leaves, else up if they can give
        what that needs, at most one token each.

    Raises
    ------
    ValueError
        If no such quotas exist.

    Notes
    -----
    The exact shares are ``clip(c * weight * length, floor, length)`` with the one ``c`` that makes them sum to
    ``total``.

    Examples
    --------
    >>> apportion(10, [20, 30]), apportion(10, [20, 30], floors=[7, 0]), apportion(5, [5, 5])
    ([4, 6], [7, 3], [2, 3])
    >>> apportion(10, [5, 10, 5]), apportion(10, [5, 10, 5], payers=[False, True, False])
    ([2, 5, 3], [2, 6, 2])
    """
    floors = list(floors) if floors is not None else [0] * len(lengths)
    if not sum(floors) <= total <= sum(lengths) or any(low > high for low, high in zip(floors, lengths, strict=True)):
        raise ValueError(
            f"cannot split {total} tokens over segments of {list(lengths)} that must keep at least {floors}"
        )
    rates = [Fraction(w) * n for w, n in zip(weights or [1] * len(lengths), lengths, strict=True)]
    reachable = sum(n if rate > 0 else low for n, low, rate in zip(lengths, floors, rates, strict=True))
    if reachable < total:  # every weighted segment is full: the rest goes to those of weight 0
        floors = [n if rate > 0 else low for n, low, rate in zip(lengths, floors, rates, strict=True)]
        rates = [Fraction(n) for n in lengths]
    shares = _clipped_shares(total, rates, floors, lengths)
    quotas, order = largest_remainder(shares, total)
    return quotas if payers is None else _made_equal(quotas, shares, order, payers, floors, lengths)


def _clipped_shares(total: int, rates: list[Fraction], floors: Sequence[int], lengths: Sequence[int]) -> list[Fraction]:
    unit = lcm(*(rate.denominator for rate in rates))
    wholes = [rate.numerator * (unit // rate.denominator) for rate in rates]

    def parts(c: Fraction) -> tuple[list[int], int]:
        """The shares as whole numbers, and of how much: fractions would take ten times as long to add up."""
        one = c.denominator * unit
        rows = zip(wholes, floors, lengths, strict=True)
        return [min(max(c.numerator * n, low * one), high * one) for n, low, high in rows], one

    def added(c: Fraction) -> Fraction:
        numbers, one = parts(c)
        return Fraction(sum(numbers), one)

    # The sum grows with c in straight pieces; the corners are where a segment leaves its floor or fills up.
    corners = sorted(
        {
            Fraction(edge) / rate
            for rate, *edges in zip(rates, floors, lengths, strict=True)
            if rate > 0
            for edge in edges
        }
    )
    at = min(bisect_left(corners, Fraction(total), key=added), len(corners) - 1)
    below, above = corners[at - 1] if at > 0 else Fraction(0), corners[at] if corners else Fraction(0)
    at_below, at_above = added(below), added(above)
    c = above if at_above == at_below else below + (above - below) * (total - at_below) / (at_above - at_below)
    numbers, one = parts(c)
    return [Fraction(n, one) for n in numbers]


def largest_remainder(shares: list[Fraction], total: int) -> tuple[list[int], list[int]]:
    """Whole shares of the sum ``total``, each within one of its exact share, and their places by falling remainder, the
    later first."""
    quotas = [int(x) for x in shares]
    order = sorted(range(len(shares)), key=lambda j: (shares[j] - quotas[j], j), reverse=True)
    for j in order[: total - sum(quotas)]:
        quotas[j] += 1
    return quotas, order


def _made_equal(
    quotas: list[int],
    shares: list[Fraction],
    order: list[int],
    payers: Sequence[bool],
    floors: Sequence[int],
    lengths: Sequence[int],
) -> list[int]:
    """Where some of several equal shares were rounded up: all down, or all up, at the cost of the payers; ``quotas`` if
    they cannot."""
    up = {j for j in order if not payers[j] and quotas[j] > shares[j]}
    down = {j for j in order if not payers[j] and quotas[j] < shares[j]}
    parted = {shares[j] for j in up} & {shares[j] for j in down}
    takers = [j for j in order if payers[j] and quotas[j] < lengths[j]]
    givers = [j for j in order if payers[j] and quotas[j] > floors[j]]
    takers.sort(key=lambda j: quotas[j] - shares[j])  # first who is furthest below its share
    givers.sort(key=lambda j: shares[j] - quotas[j])
    for rounded, step, paying in ((up, -1, takers), (down, 1, givers)):
        changed = [j for j in rounded if shares[j] in parted]
        if len(paying) >= len(changed):
            for mine, theirs in zip(changed, paying, strict=False):
                quotas[mine] += step
                quotas[theirs] -= step
            return quotas
    return quotas


def floor_and_rest(total: int, lengths: Sequence[int], floors: Sequence[int]) -> list[int]:
    """The authors' split: ``total * length // sum(lengths)`` each, what is left over to the last segment; never below
    ``floors``.

    Source: the paper's code (paper: arXiv 2510.00231, Algorithm 1 rounds instead).

    Examples
    --------
    >>> floor_and_rest(67, [89, 46], [0, 0])
    [44, 23]
    """
    quotas = [total * n // sum(lengths) for n in lengths[:-1]]
    quotas = [
        max(low, min(q, total - sum(floors[j + 1 :]) - sum(quotas[:j])))
        for j, (q, low) in enumerate(zip(quotas, floors, strict=False))
    ]
    return [*quotas, total - sum(quotas)]


def blend(counts: IntArray, quotas: IntArray, strength: float) -> Int32:
    """Quotas between two splits of the same total: ``(1 - strength) * counts + strength * quotas``, by largest
    remainder.

    Parameters
    ----------
    counts, quotas : ndarray of int, shape (..., S)
        Tokens per segment; both sum to the same totals.
    strength : float
        lambda in [0, 1]: 0 gives ``counts``, 1 gives ``quotas``.

    Returns
    -------
    ndarray of int32, shape (..., S)
        Sums are kept exactly; equal remainders go to the later segment.
    """
    share = Fraction(str(strength))
    # a strength of many digits has a denominator that leaves int64 no room: then Python's own numbers
    exact: Any = np.int64 if share.denominator * max(int(counts.sum(-1).max()), 1) < 2**62 else object
    scaled = (share.denominator - share.numerator) * counts.astype(exact) + share.numerator * quotas.astype(exact)
    whole, rest = scaled // share.denominator, scaled % share.denominator
    blended: Int32 = (whole + _largest(rest, rest.sum(-1, keepdims=True) // share.denominator)).astype(np.int32)
    return blended


def raised_to(quotas: IntArray, floors: IntArray) -> Int32:
    """Quotas of the same totals, none below its floor; what that takes is paid by the others, in proportion to what
    they have above theirs.

    Parameters
    ----------
    quotas, floors : ndarray of int, shape (..., S)
        ``floors.sum(-1) <= quotas.sum(-1)``.

    Returns
    -------
    ndarray of int32, shape (..., S)

    Examples
    --------
    >>> raised_to(np.array([0, 12, 8]), np.array([5, 0, 4])).tolist()
    [5, 8, 7]
    """
    raised = np.maximum(quotas, floors).astype(np.int64)
    spare, over = raised - floors, (raised - quotas).sum(-1, keepdims=True)
    if not over.any():
        return raised.astype(np.int32)
    n_spare = np.maximum(spare.sum(-1, keepdims=True), 1)
    paid, rest = over * spare // n_spare, over * spare % n_spare
    kept: Int32 = (raised - paid - _largest(rest, over - paid.sum(-1, keepdims=True))).astype(np.int32)
    return kept


def _largest(rest: IntArray, n: IntArray) -> IntArray:
    """True for the ``n`` largest of each row; of equal ones the later."""
    order = np.argsort(-rest[..., ::-1], axis=-1, kind="stable")  # reversed, so that the later comes first
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(rest.shape[-1]), rest.shape), axis=-1)
    return rank[..., ::-1] < n
