"""The control: tokens drawn at random."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..eviction.arrays import Array
from .base import Inputs, Policy


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
        like = inputs.score("position", n_sink=0)
        scores = np.zeros(tuple(like.shape), np.float32)
        for row, (begin, end) in enumerate(inputs.valid):
            first = inputs.keys[row, :, begin]
            first = first if isinstance(first, np.ndarray) else first.float().cpu().numpy()
            for head, salt in enumerate(
                np.rint(4 * first).astype(np.int64) % 2**32
            ):  # coarse: low bits may depend on the batch
                drawn = np.random.default_rng([self.seed, head, end - begin, *salt.tolist()])
                scores[row, head, begin:end] = drawn.random(end - begin)
        return scores if isinstance(like, np.ndarray) else like.new_tensor(scores)
