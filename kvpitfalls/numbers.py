"""Numbers that callers give, looked at in one way everywhere. True and False are none."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np

MOST, _LARGEST = 2**63 - 1, sys.float_info.max


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a number, Python's or NumPy's; it may be infinite or NaN, but no whole number beyond all floats."""
    if isinstance(value, (float, np.floating)):
        return True
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) <= _LARGEST


def is_listed(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether it has items: no text is taken for its letters, and an array of no dimensions, which says that it has
    some, is one number."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) != 0


def as_written(number: float) -> float:
    """A number of Python's that is written in decimal as this one is: NumPy's 32-bit 0.1 is 0.1."""
    return number if type(number) in (int, float) else float(str(number))


def as_meant(number: float) -> float:
    """:func:`as_written`; of a share that a sum missed by roundings, the decimal: of 1 - 0.7 and of NumPy's ranges 0.3,
    where they have 0.30000000000000004. Sums with 1 miss by its roundings, however small what is left."""
    written = as_written(number)
    decimal = round(written, 12)
    return decimal if 0 < decimal < 1 and abs(decimal - written) <= 2 * math.ulp(1.0) else written


def check_real(named: Mapping[str, object]) -> None:
    """Raise TypeError unless all of them are numbers."""
    for name, value in named.items():
        if not is_real(value):
            raise TypeError(f"{name} is {value!r}; expected a number")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError unless it is a whole number of Python's, at least ``least``: settings are hashed, printed and
    written to files."""
    if not is_whole(value) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}{beyond(value)}")


def beyond(value: object) -> str:
    """For a sentence's end, where a whole number is refused for its size."""
    return f" and at most {MOST}" if isinstance(value, int) and value > MOST else ""
