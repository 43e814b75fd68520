"""What a policy of somebody else's is handed, and what it gives back, looked at; ours are tested instead."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..eviction.arrays import Array, are_finite, are_nan

if TYPE_CHECKING:  # which imports this module
    from .base import Inputs

T = TypeVar("T")
_ARRAYS = ("keys", "queries", "values", "lse", "output", "sinks")
_AGAIN = ("queries", "keys", "values", "before")


def asked(name: str, method: Callable[["Inputs"], T], inputs: "Inputs") -> T:
    """What a method of policy ``name`` gives, where it writes to nothing that it was handed: that is the cache's own,
    the model's or the caller's. Torch counts writes, and of NumPy's arrays it gets views that are read only."""
    lent = _lent(inputs)
    before = {part: x._version for part, x in _counted(lent)}
    given = method(lent)
    if written := [f"inputs.{part}" for part, x in _counted(lent) if x._version != before.get(part, x._version)]:
        raise ValueError(
            f"policy {name!r} wrote to {' or '.join(written)} of layer {inputs.layer}, which it is only lent; expected "
            "operations that make tensors of their own (keys.float() makes none of float32), or keys.clone() first"
        )
    return given


def _lent(inputs: "Inputs") -> "Inputs":
    """The same, with lists of its own, and arrays that are read only, or copies where nobody counts writes."""
    arrays = {part: _read_only(getattr(inputs, part)) for part in _ARRAYS}
    again = inputs.again
    if again is not None:
        again = again._replace(**{part: _read_only(getattr(again, part)) for part in _AGAIN})
    rows = {part: [list(row) for row in getattr(inputs, part)] for part in ("segments", "spans")}
    return type(inputs).of(inputs, **arrays, **rows, valid=list(inputs.valid), again=again)


def _read_only(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        x = x.view()
        x.flags.writeable = False
    elif x is not None and x.is_inference():
        x = x.clone()
    return x


def _counted(inputs: "Inputs") -> Iterator[tuple[str, Any]]:
    """The tensors of which torch counts how often they were written to."""
    parts = {part: getattr(inputs, part) for part in _ARRAYS}
    if inputs.again is not None:
        parts |= {f"again.{part}": getattr(inputs.again, part) for part in _AGAIN}
    for part, x in parts.items():
        if x is not None and not isinstance(x, np.ndarray) and not x.is_inference():
            yield part, x


def check_fields(policy: Any) -> None:
    """Raise if a child gives a field of its parent another value in a way that dataclasses do not read."""
    said = vars(type(policy))
    for field in fields(policy) if is_dataclass(policy) else ():
        default = said.get(field.name, field.default)
        if default is not field.default and not isinstance(default, MemberDescriptorType):  # a slot
            kind = getattr(field.type, "__name__", field.type)
            raise TypeError(
                f"policy {type(policy).__name__} says {field.name} = {default!r}, which would not be read; expected "
                f"@dataclass(frozen=True) above it, and {field.name}: {kind} = {default!r}"
            )


def check_scores(name: str, scores: Any, keys: Array) -> None:
    """Raise unless these are scores of such keys."""
    if not hasattr(scores, "dtype") or isinstance(scores, np.ndarray) != isinstance(keys, np.ndarray):
        raise ValueError(
            f"policy {name!r} returned scores as a {type(scores).__name__}; expected a {type(keys).__name__}, "
            "which its keys are"
        )
    if scores.shape != keys.shape[:3] or "float32" not in str(scores.dtype):
        raise ValueError(
            f"policy {name!r} returned scores of shape {tuple(scores.shape)} and dtype {scores.dtype}; "
            f"expected float32 {tuple(keys.shape[:3])}"
        )


def check_place(name: str, scores: Any, keys: Any) -> None:
    """Raise unless scores are where the keys are, and as dense as these."""
    if not isinstance(keys, np.ndarray) and (scores.device, scores.layout) != (keys.device, keys.layout):
        raise ValueError(
            f"policy {name!r} returned scores on {scores.device} ({scores.layout}); expected them on {keys.device} "
            f"({keys.layout}), as its keys are"
        )


def check_numbers(name: str, inputs: "Inputs", scores: Array) -> None:
    """Raise if tokens that are judged have NaN, and all that was given are numbers; padding may have any score.

    NaN is kept last, so that of a row of nothing else the first tokens would be kept without a word. To look for it
    waits for a GPU.
    """
    if not are_nan(scores).any():
        return
    given = [x for x in (inputs.keys, inputs.queries, inputs.values) if x is not None]
    judged = [scores[b, :, begin:end] for b, row in enumerate(inputs.segments) for begin, end in row]
    n_nan, n_score = sum(int(are_nan(x).sum()) for x in judged), sum(math.prod(x.shape) for x in judged)
    if n_nan and all(are_finite(x).all() for x in given):
        raise ValueError(
            f"policy {name!r} returned NaN for {n_nan} of {n_score} scores of layer {inputs.layer}, and was "
            "given numbers; expected numbers, such as -inf for tokens that are to be kept last"
        )
