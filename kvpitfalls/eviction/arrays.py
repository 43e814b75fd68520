"""What an array is here: NumPy's or torch's, with one of the two all through a call."""

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
