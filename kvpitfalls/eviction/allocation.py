"""How a budget is shared over the layers of a model, and over the heads of a layer."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np

from ..errors import BudgetError
from ..numbers import check_whole, is_real, is_whole
from . import ops
from .arrays import Array, Int32
from .budget import largest_remainder, raised_to

if TYPE_CHECKING:
    import torch


class Allocation:
    """How a budget is shared over layers and heads; this one shares it equally.

    Subclass it, and override one method or both.

    Attributes
    ----------
    name : str
        How :func:`kvpitfalls.wrap` calls it; a class with a name can be asked for by it.
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
    Defined for a last layer that keeps at least ``window_size`` tokens (and one), and budgets of at most ``n_token -
    window_size``; refused elsewhere, where kvpress's press keeps what SnapKV would, without a word.

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
        check_heads(self, scores.shape[1])
        edges, quotas = (np.ascontiguousarray(x, np.int32) for x in (edges, quotas))
        tables = _tables(str(self.alpha), scores.shape[2], quotas.shape, edges.tobytes(), quotas.tobytes())
        raised = scores
        if tables.n_floor:
            best, _ = ops.select_checked(scores, edges, tables.floors, None, None, tables.n_floor)
            raised = raised_at(scores, best, padded=tables.is_ragged)
        until, infinite = _until(_best_together(raised, tables), tables), _n_infinite(scores, edges)
        if not isinstance(scores, np.ndarray):
            until, infinite = _to_host(until, infinite)
        counts = np.diff(until).reshape(quotas.shape[0], quotas.shape[2], -1).swapaxes(1, 2)
        floors = np.maximum(tables.floors, np.minimum(infinite, quotas))  # which are of a policy's own, too
        return raised_to(counts.swapaxes(1, 2), floors.swapaxes(1, 2)).swapaxes(1, 2)


class _Tables(NamedTuple):
    """What a choice over all heads of a layer is told of its segments; the same for all layers of a prompt.

    The tokens of all heads stand in one row, segment by segment, and in each head by head: then the core's selection
    from that row is the selection over heads.
    """

    floors: Int32  # (B, H, S): what each head keeps at least
    n_floor: int  # the largest sum of them
    is_ragged: bool  # whether other sums are smaller
    edges: Int32  # (B, S+1), of the segments as they stand here
    is_whole: bool  # whether that is where they stood: one segment a row, all of it
    edges_together: Int32  # (B, S+1), of the one row
    totals: Int32  # (B, 1, S)
    begins: Int32  # (B, S*H+1): where each head of each segment begins in the one row, and the end
    on: "dict[torch.device, torch.Tensor]"  # ``begins`` on each GPU, copied once, not at every layer


@lru_cache(maxsize=64)
def _tables(alpha: str, n_token: int, shape: tuple[int, int, int], of_edges: bytes, of_quotas: bytes) -> _Tables:
    n_row, n_head, n_segment = shape
    edges = np.frombuffer(of_edges, np.int32).reshape(n_row, n_segment + 1)
    quotas = np.frombuffer(of_quotas, np.int32).reshape(shape)
    share = Fraction(alpha)
    least = quotas.astype(np.int64) * share.numerator // share.denominator
    floors = np.minimum(np.maximum(least, 1 if share else 0), quotas).astype(np.int32)
    n_best = floors.sum(-1)
    is_whole = n_segment == 1 and bool((np.diff(edges) == n_token).all())
    widths = np.diff(edges)[..., None] * np.arange(n_head)
    begins = (edges[:, :-1, None] * n_head + widths).reshape(n_row, -1)
    together = edges * n_head
    begins = np.concatenate([begins, together[:, -1:]], 1).astype(np.int32)
    totals = quotas.sum(1, dtype=np.int32)[:, None]
    n_floor = int(n_best.max())
    return _Tables(floors, n_floor, bool(n_best.min() < n_floor), edges, is_whole, together, totals, begins, {})


def _best_together(scores: Array, tables: _Tables) -> Array:
    """Positions (B, N) in the one row of all heads' tokens: the best of each segment, rising, then -1."""
    n_row, n_head, n_token = scores.shape
    together = (scores if tables.is_whole else scores + 0).reshape(n_row, 1, n_head * n_token)
    for b, row in enumerate([] if tables.is_whole else tables.edges.tolist()):
        for low, high in pairwise(row):
            together[b, 0, n_head * low : n_head * high] = scores[b, :, low:high].reshape(-1)  # type: ignore[assignment] # both are of one library
    n_kept = int(tables.totals.sum(-1).max())
    return ops.select_checked(together, tables.edges_together, tables.totals, None, None, n_kept)[0][:, 0]


def _until(positions: Array, tables: _Tables) -> Any:
    """How many of a row's positions lie before each of ``begins``, (B, S*H+1), where the positions are."""
    if isinstance(positions, np.ndarray):
        kept = [row[row >= 0] for row in positions]
        return np.stack([np.searchsorted(row, begins) for row, begins in zip(kept, tables.begins, strict=True)])
    import torch

    if (device := positions.device) not in tables.on:
        tables.on[device] = torch.tensor(tables.begins, device=device)
    n_kept = tables.totals.sum(-1)
    if n_kept.min() < max(1, n_kept.max()):
        positions = positions.masked_fill(positions < 0, torch.iinfo(torch.int32).max)
    return torch.searchsorted(positions, tables.on[device])


def _to_host(*counts: "torch.Tensor") -> list[Int32]:
    """Tensors of whole numbers, a row of each for a prompt, by one copy, for which a GPU is waited for."""
    import torch

    together = torch.cat([x.flatten(1) for x in counts], 1).cpu().numpy().astype(np.int32)
    ends = np.cumsum([math.prod(x.shape[1:]) for x in counts])[:-1]
    return [x.reshape(of.shape) for x, of in zip(np.split(together, ends, axis=1), counts, strict=True)]


def _n_infinite(scores: Array, edges: Int32) -> Any:
    """How many infinite scores each head has in each segment, (B, H, S), where the scores are."""
    infinite = scores == np.inf
    if edges.shape[1] == 2 and (edges == (0, scores.shape[2])).all():
        return infinite.sum(-1)[..., None]
    n_row, n_head, n_token = scores.shape
    ends = np.broadcast_to(edges[:, None], (n_row, n_head, edges.shape[1]))
    if isinstance(infinite, np.ndarray):
        until = np.zeros((n_row, n_head, n_token + 1), np.int32)
        until[..., 1:] = infinite.cumsum(-1)
        return np.diff(np.take_along_axis(until, ends, axis=-1), axis=-1)
    import torch

    last, some = (torch.tensor(x, device=scores.device) for x in (np.maximum(ends - 1, 0).astype(np.int64), ends > 0))
    return (infinite.cumsum(-1).gather(-1, last) * some).diff(dim=-1)


def raised_at(scores: Array, positions: Array, padded: bool = True) -> Array:
    """Scores (B,H,T) that are infinite at these positions (B,H,N); -1, if ``padded``, is none."""
    if isinstance(scores, np.ndarray):
        wide = np.pad(scores, ((0, 0), (0, 0), (0, 1)))  # the place that -1 means
        np.put_along_axis(wide, np.asarray(positions), np.inf, axis=-1)
        return np.ascontiguousarray(wide[..., :-1])
    at = cast("torch.Tensor", positions)
    if not padded:
        return scores.scatter(2, at.long(), np.inf)
    raised = scores.new_zeros(*scores.shape[:2], scores.shape[2] + 1)
    raised[..., :-1] = scores
    return raised.scatter_(2, at.long() % raised.shape[2], float("inf"))[..., :-1].contiguous()


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
    return _layer_budgets(allocation, n_token, n_kept, n_layer)


@lru_cache(maxsize=256)
def _layer_budgets(allocation: Allocation, n_token: int, n_kept: int, n_layer: int) -> tuple[int, ...]:
    budgets = list(allocation.layers(n_token, n_kept, n_layer))
    are_whole = all(map(is_whole, budgets))
    if (
        not are_whole
        or len(budgets) != n_layer
        or not all(1 <= n <= n_token for n in budgets)
        or sum(budgets) != n_layer * n_kept
    ):
        raise ValueError(
            f"allocation {allocation!r} gives the layers {budgets}; expected {n_layer} whole numbers from 1 to "
            f"{n_token} with the sum "
            f"{n_layer * n_kept}"
        )
    return tuple(int(n) for n in budgets)


def head_quotas(allocation: Allocation, scores: Array, edges: Int32, quotas: Int32) -> Int32:
    """What each head keeps of each segment: what the allocation says, checked unless it is this package's own; see
    :meth:`Allocation.heads`."""
    if type(allocation).heads is Ada.heads:
        return allocation.heads(scores, edges, quotas)
    shared = np.asarray(allocation.heads(scores, edges, quotas))
    if shared.shape != quotas.shape or shared.dtype.kind not in "iu":
        raise ValueError(
            f"allocation {allocation!r} gives quotas {shared.dtype} {shared.shape}; expected whole numbers "
            f"{quotas.shape}"
        )
    infinite = _n_infinite(scores, edges)
    least = np.minimum(infinite if isinstance(scores, np.ndarray) else _to_host(infinite)[0], quotas)
    most = np.diff(edges)[:, None]
    if (shared.sum(1) != quotas.sum(1)).any() or (shared < least).any() or (shared > most).any():
        raise ValueError(
            f"allocation {allocation!r} gives the heads quotas of other sums than theirs, below what must be kept, or "
            "above what a "
            f"segment has; expected the sums {quotas.sum(1).tolist()}"
        )
    return shared.astype(np.int32)
