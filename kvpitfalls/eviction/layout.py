"""Where instructions stand in a batch, and what follows from it for every layer alike: segments, floors and quotas."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError
from ..numbers import is_listed, is_whole
from . import ops
from .arrays import Array, Int32, Table
from .budget import apportion, floor_and_rest
from .fairness import Fair


@runtime_checkable
class HasEdges(Protocol):
    """A span, as a prompt has it."""

    @property
    def start(self) -> int:
        """Its first token."""
        ...

    @property
    def end(self) -> int:
        """One past its last token."""
        ...


Edges: TypeAlias = Sequence[int] | HasEdges
Spans: TypeAlias = Mapping[str, Edges] | Iterable[Edges] | Sequence[Mapping[str, Edges] | None]  # see keep
Protect: TypeAlias = str | int | Iterable[str | int] | Array  # see keep
PROTECT_WORDS = ("sinks", "boundary")  # what ``protect`` knows beside names, texts and positions


@dataclass(frozen=True)
class Layout:
    """What stands where in each row of a batch: the same for all layers, policies and budgets.

    Attributes
    ----------
    n_token : int
        T, padding included.
    valid : list of (int, int)
        Per row, the range of real tokens.
    spans : list of dict of str to (int, int)
        Per row, the instructions in order of position.
    protected : list of list of int
        Per row, the positions that are kept whatever their score.
    splits, masks : dict
        What was derived from this layout and is the same for every layer; filled as it is used.
    """

    n_token: int
    valid: Sequence[tuple[int, int]]
    spans: Sequence[Mapping[str, tuple[int, int]]]
    protected: Sequence[Sequence[int]]
    splits: dict[Fair, "Split"] = field(default_factory=dict, compare=False, repr=False)
    masks: dict[Hashable, Array] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        n_row: int,
        n_token: int,
        *,
        valid: Table | None = None,
        spans: Spans | None = None,
        protect: Protect | None = None,
        n_sink: int = 4,
        limit: Callable[[int], int] | None = None,
    ) -> "Layout":
        """Check and complete what a caller gives; see :func:`keep`. ``limit``: of a row's real tokens, so many are
        kept; for "boundary"."""
        protect = read_once(protect)
        if valid is None and spans is None and protect is None:
            return _bare_layout(n_row, n_token)
        ranges = [(0, n_token)] * n_row if valid is None else _ranges(valid)
        if len(ranges) != n_row:
            raise ValueError(f"valid has {len(ranges)} rows; expected {n_row}, as keys has")
        for begin, end in ranges:
            if not 0 <= begin < end <= n_token:
                raise ValueError(
                    f"valid holds [{begin}, {end}); expected a range that is not empty inside [0, {n_token})"
                )
        if _is_mask(protect) and tuple(protect.shape) not in ((n_token,), (n_row, n_token)):
            raise ValueError(f"protect has shape {tuple(protect.shape)}; expected ({n_token},) or ({n_row}, {n_token})")
        named = [
            _named_spans(of_row, *of_valid) for of_row, of_valid in zip(_per_row(spans, n_row), ranges, strict=True)
        ]
        protected = [protected_positions(protect, b, *ranges[b], named[b], n_sink, limit) for b in range(n_row)]
        return cls(n_token, ranges, named, protected)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Per row, how many tokens are real."""
        return tuple(end - begin for begin, end in self.valid)

    @cached_property
    def valid_array(self) -> Int32 | None:
        """``valid`` as int32 (B, 2); None if all tokens are real."""
        return None if all(row == (0, self.n_token) for row in self.valid) else np.array(self.valid, np.int32)

    def split(self, fair: Fair) -> "Split":
        """The rows as this fairness cuts them; the same for equal ones."""
        if fair not in self.splits:
            self.splits[fair] = Split(fair, self)
        return self.splits[fair]

    @cached_property
    def mask(self) -> npt.NDArray[np.uint8] | None:
        """The protected positions as uint8 (B,T); None if there are none."""
        if not any(self.protected):
            return None
        mask = np.zeros((len(self.valid), self.n_token), np.uint8)
        for row, positions in zip(mask, self.protected, strict=True):
            row[list(positions)] = 1
        return mask

    def mask_beside(self, scores: Array) -> Array | None:
        """:attr:`mask` where the scores are; copied to each GPU once, not at every layer."""
        if self.mask is None:
            return None
        device = getattr(scores, "device", None)
        if device not in self.masks:
            self.masks[device] = ops.beside(self.mask, scores)
        return self.masks[device]


@dataclass(frozen=True, eq=False)
class Plan:
    """Segments and quotas, as the core takes them.

    Attributes
    ----------
    edges : ndarray of int32, shape (B, S+1)
    quotas : ndarray of int32, shape (B, H, S)
    n_kept : int
        The largest sum of quotas.
    """

    edges: Int32
    quotas: Int32
    n_kept: int

    @cached_property
    def is_full(self) -> bool:
        """Whether every row keeps as many tokens as there are places; by the quotas, since what is kept may be on a GPU
        that is still at work."""
        kept = np.minimum(self.quotas, np.diff(self.edges)[:, None]).sum(-1)
        return bool((kept == max(1, self.n_kept)).all())


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of a layout, cut into the segments that one fairness gives quotas for: the same for all layers.

    Attributes
    ----------
    fair : Fair
    layout : Layout
    made : dict
        What follows from it and is the same for every layer; filled as it is used.
    """

    fair: Fair
    layout: Layout
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def segments(self) -> list[list[tuple[int, int]]]:
        """Per row, the segments that quotas are given for; one, the whole row, if there is no fairness."""
        if self.fair.rule == "paper":
            for spans in self.layout.spans:
                _check_paper(spans)
        if self.fair.is_biased:
            return [[row] for row in self.layout.valid]
        return [[edges for _, edges in row] for row in self._named]

    @cached_property
    def asks_scores(self) -> bool:
        """Whether quotas depend on what scores say."""
        return not self.fair.is_biased and self.fair.strength < 1

    @cached_property
    def is_paper(self) -> bool:
        """Whether scores, too, are those of the authors' code."""
        return self.fair.strength > 0 and self.fair.rule == "paper"

    @cached_property
    def judged(self) -> list[list[tuple[int, int]]]:
        """Per row, what is scored apart: the segments, or the whole row where fairness is no more than a floor."""
        segments = self.segments  # raises where fairness has none to give
        return segments if self.fair.strength > 0 else [[row] for row in self.layout.valid]

    @cached_property
    def of_inputs(self) -> dict[str, Any]:
        """What a policy is told of the rows, by the names of its inputs."""
        layout, spans = self.layout, [list(row.values()) for row in self.layout.spans]
        of_rows = {"valid": layout.valid, "valid_array": layout.valid_array, "spans": spans}
        return {**of_rows, "segments": self.judged, "paper": self.is_paper}

    @cached_property
    def names(self) -> list[list[str | None]]:
        """Per row, the instruction that owns each segment; None for unmarked text."""
        return [[name for name, _ in row] for row in self._named]

    @cached_property
    def _named(self) -> list[list[tuple[str | None, tuple[int, int]]]]:
        rows = zip(self.layout.spans, self.layout.valid, strict=True)
        return [_cut(spans, *valid, self.fair.template) for spans, valid in rows]

    @cached_property
    def weights(self) -> list[list[float]]:
        """Per row, the weight of each segment; unmarked text weighs 1."""
        weights = self.fair.weights or {}
        for spans in self.layout.spans:
            if unknown := sorted(set(weights) - set(spans)):
                raise ValueError(
                    f"weights name {unknown[0]!r}; expected names of the prompt's instructions: {', '.join(spans)}"
                )
        return [[1.0 if name is None else weights.get(name, 1.0) for name in row] for row in self.names]

    @cached_property
    def floors(self) -> list[list[int]]:
        """Per row, the tokens that each segment keeps at least: protected ones, and an instruction's ``min_tokens``."""
        if self.fair.is_biased:
            return [[len(of_row)] for of_row in self.layout.protected]
        rows = []
        for segments, names, protected in zip(self.segments, self.names, self.layout.protected, strict=True):
            inside = np.searchsorted(protected, [edges for edges in segments])
            least = [
                0 if name is None else min(self.fair.min_tokens, end - begin)
                for name, (begin, end) in zip(names, segments, strict=True)
            ]
            rows.append([max(n, int(after - before)) for n, (before, after) in zip(least, inside, strict=True)])
        return rows

    @cached_property
    def edges(self) -> Int32:
        """The segments as edges (B,S+1); rows with fewer segments end in empty ones."""
        edges = np.empty((len(self.segments), max(map(len, self.segments)) + 1), np.int32)
        for row, of_row in zip(edges, self.segments, strict=True):
            row[0] = of_row[0][0]
            row[1:] = of_row[-1][1]
            row[1 : len(of_row) + 1] = [end for _, end in of_row]
        return edges

    @cached_property
    def floors_array(self) -> Int32:
        """``floors`` (B,S); rows with fewer segments have zeros at the end."""
        n_segment = max(map(len, self.segments))
        return np.array([row + [0] * (n_segment - len(row)) for row in self.floors], np.int32)

    def check_room(self, budgets: Sequence[int]) -> None:
        """Raise where a row's budget is smaller than what must be kept of it."""
        for b, (n_kept, floors) in enumerate(zip(budgets, self.floors, strict=True)):
            if sum(floors) > n_kept:
                needed = f"min_tokens={self.fair.min_tokens} and protection need {sum(floors)}"
                needed = needed if self.fair.min_tokens else f"{sum(floors)} are protected"
                raise BudgetError(f"the budget of row {b} is {n_kept} tokens, but {needed}; expected at least that")

    def quotas(self, budgets: Sequence[int]) -> Int32:
        """Quotas (B,S) of fair shares, before any blending; rows with fewer segments have zeros at the end."""
        quotas = np.zeros((len(budgets), max(map(len, self.segments))), np.int32)
        rows = zip(self.segments, self.weights, self.names, self.floors, strict=True)
        for b, (segments, weights, names, floors) in enumerate(rows):
            lengths = [end - begin for begin, end in segments]
            quotas[b, : len(segments)] = (
                floor_and_rest(budgets[b], lengths, floors)
                if self.fair.rule == "paper"
                else apportion(budgets[b], lengths, weights, floors, [name is None for name in names])
            )
        return quotas

    def plan(self, n_head: int, budgets: tuple[int, ...], is_whole: bool) -> Plan:
        """The best of each row, wherever they are, or a quota for each segment; raises where a budget has no room for
        what must be kept."""
        key = "plan", n_head, budgets, is_whole
        plan: Plan | None = self.made.get(key)
        if plan is None:
            self.check_room(budgets)
            whole = self.layout.valid, np.array(budgets)[:, None]
            edges, quotas = (np.array(x, np.int32) for x in whole) if is_whole else (self.edges, self.quotas(budgets))
            plan = self.made[key] = plan_of(edges, quotas, n_head)
        return plan


def plan_of(edges: Int32, quotas: Int32, n_head: int) -> Plan:
    """The plan of quotas (B,H,S), or (B,S) for every head."""
    shaped = quotas if quotas.ndim == 3 else np.broadcast_to(quotas[:, None], (len(quotas), n_head, quotas.shape[-1]))
    quotas = np.array(shaped, np.int32)
    quotas.flags.writeable = edges.flags.writeable = False  # shared by all layers
    return Plan(edges, quotas, int(quotas.sum(-1).max()))


@lru_cache(maxsize=64)
def _bare_layout(n_row: int, n_token: int) -> Layout:
    if n_row < 1 or n_token < 1:
        raise ValueError(f"keys hold {n_row} rows of {n_token} tokens; expected at least one of each")
    return Layout(n_token, [(0, n_token)] * n_row, [{}] * n_row, [[]] * n_row)


def _ranges(valid: Table) -> list[tuple[int, int]]:
    """Rows (begin, end) of whole numbers."""
    rows: Any = valid
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    if not is_listed(rows):
        raise TypeError(f"valid is {valid!r}; expected a row (begin, end) for each row of keys")
    out = []
    for row in rows:
        pair = tuple(row) if is_listed(row) else (row,)
        if len(pair) != 2 or not all(map(is_whole, pair)):
            raise TypeError(f"valid holds {row!r}; expected (begin, end), whole numbers")
        out.append((int(pair[0]), int(pair[1])))
    return out


def _is_mask(protect: object) -> TypeGuard[Array]:
    return "bool" in str(getattr(protect, "dtype", ""))


def _per_row(spans: Spans | None, n_row: int) -> list[Any]:
    if spans is None or isinstance(spans, Mapping):
        return [spans] * n_row
    if not is_listed(spans):
        raise TypeError(f"spans is {spans!r}; expected (start, end) pairs, by name or in a list")
    rows = list(spans)
    if all(row is None or isinstance(row, Mapping) for row in rows) and rows:
        if len(rows) != n_row:
            raise ValueError(f"spans has {len(rows)} rows; expected {n_row}, as keys has")
        return rows
    return [rows] * n_row


def _named_spans(
    spans: Mapping[str, Edges] | Sequence[Edges] | None, low: int, high: int
) -> dict[str, tuple[int, int]]:
    """Spans as names -> pairs, checked, in order of position."""
    items = (
        []
        if spans is None
        else list(spans.items())
        if isinstance(spans, Mapping)
        else [(f"span {i}", s) for i, s in enumerate(spans)]
    )
    if wrong := [name for name, _ in items if not isinstance(name, str)]:
        raise TypeError(f"spans name {wrong[0]!r}; expected names that are texts")
    edges = {}
    for name, span in items:
        pair = (span.start, span.end) if isinstance(span, HasEdges) else span
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_whole, pair))):  # no range of two
            raise ValueError(f"span {name!r} is {span!r}; expected (start, end) in tokens")
        edges[name] = int(pair[0]), int(pair[1])
    out = dict(sorted(edges.items(), key=lambda item: item[1]))
    last_name, last_end = None, low
    for name, (begin, end) in out.items():
        if not low <= begin <= end <= high:
            raise ValueError(f"span {name!r} is [{begin}, {end}); expected a range inside [{low}, {high})")
        if begin < last_end:
            raise ValueError(f"span {name!r} starts at {begin}, inside span {last_name!r}, which ends at {last_end}")
        last_name, last_end = name, end
    return out


def _cut(
    spans: Mapping[str, tuple[int, int]], low: int, high: int, template: str
) -> list[tuple[str | None, tuple[int, int]]]:
    """The row [low, high) cut into (name, segment); the name of unmarked text is None. A span without a token is no
    segment, but where instructions own the whole row."""
    if template == "separate":
        spans = {name: (begin, end) for name, (begin, end) in spans.items() if begin < end}
    if not spans:
        raise ValueError(
            "fair eviction needs the instructions' places; expected spans that hold tokens, or a Prompt with "
            "instructions, as keep and a wrap's compress take them"
        )
    names, starts, ends = list(spans), [s for s, _ in spans.values()], [e for _, e in spans.values()]
    if template == "absorb":
        return [(name, (b, e)) for name, b, e in zip(names, [low, *starts[1:]], [*starts[1:], high], strict=True)]
    pieces: list[tuple[str | None, tuple[int, int]]] = []
    for name, begin, end in zip([*names, None], [*starts, high], [*ends, high], strict=True):
        if low < begin:
            pieces.append((None, (low, begin)))
        if name is not None:
            pieces.append((name, (begin, end)))
        low = end
    return pieces


def _check_paper(spans: Mapping[str, tuple[int, int]]) -> None:
    edges = list(spans.values())
    if len(edges) != 2 or edges[0][1] != edges[1][0]:
        shown = ", ".join(f"{name} [{b}, {e})" for name, (b, e) in spans.items()) or "none"
        raise ValueError(
            f"fair='paper' expects exactly two instructions that touch; given: {shown}. fair=True takes any number, "
            "with gaps"
        )


def read_once(items: Any) -> Any:
    """What an iterator gives, as a list, since whoever asks it again gets nothing; anything else as it is."""
    return list(items) if isinstance(items, Iterator) else items


def listed(protect: Protect | None) -> list[Any]:
    """The items of what ``protect`` accepts."""
    if protect is None:
        return []
    return list(protect) if is_listed(protect) else [protect]


def protected_positions(
    protect: Protect | None,
    b: int,
    low: int,
    high: int,
    spans: Mapping[str, tuple[int, int]],
    n_sink: int,
    limit: Callable[[int], int] | None,
) -> list[int]:
    """Protected positions of row b: "sinks", "boundary", span names, positions, or a bool mask (T,) or (B,T).

    Notes
    -----
    "boundary", a tenth of the budget at each end of the row: arXiv 2605.18053.
    """
    if protect is None:
        return []
    if _is_mask(protect):
        mask = ops.host(protect)
        return [int(t) for t in np.flatnonzero(mask if mask.ndim == 1 else mask[b]) if low <= t < high]
    positions: set[int] = set()
    for item in listed(protect):
        if isinstance(item, str):
            if item in spans:
                begin, end = spans[item]
                if begin == end:
                    raise ValueError(f"protect names span {item!r}, which is [{begin}, {end}); expected a token in it")
                positions.update(range(begin, end))
            elif item == "sinks":
                positions.update(range(low, min(low + n_sink, high)))
            elif item == "boundary" and limit is not None:
                n_end = limit(high - low) // 10
                positions.update(range(low, min(low + n_end, high)), range(max(high - n_end, low), high))
            else:
                raise ValueError(
                    f"protect names {item!r}; expected 'sinks', 'boundary', a position, or one of the spans: "
                    f"{', '.join(spans) or 'none given'}"
                )
        elif is_whole(item):
            if not low <= item < high:
                raise ValueError(f"protect holds position {item}; expected one inside [{low}, {high})")
            positions.add(int(item))
        else:
            raise ValueError(f"protect holds {item!r}; expected 'sinks', 'boundary', span names or positions")
    return sorted(positions)
