"""K-norm."""

from dataclasses import dataclass

from .base import Call, Inputs, Policy


@dataclass(frozen=True)
class KNorm(Policy):
    """Keep the keys of smallest norm.

    score = -||key||_2, after rotary embedding (which keeps norms). Needs no attention, and looks at no position.
    Fair: the same scores, and the quotas: a key's length depends on no other key.

    References
    ----------
    "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.KNorm(), keys, budget=4).positions[0].tolist()
    [[0, 4, 5, 8], [1, 3, 7, 9]]
    """

    name = "knorm"

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        return inputs.call("norm")
