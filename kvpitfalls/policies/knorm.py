"""K-norm."""

from dataclasses import dataclass

from .base import Policy


@dataclass(frozen=True)
class KNorm(Policy):
    """Keep the keys of smallest norm.

    score = -||key||_2, after rotary embedding (which keeps norms). Needs no attention, and looks at no position.

    References
    ----------
    "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
    """

    name = "knorm"

    def score(self, inputs):
        """See the class."""
        return inputs.score("norm")
