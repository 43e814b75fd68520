"""DefensiveKV."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..eviction.arrays import Array, as_torch
from ..numbers import is_real
from .adakv import AdaKV
from .base import Inputs

if TYPE_CHECKING:
    import torch

_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class DefensiveKV(AdaKV):
    """Keep what any single token of the window attends to, however little the others do; the window itself comes first.

    worst[k] = the largest over the key head's query heads and the window's queries of pool(A)[k], where pool is a mean
    over neighbours and each query's pooled attention is scaled to its sum before; but no less than the head's mean of
    it. score[k] = worst[k] * factor[k], after a first stage: of each head the best tokens by mean attention come
    before, as few as with the window have ``first_stage`` of it, the best first. factor[k] = mean over the group of the
    1-norm of what the layer makes of value[k] (``factor="norm"``), or that by its sum over the layer's key heads
    ("share", as the authors' code has it), or 1 (None). Heads share a layer's budget as for :class:`AdaKV`.

    Fair: the window is shared out as SnapKV's is, each part judges its own segment only, and the quotas are those of
    :class:`AdaKV`, since a worst case over the queries of another instruction is none of this one's.

    Parameters
    ----------
    window_size, kernel_size : int
        See :class:`SnapKV`.
    alpha : float
        See :class:`AdaKV`.
    first_stage : float
        In [0, 1]; 0 is no first stage.
    factor : {"share", "norm"} or None
        "norm" is CriticalKV's.

    Notes
    -----
    Defined for budgets of more than ``window_size`` tokens, layers of two key heads or more, and models whose attention
    ends in an output projection. Differs from the authors' code in the first stage: there the window's part of
    attention is summed over keys before the window, and the token that reaches ``first_stage`` is left out.

    References
    ----------
    "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv 2510.13334; "Identify Critical KV Cache in LLM
    Inference from an Output Perturbation Perspective", arXiv 2502.03805.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> rng = np.random.default_rng(0)
    >>> keys, output = (rng.standard_normal(shape, dtype=np.float32) for shape in ((1, 2, 20, 8), (2, 8, 16)))
    >>> policy = kvp.DefensiveKV(window_size=2)
    >>> kept = kvp.keep(policy, keys, keys, values=keys, output=output, budget=6)
    >>> kept.positions[0, 0].tolist()
    [6, 12, 16, 17, 18, 19]
    """

    window_size: int = 32
    first_stage: float = 0.9
    factor: str | None = "share"
    name = "defensivekv"
    aliases = ("defensive",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_real(self.first_stage) or not 0 <= self.first_stage <= 1:
            raise ValueError(f"first_stage is {self.first_stage!r}; expected a number in [0, 1]")
        if self.factor not in ("share", "norm", None):
            raise ValueError(f"factor is {self.factor!r}; expected 'share', 'norm' or None")

    @property
    def needs_values(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether there is a factor."""
        return self.factor is not None

    @property
    def needs_output(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether there is a factor."""
        return self.factor is not None

    def always(self, n_token: int) -> int:
        """The window."""
        return self.window_size

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        import torch

        keys = as_torch(inputs.keys).detach()
        scores, factors = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device), self._factors(inputs)
        for row, (begin, cut, end), queries in self.windows(inputs):
            scores[row, :, cut:end] = 2 + torch.arange(1, end - cut + 1, dtype=torch.float32, device=keys.device) / (
                end - cut
            )
            if cut == begin:
                continue
            start = inputs.valid[row][0]
            heads = range(keys.shape[1])
            of_heads = [
                self._judged(inputs, keys[row, head, start:end], queries, head, begin - start, cut - start)
                for head in heads
            ]
            worst, mean = (torch.stack(part) for part in zip(*of_heads, strict=True))
            second = worst.clamp(min=worst.mean(-1, keepdim=True))
            second = second if factors is None else second * factors[row, :, begin:cut]
            second = second / second.max().clamp(min=_SMALLEST)  # below all of the first stage
            best = mean.sort(dim=-1, descending=True, stable=True)
            before = 1 - mean.sum(-1, keepdim=True) + best.values.cumsum(-1) - best.values
            is_first = torch.zeros_like(mean, dtype=torch.bool).scatter_(1, best.indices, before < self.first_stage)
            scores[row, :, begin:cut] = torch.where(is_first, 1 + mean, second)
        return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores

    def _judged(
        self, inputs: Inputs, keys: "torch.Tensor", queries: "torch.Tensor", head: int, begin: int, cut: int
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Of the keys [begin, cut) of all that this head's window sees (n, D): the largest attention, and the mean."""
        import torch

        n_group = len(queries) // inputs.keys.shape[1]
        group = slice(head * n_group, (head + 1) * n_group)
        logits = queries[group].float() @ keys.float().T * inputs.scaling
        if inputs.softcap:
            logits = inputs.softcap * (logits / inputs.softcap).tanh()
        later = torch.ones(logits.shape[1:], dtype=torch.bool, device=keys.device).triu(
            keys.shape[0] - queries.shape[1] + 1
        )
        logits = logits.masked_fill(later, -torch.inf)
        if inputs.sinks is not None:
            logits = torch.cat([logits, inputs.sinks[group].float()[:, None, None].expand(-1, logits.shape[1], 1)], -1)
        seen = logits.softmax(-1)[..., begin:cut]
        pooled = torch.nn.functional.avg_pool1d(seen, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        pooled = pooled * (seen.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=_SMALLEST))
        return pooled.amax((0, 1)), seen.mean((0, 1))

    def _factors(self, inputs: Inputs) -> "torch.Tensor | None":
        """Of each value (B, H, T); None if there is no factor."""
        import torch

        if self.factor is None:
            return None
        values, output = (as_torch(x).detach().float() for x in (inputs.values, inputs.output))
        n_group = len(output) // values.shape[1]
        norms = torch.zeros(values.shape[:3], dtype=torch.float32, device=values.device)
        for row in range(len(values)):
            for head, projection in enumerate(output):
                norms[row, head // n_group] += (values[row, head // n_group] @ projection).abs().sum(-1) / n_group
        return norms if self.factor == "norm" else norms / norms.sum(1, keepdim=True).clamp(min=_SMALLEST)
