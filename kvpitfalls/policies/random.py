"""The control: tokens drawn at random."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..eviction.arrays import Array
from .base import Inputs, Policy
from .bits import STEP, mixed
from .ranges import by_range

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Random(Policy):
    """Keep tokens that are drawn at random, by layer and head.

    What a policy keeps of an instruction means something if it differs from this at the same memory. Its draw is that
    of a row's length, of the seed, and of the key of the row's first token, which no two heads of a model have in
    common: so batches change nothing. A control, so it is not among :func:`kvpitfalls.policies.policy_names`.

    Attributes
    ----------
    seed : int

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(Random(), keys, budget=4).positions.shape
    (1, 2, 4)
    """

    seed: int = 0

    name = "random"
    listed: ClassVar[bool] = False

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        return by_range(inputs, [[row] for row in inputs.valid], self._draw)

    def _draw(self, keys: "torch.Tensor") -> "torch.Tensor":
        """A row's scores (H, n): of each head's first key coarsely, since low bits may depend on the batch."""
        import torch

        of_heads, of_tokens, of_dims = (torch.arange(n, device=keys.device) for n in keys.shape)
        salts = (4 * keys[:, 0].float()).nan_to_num().clamp(-(2.0**30), 2.0**30).round().long()
        salts = mixed(salts + of_dims * STEP).sum(-1)
        of_head = mixed(mixed(salts + of_heads) + (self.seed + STEP * keys.shape[1]) % 2**62)
        return (mixed(of_head[:, None] + of_tokens * STEP) & 0xFFFFFF).float() * 2.0**-24
