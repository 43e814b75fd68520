"""Where instructions stand in a batch, and how the budget is shared between them."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias, TypeGuard, TypeVar, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError
from ..numbers import as_written, check_whole, is_real, is_whole
from . import ops
from .arrays import Array, Int32, Table

T = TypeVar("T")


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


@dataclass(frozen=True)
class Fair:
    """How the budget is shared between instructions.

    Quotas are for the instructions' own tokens; text that none of them claims is shared out in stretches of its own. So
    any two instructions of equal weight keep shares that differ by less than one token of the shorter, if nothing is
    protected and strength is 1. (By one token, if they are of equal length and no unmarked text is there to take the
    odd one.)

    Parameters
    ----------
    strength : float
        lambda in [0, 1]: 0 is the policy as published (biased), 1 gives every segment its fair quota. Between them each
        head's quotas are ``(1 - lambda) * what the biased policy keeps of the segment + lambda * the fair quota``,
        rounded by largest remainder; inside a segment the scores are the fair ones.
    weights : mapping of str to float, optional
        Relative share kept per token of an instruction, 1 each by default.
    min_tokens : int
        Every instruction keeps at least so many of its own tokens (or all it has) in every head, at any strength and
        under a held budget; protected ones count. Strength 0 is then the biased policy with that floor: in each head
        the best so many of every instruction come first, and the policy's own ranking decides on the rest of the
        budget. So the floor is for the head and layer that keeps least of an instruction, where quotas of a share hold
        for the mean as well.
    template : {"separate", "absorb"}
        Unmarked text, that is, tokens outside all instructions: segments of their own, stretch by stretch, each with
        its proportional quota; or part of the neighbour (those before the first instruction of it, a gap and the end of
        the instruction before), whose quota is then for both, and may be spent on either.
    rule : {"proportional", "paper"}
        "proportional": quotas by largest remainder, votes inside each segment. "paper": the authors' code to the
        letter, which is for exactly two touching instructions: rounded-down quota for the earlier one and the rest for
        the later, their H2O spans, their StreamingLLM ramps; its template is "absorb".

    Notes
    -----
    Source: arXiv 2510.00231, section 5.2 and appendix E (Algorithm 1).

    Examples
    --------
    Of two instructions of 5 tokens each, the first shall keep twice the share:

    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 1, 10, 8), dtype=np.float32)
    >>> fair = kvp.Fair(weights={"a": 2.0})
    >>> kvp.keep("knorm", keys, budget=6, spans={"a": (0, 5), "b": (5, 10)}, fair=fair).quotas.tolist()
    [[[4, 2]]]
    """

    strength: float = 1.0
    weights: Mapping[str, float] | None = None
    min_tokens: int = 0
    template: str = "separate"
    rule: str = "proportional"

    def __post_init__(self) -> None:
        _check_number("strength", self.strength, 0, 1)
        if self.weights is not None and not isinstance(self.weights, Mapping):
            raise TypeError(f"weights is {self.weights!r}; expected a mapping of instruction names to numbers")
        for name, weight in (self.weights or {}).items():
            if not isinstance(name, str):
                raise TypeError(f"weights name {name!r}; expected names of instructions")
            _check_number(f"weights[{name!r}]", weight, 0, 1e9)
        check_whole("min_tokens", self.min_tokens, 0)
        if self.template not in ("separate", "absorb"):
            raise ValueError(f"template is {self.template!r}; expected 'separate' or 'absorb'")
        if self.rule not in ("proportional", "paper"):
            raise ValueError(f"rule is {self.rule!r}; expected 'proportional' or 'paper'")
        if self.rule == "paper" and (self.weights or self.min_tokens):
            raise ValueError("rule='paper' takes no weights or min_tokens; the authors' code has none")
        if self.min_tokens and self.template == "absorb":
            raise ValueError(
                "min_tokens counts an instruction's own tokens; expected template='separate', not 'absorb'"
            )
        object.__setattr__(self, "strength", as_written(self.strength))
        if self.weights is not None:
            object.__setattr__(self, "weights", {name: as_written(x) for name, x in self.weights.items()})
        if self.rule == "paper":
            object.__setattr__(self, "template", "absorb")  # the authors' instructions own the whole row

    @classmethod
    def parse(cls, fair: "Fair | bool | float | str") -> "Fair":
        """A Fair from what ``fair=`` accepts: False, True, lambda in [0, 1], "paper", "floor", "floor=M", or a Fair.

        "floor=M" is ``Fair(strength=0, min_tokens=M)``; "floor" is "floor=4".
        """
        if isinstance(fair, Fair):
            return fair
        if fair is False or fair is True:
            return _FAIR if fair else _BIASED
        if isinstance(fair, (bool, int, float, np.floating)):
            return cls(strength=float(as_written(fair)))
        if isinstance(fair, str) and fair == "paper":
            return cls(rule="paper")
        if isinstance(fair, str) and (floor := re.fullmatch(r"floor(?:=([1-9]\d{0,8}))?", fair)):
            return cls(strength=0.0, min_tokens=int(floor[1] or FLOOR))
        raise ValueError(
            f"fair is {fair!r}; expected False, True, a number in [0, 1], 'paper', 'floor', 'floor=M' or a "
            "kvpitfalls.Fair"
        )

    def __hash__(self) -> int:
        weights = None if self.weights is None else frozenset(self.weights.items())
        return hash((self.strength, weights, self.min_tokens, self.template, self.rule))

    @property
    def is_biased(self) -> bool:
        """Whether no instruction is promised anything: the policy as published."""
        return self.strength == 0 and not self.min_tokens

    @property
    def label(self) -> bool | float | str:
        """How tables name it: False, True, lambda, "paper", "floor=M", or the repr of anything more special."""
        if self == Fair(rule="paper"):
            return "paper"
        if self == Fair(strength=self.strength):
            return bool(self.strength) if self.strength in (0.0, 1.0) else self.strength
        if self == Fair(strength=0.0, min_tokens=self.min_tokens):
            return f"floor={self.min_tokens}"
        return repr(self)


def fairness_name(label: bool | float | str) -> str:
    """How tables and figures call a ``Fair.label``: biased, fair, "fair 0.5", paper, floor=4."""
    if isinstance(label, str):
        return label
    return f"fair {label}" if label not in (0, 1) else "fair" if label else "biased"


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not is_real(value) or not low <= as_written(value) <= high:
        raise ValueError(f"{name} is {value!r}; expected a number from {low} to {high:g}")


AnyFair: TypeAlias = Fair | bool | float | str  # what is taken for one
_BIASED, _FAIR = Fair(strength=0.0), Fair()
FLOOR = 4  # tokens of every instruction under fair="floor", where no number is given
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
    plans : dict
        What was derived from this layout and is the same for every layer; filled as it is used.
    """

    n_token: int
    valid: Sequence[tuple[int, int]]
    spans: Sequence[Mapping[str, tuple[int, int]]]
    protected: Sequence[Sequence[int]]
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

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
    def valid_array(self) -> Int32 | None:
        """``valid`` as int32 (B, 2); None if all tokens are real."""
        return None if all(row == (0, self.n_token) for row in self.valid) else np.array(self.valid, np.int32)

    def plan(self, key: Hashable, fair: Fair, make: Callable[[], T]) -> T:
        """``make()``, or what it gave before for the same key and fairness."""
        full_key = (key, fair)
        if full_key not in self.plans:
            self.plans[full_key] = make()
        return cast(T, self.plans[full_key])

    def segments(self, fair: Fair) -> list[list[tuple[int, int]]]:
        """Per row, the segments that quotas are given for; one, the whole row, if there is no fairness."""
        return self.plan("segments", fair, lambda: self._segments(fair))

    def _segments(self, fair: Fair) -> list[list[tuple[int, int]]]:
        if fair.rule == "paper":
            for spans in self.spans:
                _check_paper(spans)
        if fair.is_biased:
            return [[row] for row in self.valid]
        return [
            [edges for _, edges in _cut(spans, *valid, fair.template)]
            for spans, valid in zip(self.spans, self.valid, strict=True)
        ]

    def names(self, fair: Fair) -> list[list[str | None]]:
        """Per row, the instruction that owns each segment; None for unmarked text."""
        return self.plan("names", fair, lambda: self._names(fair))

    def _names(self, fair: Fair) -> list[list[str | None]]:
        return [
            [name for name, _ in _cut(spans, *valid, fair.template)]
            for spans, valid in zip(self.spans, self.valid, strict=True)
        ]

    def weights(self, fair: Fair) -> list[list[float]]:
        """Per row, the weight of each segment; unmarked text weighs 1."""
        weights = fair.weights or {}
        for spans in self.spans:
            if unknown := sorted(set(weights) - set(spans)):
                raise ValueError(
                    f"weights name {unknown[0]!r}; expected names of the prompt's instructions: {', '.join(spans)}"
                )
        return [[1.0 if name is None else weights.get(name, 1.0) for name in row] for row in self.names(fair)]

    def floors(self, fair: Fair) -> list[list[int]]:
        """Per row, the tokens that each segment keeps at least: protected ones, and an instruction's ``min_tokens``."""
        return self.plan("floors", fair, lambda: self._floors(fair))

    def _floors(self, fair: Fair) -> list[list[int]]:
        if fair.is_biased:
            return [[len(of_row)] for of_row in self.protected]
        rows = []
        for segments, names, protected in zip(self.segments(fair), self.names(fair), self.protected, strict=True):
            inside = np.searchsorted(protected, [edges for edges in segments])
            least = [
                0 if name is None else min(fair.min_tokens, end - begin)
                for name, (begin, end) in zip(names, segments, strict=True)
            ]
            rows.append([max(n, int(after - before)) for n, (before, after) in zip(least, inside, strict=True)])
        return rows

    def check_room(self, fair: Fair, budgets: Sequence[int]) -> None:
        """Raise where a row's budget is smaller than what must be kept of it."""
        for b, (n_kept, floors) in enumerate(zip(budgets, self.floors(fair), strict=True)):
            if sum(floors) > n_kept:
                needed = f"min_tokens={fair.min_tokens} and protection need {sum(floors)}"
                needed = needed if fair.min_tokens else f"{sum(floors)} are protected"
                raise BudgetError(f"the budget of row {b} is {n_kept} tokens, but {needed}; expected at least that")

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
        key = ("mask", str(getattr(scores, "device", "cpu")))
        if key not in self.plans:
            self.plans[key] = None if self.mask is None else ops.beside(self.mask, scores)
        return cast("Array | None", self.plans[key])


@lru_cache(maxsize=64)
def _bare_layout(n_row: int, n_token: int) -> Layout:
    if n_row < 1 or n_token < 1:
        raise ValueError(f"keys hold {n_row} rows of {n_token} tokens; expected at least one of each")
    return Layout(n_token, [(0, n_token)] * n_row, [{}] * n_row, [[]] * n_row)


def _ranges(valid: Table) -> list[tuple[int, int]]:
    """Rows (begin, end) of whole numbers."""
    given: Any = valid
    rows = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise TypeError(f"valid is {valid!r}; expected a row (begin, end) for each row of keys")
    out = []
    for row in rows:
        pair = tuple(row) if isinstance(row, Iterable) and not isinstance(row, (str, bytes)) else (row,)
        if len(pair) != 2 or not all(map(is_whole, pair)):
            raise TypeError(f"valid holds {row!r}; expected (begin, end), whole numbers")
        out.append((int(pair[0]), int(pair[1])))
    return out


def _is_mask(protect: object) -> TypeGuard[Array]:
    return "bool" in str(getattr(protect, "dtype", ""))


def _per_row(spans: Spans | None, n_row: int) -> list[Any]:
    if spans is None or isinstance(spans, Mapping):
        return [spans] * n_row
    if isinstance(spans, (str, bytes)) or not isinstance(spans, Iterable):
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
    out = dict(sorted(((name, _edges(name, span)) for name, span in items), key=lambda item: item[1]))
    last_name, last_end = None, low
    for name, (begin, end) in out.items():
        if not low <= begin <= end <= high:
            raise ValueError(f"span {name!r} is [{begin}, {end}); expected a range inside [{low}, {high})")
        if begin < last_end:
            raise ValueError(f"span {name!r} starts at {begin}, inside span {last_name!r}, which ends at {last_end}")
        last_name, last_end = name, end
    return out


def _edges(name: str, span: Edges) -> tuple[int, int]:
    pair = (span.start, span.end) if isinstance(span, HasEdges) else span
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_whole, pair)):  # a range of two is none
        return int(pair[0]), int(pair[1])
    raise ValueError(f"span {name!r} is {span!r}; expected (start, end) in tokens")


def _cut(
    spans: Mapping[str, tuple[int, int]], low: int, high: int, template: str
) -> list[tuple[str | None, tuple[int, int]]]:
    """The row [low, high) cut into (name, segment); the name of unmarked text is None."""
    if not spans:
        raise ValueError("fair eviction needs the instructions' places; expected spans, or a Prompt with instructions")
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


def read_once(given: Any) -> Any:
    """What an iterator gives, as a list, since whoever asks it again gets nothing; anything else as it is."""
    return list(given) if isinstance(given, Iterator) else given


def listed(protect: Protect | None) -> list[Any]:
    """The items of what ``protect`` accepts."""
    if protect is None:
        return []
    return [protect] if isinstance(protect, str) or not isinstance(protect, Iterable) else list(protect)


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
        mask = np.asarray(protect)
        return [int(t) for t in np.flatnonzero(mask if mask.ndim == 1 else mask[b]) if low <= t < high]
    positions: set[int] = set()
    for item in listed(protect):
        if isinstance(item, str):
            if item in spans:
                positions.update(range(*spans[item]))
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
