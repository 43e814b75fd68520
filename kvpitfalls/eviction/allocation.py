"""How a budget is shared over the layers of a model, and over the heads of a layer."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, cast

import numpy as np

from ..errors import BudgetError
from ..numbers import as_meant, check_whole, is_listed, is_real, is_whole
from . import ops
from .arrays import Array, Int32
from .budget import largest_remainder

if TYPE_CHECKING:
    import torch


class Allocation:
    """How a budget is shared over layers and heads; this one shares it equally.

    Subclass it, and override one method or both.

    Attributes
    ----------
    name : str
        What ``allocation=`` calls one of this package's; an object of your own is handed over and needs none.
    shares_heads : bool
        Whether :meth:`heads` moves anything. Heads of a layer then hold different numbers of tokens, in slots that a
        mask tells apart.
    least_heads : int
        How many key heads a layer must have at least; models with fewer, or with one choice for all of them, are
        refused.

    Examples
    --------
    Twice as much for the first half of the layers as for the second:

    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> class Halves(kvp.Allocation):
    ...     def layers(self, n_token, n_kept, n_layer):
    ...         more = n_kept // 3
    ...         return [n_kept + more] * (n_layer // 2) + [n_kept] * (n_layer % 2) + [n_kept - more] * (n_layer // 2)
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 20, 8), dtype=np.float32)
    >>> kept = [kvp.keep("knorm", keys, budget=9, allocation=Halves(), layer=i, n_layer=4) for i in range(4)]
    >>> [k.counts.tolist() for k in kept]
    [[[12, 12]], [[12, 12]], [[6, 6]], [[6, 6]]]
    """

    name: ClassVar[str | None] = None
    shares_heads: ClassVar[bool] = False
    least_heads: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.heads is not Allocation.heads and not cls.shares_heads:
            raise TypeError(
                f"allocation {cls.__name__} defines heads, which nobody asks for; expected shares_heads = True"
            )

    def layers(self, n_token: int, n_kept: int, n_layer: int) -> Sequence[int]:
        """Tokens that each head of each layer keeps of a row of ``n_token`` real tokens; their sum is ``n_layer *
        n_kept``.

        Only layers whose cache is compressed are counted. Raises ValueError where the allocation is not defined.
        """
        return [n_kept] * n_layer

    def heads(self, scores: Array, edges: Int32, quotas: Int32) -> Int32:
        """Tokens that each head of a layer keeps of each segment.

        Parameters
        ----------
        scores : array of float32, shape (B, H, T)
            Infinite where a token must be kept.
        edges : ndarray of int32, shape (B, S+1)
            The segments': one if nothing is fair, the row.
        quotas : ndarray of int32, shape (B, H, S)
            Of an equal share.

        Returns
        -------
        ndarray of int32, shape (B, H, S)
            With the same sums over heads; for no head fewer than must be kept, or more than the segment has.
        """
        return quotas


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every layer and head."""

    name = "uniform"


@dataclass(frozen=True)
class Pyramid(Allocation):
    """More for lower layers, less for higher ones, falling evenly from layer to layer.

    The last layer keeps ``n_kept / beta`` and the first ``2 * n_kept - n_kept / beta``, or, where that is more than
    ``n_token - window_size``, the first keeps so many and the last what then is left of ``2 * n_kept``. Rounded by
    largest remainder, so that the sum is exact.

    Parameters
    ----------
    beta : float
        At least 1, which shares equally; the higher, the steeper.
    window_size : int
        The policy's, if it keeps a window: what no layer keeps less than, and what the first leaves of a prompt at
        least.

    Notes
    -----
    Defined for two layers or more, a last layer that keeps at least ``window_size`` tokens (and one), and budgets of at
    most ``n_token - window_size``; refused elsewhere, where kvpress's press keeps what SnapKV would, without a word.

    References
    ----------
    "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.

    Examples
    --------
    >>> Pyramid(beta=4).layers(n_token=100, n_kept=40, n_layer=4)
    [70, 50, 30, 10]
    """

    beta: float = 20
    window_size: int = 0
    name = "pyramid"

    def __post_init__(self) -> None:
        if not is_real(self.beta) or not 1 <= self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta!r}; expected a number, at least 1")
        check_whole("window_size", self.window_size, 0)

    def layers(self, n_token: int, n_kept: int, n_layer: int) -> list[int]:
        """See :class:`Allocation`."""
        if n_layer < 2:
            raise ValueError(f"n_layer is {n_layer}; allocation 'pyramid' shares over layers and expects at least 2")
        most = n_token - self.window_size
        if most < self.window_size:
            raise BudgetError(
                f"{n_kept} of {n_token} tokens are kept; allocation {self!r} expects a prompt of at least "
                f"{2 * self.window_size}, a window for the last layer and one that the first leaves, or a smaller "
                "window_size"
            )
        last = n_kept / Fraction(str(self.beta))
        first = min(2 * n_kept - last, Fraction(most))
        last = 2 * n_kept - first
        if n_kept > most:
            raise BudgetError(
                f"{n_kept} of {n_token} tokens are kept; allocation {self!r} expects at most {most}, all but a "
                "window: another "
                "compression_ratio, or a smaller window_size"
            )
        if last < max(1, self.window_size):
            raise BudgetError(
                f"of {n_token} tokens the last layer would keep {float(last):.4g}; allocation {self!r} expects at "
                "least "
                f"{max(1, self.window_size)}: a larger budget, or a smaller beta or window_size"
            )
        step = (first - last) / (n_layer - 1)
        return largest_remainder([first - i * step for i in range(n_layer)], n_layer * n_kept)[0]


@dataclass(frozen=True)
class Ada(Allocation):
    """The best of all heads of a layer together, but of each head at least a part of an equal share.

    Fair: the heads share each segment's quotas, so that a layer keeps as much of each instruction as it would, and each
    head at least that part of it.

    Parameters
    ----------
    alpha : float
        That part, in [0, 1], rounded down, at least one token: 0 puts no floor under a head, 1 shares equally.

    References
    ----------
    "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv 2407.11550.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.array([[[9, 8, 7, 6], [5, 4, 3, 2]]], np.float32)
    >>> Ada(alpha=0.5).heads(scores, np.array([[0, 4]], np.int32), np.array([[[2], [2]]], np.int32)).tolist()
    [[[3], [1]]]
    """

    alpha: float = 0.2
    name = "ada"
    shares_heads = True
    least_heads = 2

    def __post_init__(self) -> None:
        if not is_real(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}; expected a number in [0, 1]")

    def heads(self, scores: Array, edges: Int32, quotas: Int32) -> Int32:
        """See :class:`Allocation`."""
        edges, quotas = (np.ascontiguousarray(x, np.int32) for x in (edges, quotas))
        return ops.share(scores, edges, quotas, self.parts(quotas))

    def parts(self, quotas: Int32) -> Int32:
        """What each head keeps at least of its quotas, (B, H, S)."""
        check_heads(self, quotas.shape[1])
        return _parts(str(as_meant(self.alpha)), quotas.shape, quotas.tobytes())


@lru_cache(maxsize=64)
def _parts(alpha: str, shape: tuple[int, ...], of_quotas: bytes) -> Int32:
    """As :meth:`Ada.parts`; the same for all layers of a prompt, so made once."""
    quotas, part = np.frombuffer(of_quotas, np.int32), Fraction(alpha)
    least = [min(n, max(n * part.numerator // part.denominator, int(part > 0))) for n in quotas.tolist()]
    return np.array(least, np.int32).reshape(shape)  # by Python's numbers: a part's digits may leave int64 no room


def _n_infinite(scores: Array, edges: Int32) -> Int32:
    """How many infinite scores each head has in each segment, (B, H, S)."""
    rows = np.isposinf(scores if isinstance(scores, np.ndarray) else scores.cpu().numpy())
    counts = [
        [heads[:, begin:end].sum(-1) for begin, end in pairwise(of_row)]
        for heads, of_row in zip(rows, edges, strict=True)
    ]
    return np.array(counts, np.int32).swapaxes(1, 2)


def raised_at(scores: Array, positions: Array) -> Array:
    """Scores (B,H,T) that are infinite at these positions (B,H,N); -1 is none."""
    if isinstance(scores, np.ndarray):
        wide = np.pad(scores, ((0, 0), (0, 0), (0, 1)))  # the place that -1 means
        np.put_along_axis(wide, np.asarray(positions), np.inf, axis=-1)
        return np.ascontiguousarray(wide[..., :-1])
    raised = scores.new_zeros(*scores.shape[:2], scores.shape[2] + 1)
    raised[..., :-1] = scores
    at = cast("torch.Tensor", positions).long() % raised.shape[2]
    return raised.scatter_(2, at, float("inf"))[..., :-1].contiguous()


def raised_where(scores: Array, mask: Array) -> Array:
    """Scores (B,H,T) that are infinite where a mask (B,T), uint8, is not 0."""
    if isinstance(scores, np.ndarray):
        return np.where(np.asarray(mask)[:, None] != 0, np.float32(np.inf), scores)
    mask = scores.new_tensor(mask) if isinstance(mask, np.ndarray) else mask
    return scores.masked_fill(mask[:, None] != 0, np.inf)


UNIFORM = Uniform()
_NAMED = {cls.name: cls for cls in (Uniform, Pyramid, Ada)}


def check_heads(allocation: Allocation, n_head: int) -> None:
    """Raise if a layer that chooses for ``n_head`` heads is none for this allocation."""
    if n_head < allocation.least_heads:
        raise ValueError(
            f"one choice serves all heads here; allocation {(allocation.name or allocation)!r} shares over heads "
            "and expects at least "
            f"{allocation.least_heads}"
        )


def get_allocation(allocation: "Allocation | str") -> Allocation:
    """An allocation from an object or a name.

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> get_allocation("ada")
    Ada(alpha=0.2)
    """
    if isinstance(allocation, Allocation):
        if not isinstance(allocation, Hashable):
            raise TypeError(f"allocation {allocation!r} has no hash; expected one, as a frozen dataclass has")
        return allocation
    if isinstance(allocation, str) and allocation in _NAMED:
        return _NAMED[allocation]()
    if isinstance(allocation, str):
        raise ValueError(
            f"allocation is {allocation!r}; expected one of {', '.join(map(repr, _NAMED))}, or a kvpitfalls.Allocation"
        )
    raise TypeError(
        f"allocation is a {type(allocation).__name__}; expected a kvpitfalls.Allocation or one of "
        f"{', '.join(map(repr, _NAMED))}"
    )


def layer_budgets(allocation: Allocation, n_token: int, n_kept: int, n_layer: int) -> tuple[int, ...]:
    """What each layer keeps of a row: what the allocation says, checked.

    Raises
    ------
    ValueError
        If it says something else than ``n_layer`` whole numbers from 1 to ``n_token`` with the sum ``n_layer *
        n_kept``.
    """
    if n_kept == n_token or allocation == UNIFORM:
        return (n_kept,) * n_layer
    is_ours = type(allocation) in _NAMED.values()  # others are asked each time: they may have been changed since
    return (_budgets_once if is_ours else _layer_budgets)(allocation, n_token, n_kept, n_layer)


def _layer_budgets(allocation: Allocation, n_token: int, n_kept: int, n_layer: int) -> tuple[int, ...]:
    given = allocation.layers(n_token, n_kept, n_layer)
    budgets = list(given) if is_listed(given) else []
    are_whole = all(map(is_whole, budgets))
    if (
        not are_whole
        or len(budgets) != n_layer
        or not all(1 <= n <= n_token for n in budgets)
        or sum(budgets) != n_layer * n_kept
    ):
        raise ValueError(
            f"allocation {allocation!r} gives the layers {budgets or given}; expected {n_layer} whole numbers from 1 "
            f"to {n_token} with the sum {n_layer * n_kept}"
        )
    return tuple(int(n) for n in budgets)


_budgets_once = lru_cache(maxsize=256)(_layer_budgets)


def is_ada(allocation: Allocation) -> TypeGuard[Ada]:
    """Whether heads share as :class:`Ada` says: a child of it may have a way of its own."""
    return type(allocation).heads is Ada.heads


def head_quotas(allocation: Allocation, scores: Array, edges: Int32, quotas: Int32) -> Int32:
    """What each head keeps of each segment: what the allocation says, checked unless it is this package's own; see
    :meth:`Allocation.heads`."""
    if is_ada(allocation):
        return allocation.heads(scores, edges, quotas)
    own = scores.copy() if isinstance(scores, np.ndarray) else scores.clone()  # what is written to it stays there
    given = allocation.heads(own, np.array(edges), np.array(quotas))
    try:
        shared = np.asarray(given)
    except (TypeError, ValueError):  # no numbers to look at, or on a GPU
        raise ValueError(
            f"allocation {allocation!r} gives quotas as a {type(given).__name__}; expected an array of whole numbers "
            f"{quotas.shape}, on the host"
        ) from None
    if shared.shape != quotas.shape or shared.dtype.kind not in "iu":
        raise ValueError(
            f"allocation {allocation!r} gives quotas {shared.dtype} {shared.shape}; expected whole numbers "
            f"{quotas.shape}"
        )
    least = np.minimum(_n_infinite(scores, edges), quotas)
    most = np.diff(edges)[:, None]
    if (shared.sum(1) != quotas.sum(1)).any() or (shared < least).any() or (shared > most).any():
        raise ValueError(
            f"allocation {allocation!r} gives the heads quotas of other sums than theirs, below what must be kept, or "
            "above what a "
            f"segment has; expected the sums {quotas.sum(1).tolist()}"
        )
    return shared.astype(np.int32)
