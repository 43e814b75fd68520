"""R-KV."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..eviction.arrays import Array, as_torch
from ..numbers import is_real
from .base import Inputs
from .snapkv import SnapKV

if TYPE_CHECKING:
    import torch

_TILE = 1 << 22  # similarities that are held at a time, but of no fewer than 32 keys of a head with all others
_UNIT = 2.0**40  # what is added up is rounded to whole numbers of these, whose sum is the same in any order


@dataclass(frozen=True)
class RKV(SnapKV):
    """Keep what the last ``window_size`` tokens attend to and later keys do not repeat; the window itself comes first.

    score[k] = ``mix_lambda`` * importance[k] - (1 - ``mix_lambda``) * redundancy[k]. Importance: softmax over the keys
    before the window of the largest logit in the key head's group, mean over the window's queries, then the largest
    among ``kernel_size`` neighbours. Redundancy: softmax over all keys k of the mean over keys i of cos(i, k), where
    each i has two that count as 0: that with itself, and that with the last key k for which it is above ``threshold``,
    if there is one. So of keys that repeat each other the last is spared.

    Fair: the window is shared out as SnapKV's is, and each segment's keys are compared with each other only.

    Defined for budgets of more than ``window_size`` tokens. While a budget is held, keys that are left are compared
    anew each step, which takes as many products as their number squared; the authors do so every 128 tokens.

    Parameters
    ----------
    window_size : int
        See :class:`SnapKV`.
    kernel_size : int
        Odd.
    mix_lambda : float
        In [0, 1]: 1 is importance alone. The authors use 0.07 to 0.1.
    threshold : float
        In [-1, 1].

    Notes
    -----
    The authors' code takes, for a key that none is like, the first key for the last that is like it; here there is
    none.

    References
    ----------
    "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", arXiv 2505.24133.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.RKV(window_size=2), keys, keys, budget=4).positions[0].tolist()
    [[3, 6, 8, 9], [0, 1, 8, 9]]
    """

    window_size: int = 8
    kernel_size: int = 7
    mix_lambda: float = 0.07
    threshold: float = 0.5
    name = "rkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, least in (("mix_lambda", self.mix_lambda, 0), ("threshold", self.threshold, -1)):
            if not is_real(value) or not least <= value <= 1:
                raise ValueError(f"{field} is {value!r}; expected a number in [{least}, 1]")

    def always(self, n_token: int) -> int:
        """The window."""
        return self.window_size

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        import torch

        keys = as_torch(inputs.keys).detach()
        scores = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        for row, (begin, cut, end), queries in self.windows(inputs):
            scores[row, :, cut:end] = (
                torch.arange(1, end - cut + 1, dtype=torch.float32, device=keys.device) / (end - cut) + 1
            )
            if cut > begin:
                important = self._importance(inputs, keys[row, :, begin:cut], queries)
                redundant = _redundancy(keys[row, :, begin:end].float(), self.threshold)[:, : cut - begin]
                scores[row, :, begin:cut] = self.mix_lambda * important - (1 - self.mix_lambda) * redundant
        return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores

    def _importance(self, inputs: Inputs, keys: "torch.Tensor", queries: "torch.Tensor") -> "torch.Tensor":
        """Of keys (H, n, D) for a window's queries (H*G, W, D): (H, n)."""
        import torch

        grouped = queries.float().unflatten(0, (len(keys), -1))
        logits = (grouped @ keys.float().mT[:, None] * inputs.scaling).amax(1)
        if inputs.softcap:
            logits = inputs.softcap * (logits / inputs.softcap).tanh()
        if inputs.sinks is not None:
            sinks = inputs.sinks.float().reshape(len(keys), -1).amax(1)[:, None, None]
            logits = torch.cat([logits, sinks.expand(*logits.shape[:2], 1)], -1)
        shares = logits.softmax(-1)[..., : keys.shape[1]].mean(1)
        reach = min(self.kernel_size // 2, keys.shape[1] - 1)  # torch looks at every neighbour, be there one or not
        return torch.nn.functional.max_pool1d(shares, 2 * reach + 1, stride=1, padding=reach)


def _redundancy(keys: "torch.Tensor", threshold: float) -> "torch.Tensor":
    """Of keys (H, n, D), (H, n): how much like all others each is."""
    import torch

    units = torch.nn.functional.normalize(keys, dim=-1)
    n_head, n_key, _ = units.shape
    places = torch.arange(n_key, dtype=torch.int32, device=keys.device)
    spared, step = torch.zeros(n_head, n_key, dtype=torch.int64, device=keys.device), max(32, _TILE // (n_head * n_key))
    for begin in range(0, n_key, step):
        likeness = units[:, begin : begin + step] @ units.mT
        likeness.diagonal(begin, 1, 2).fill_(-2)  # to itself: below any threshold
        last = torch.where(likeness > threshold, places, -1).amax(-1).long()
        most = likeness.gather(2, last.clamp(min=0)[..., None])[..., 0].masked_fill(last < 0, 0)
        spared.scatter_add_(1, last.clamp(min=0), (most.double() * _UNIT).round().long())
    total = (units * units.sum(1, keepdim=True)).sum(-1) - (units * units).sum(-1)
    return ((total - spared.float() / _UNIT) / n_key).softmax(-1)
