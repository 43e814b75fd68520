"""Ada-KV."""

from dataclasses import dataclass

from ..eviction.allocation import Ada
from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Keep SnapKV's best tokens of all heads of a layer together, but of each head at least a part.

    Scores are SnapKV's. Of K tokens a head, each keeps its best ``max(1, floor(alpha K))``, and the layer the best of
    the rest, whichever head they are of; of equal scores the lower head's. Heads then hold different numbers of tokens,
    in as many slots as the largest needs.

    Fair: SnapKV's scores, and quotas that a layer's heads share: of each instruction a layer keeps its share, and each
    head at least that part of it.

    Parameters
    ----------
    window_size, kernel_size : int
        See :class:`SnapKV`.
    alpha : float
        In [0, 1]: 0 puts no floor under a head, 1 is SnapKV. The authors use 0.2.

    Notes
    -----
    Defined for layers of two key heads or more. ``allocation="ada"`` does the same to any other policy's scores; where
    these are comparable between heads is for its user to say.

    References
    ----------
    "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv 2407.11550.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 20, 8), dtype=np.float32)
    >>> kvp.keep(kvp.AdaKV(window_size=2), keys, keys, budget=6).counts.tolist()
    [[4, 8]]
    """

    alpha: float = 0.2
    name = "adakv"
    aliases = ("ada",)
    holds = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.allocation  # noqa: B018 - an alpha that it refuses

    @property
    def allocation(self) -> Ada:  # type: ignore[override] # read only, as whoever asks takes it
        """See the class."""
        return Ada(self.alpha)
