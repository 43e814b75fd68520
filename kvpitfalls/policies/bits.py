"""Whole numbers without a visible order, the same on every device."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STEP = 0x1E3779B97F4A7C15  # odd, and of no pattern


def mixed(x: "torch.Tensor") -> "torch.Tensor":
    """Of each of the numbers int64 another, all of whose bits depend on all of its own; modulo 2^64, as tensors count.

    The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))
