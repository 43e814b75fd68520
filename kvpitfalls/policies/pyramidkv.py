"""PyramidKV."""

from dataclasses import dataclass
from typing import ClassVar

from ..eviction.allocation import Pyramid
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep what SnapKV keeps, more of it in lower layers and less in higher ones.

    Scores are SnapKV's. The budget falls evenly from layer to layer, from ``2 K - K / beta`` to ``K / beta`` of a mean
    of K tokens, or, where the first would leave less than a window, from all but a window to what then is left.

    Fair: SnapKV's scores, and in each layer quotas of that layer's budget; so all instructions lose more in higher
    layers, and any two of them equally much.

    Parameters
    ----------
    window_size, kernel_size : int
        See :class:`SnapKV`.
    beta : float
        At least 1, which gives every layer the same; the higher, the steeper. The authors use 20, for prompts of
        thousands of tokens.

    Notes
    -----
    Defined for models of two layers or more, and budgets that leave a window out and give the last layer at least a
    window: at ``beta=20`` that takes ``20 * window_size`` tokens to keep, or a ratio of about a half and less.
    Elsewhere it is refused; kvpress's press then keeps what SnapKV would. That press rounds each layer by itself, so
    its layers together may keep a few tokens more or less than the budget.

    References
    ----------
    "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 20, 8), dtype=np.float32)
    >>> policy = kvp.PyramidKV(window_size=2, beta=4)
    >>> [kvp.keep(policy, keys, keys, budget=10, layer=i, n_layer=3).counts.tolist() for i in range(3)]
    [[[17, 17]], [[10, 10]], [[3, 3]]]
    """

    beta: float = 20
    name = "pyramidkv"
    aliases = ("pyramid",)
    holds = False
    in_chunks: ClassVar[bool] = True  # the shares of its layers are known before the first chunk

    def __post_init__(self) -> None:
        super().__post_init__()
        self.allocation  # noqa: B018 - a beta that it refuses

    @property
    def allocation(self) -> Pyramid:  # type: ignore[override] # read only, as whoever asks takes it
        """See the class."""
        return Pyramid(self.beta, self.window_size)

    def check(self, n_token: int, n_kept: int) -> None:
        """See the class."""
        self.allocation.layers(n_token, n_kept, 2)
