"""KeyDiff."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..eviction.arrays import Array
from .base import Inputs, Policy
from .ranges import by_range

if TYPE_CHECKING:
    import torch

_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keep the keys that are least like the mean of all.

    score[k] = -cos(key[k], mean over the row of key / ||key||), after rotary embedding; needs no attention and looks at
    no position. Fair: each segment's keys are compared with the mean of their own segment, which is the row's where
    there is one segment. A key of length zero has no direction: it scores 0 and takes no part in the mean. Two keys are
    equally like their mean: the first is kept first.

    The paper evicts block by block while it reads the prompt; here the whole prompt is judged once, as in kvpress.

    References
    ----------
    "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", arXiv 2504.15364.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.KeyDiff(), keys, budget=4).positions[0].tolist()
    [[1, 3, 6, 8], [0, 1, 3, 4]]
    """

    name = "keydiff"

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        return by_range(inputs, inputs.segments, _unlike_their_mean)


def _unlike_their_mean(keys: "torch.Tensor") -> "torch.Tensor":
    """Of keys (H, n, D), (H, n)."""
    import torch

    units = _units(keys.float())
    mean = _units(units.mean(1, keepdim=True, dtype=torch.float64).float())
    return -(units * mean).sum(-1) if keys.shape[1] > 2 else units.new_zeros(())


def _units(vectors: "torch.Tensor") -> "torch.Tensor":
    """Vectors (..., D) of length 1, whatever their length was: float32's largest and smallest included; those of length
    0 stay."""
    scaled = vectors / vectors.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    units: torch.Tensor = scaled / scaled.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    return units
