"""The control: tokens drawn at random."""

from dataclasses import dataclass
from typing import ClassVar

from ..numbers import is_whole
from .base import Call, Inputs, Policy


@dataclass(frozen=True)
class Random(Policy):
    """Keep tokens that are drawn at random, by layer and head.

    What a policy keeps of an instruction means something if it differs from this at the same memory. Its draw is that
    of a row's length, of the seed, and of the keys of eight of the row's tokens, the last among them, which no two
    heads of a model have in common, nor two prompts: so batches change nothing, and prompts are drawn for one by one,
    as an interval over them takes for granted. A control, so it is not among :func:`kvpitfalls.policies.policy_names`.

    Attributes
    ----------
    seed : int
        Its lowest 62 bits count.

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

    def __post_init__(self) -> None:
        if not is_whole(self.seed):
            raise ValueError(f"seed is {self.seed!r}; expected a whole number")

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        high, low = divmod(int(self.seed) % 2**62, 2**32)
        return inputs.call("random", seed=low, seed_high=high)
