"""For policies that judge one range of tokens after another."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..eviction.arrays import Array

if TYPE_CHECKING:
    import torch

    from .base import Inputs


def by_range(
    inputs: "Inputs",
    ranges: Sequence[Sequence[tuple[int, int]]],
    judge: "Callable[[torch.Tensor], torch.Tensor]",
) -> Array:
    """Scores float32 (B, H, T), in the array library of ``inputs.keys``.

    Parameters
    ----------
    inputs : Inputs
    ranges : list of list of (int, int)
        Per batch row, where the tokens are that are judged together; all others score 0.
    judge : callable
        Called with a range's keys (H, n, D), as a tensor; what it returns is (H, n), or a number for all.
    """
    import torch

    keys = torch.as_tensor(inputs.keys).detach()
    scores = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    for row, of_row in enumerate(ranges):
        for begin, end in of_row:
            scores[row, :, begin:end] = judge(keys[row, :, begin:end])
    return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores
