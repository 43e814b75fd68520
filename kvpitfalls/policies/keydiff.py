"""KeyDiff."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..eviction.arrays import Array
from .base import Inputs, Policy

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
        import torch

        keys = torch.as_tensor(inputs.keys).detach()
        scores = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        for row, segments in enumerate(inputs.segments):
            for begin, end in (segment for segment in segments if segment[1] - segment[0] > 2):
                units = _units(keys[row, :, begin:end].float())
                scores[row, :, begin:end] = -(
                    units * _units(units.mean(1, keepdim=True, dtype=torch.float64).float())
                ).sum(-1)
        return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores


def _units(vectors: "torch.Tensor") -> "torch.Tensor":
    """Vectors (..., D) of length 1, whatever their length was: float32's largest and smallest included; those of length
    0 stay."""
    scaled = vectors / vectors.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    units: torch.Tensor = scaled / scaled.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    return units
