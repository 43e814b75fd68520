"""What an array is here: NumPy's or torch's, with one of the two all through a call."""

from collections.abc import Hashable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # at run time torch is imported by whoever has tensors
    import torch

Array: TypeAlias = Union[npt.NDArray[Any], "torch.Tensor"]

#: The library of a call's first array, in which its results are.
A = TypeVar("A", bound=Array)

#: A small table of numbers, which is read on the host.
Table: TypeAlias = Union[npt.ArrayLike, "torch.Tensor"]

Int32: TypeAlias = npt.NDArray[np.int32]

_TYPES = ("float32", "float16", "bfloat16")


@lru_cache(maxsize=64)
def _dtype_name(dtype: Hashable) -> str:
    """NumPy's or torch's; asked for three times a layer, and a name takes as long as all else that is asked."""
    return str(getattr(dtype, "name", str(dtype).removeprefix("torch.")))


def check_types(**arrays: Array | None) -> None:
    """Raise, by name, for a type that no scorer takes: torch would score any, rounded or not."""
    for name, x in arrays.items():
        if x is None or not hasattr(x, "dtype"):
            continue  # the core refuses the latter
        if (dtype := _dtype_name(x.dtype)) not in _TYPES:
            raise TypeError(f"{name} has dtype {dtype}; expected float32, float16 or bfloat16")


def are_nan(x: Array) -> Any:
    """Bool, of the shape and in the library of x."""
    return x != x


def are_finite(x: Array) -> Any:
    """Bool, of the shape and in the library of x."""
    size: Any = abs(x)
    return size < np.inf


def as_torch(x: Any) -> "torch.Tensor":
    """A tensor as it is; anything else as one on the CPU, whatever ``torch.set_default_device`` says."""
    import torch

    return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, device="cpu")
