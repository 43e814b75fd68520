"""Expected Attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedModelError
from ..eviction.arrays import Array
from ..numbers import check_whole, is_real
from .base import Inputs, Policy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Keep what queries to come are expected to attend to; the first ``n_sink`` tokens are kept first.

    Queries before rotary embedding are taken for normal, with the mean m and the covariance C of the prompt's own but
    its first ``n_sink``. With R, the mean rotation of the ``n_future_positions`` positions after the prompt, a the
    scaling of logits, and every key but the first ``n_sink``: logit[h, k] = a k.Rm + a^2/2 k.RCR'k, and score[k] =
    (mean over the key head's query heads h of softmax(logit[h])[k] + ``epsilon``) * ||value[k]||.

    Fair: the same forecast of queries, since those that will come are no instruction's, but a softmax over each
    segment's own keys, or ``epsilon`` would weigh more the more the keys of another instruction attract.

    Defined for prompts and budgets of more than ``n_sink`` tokens, and models whose layers turn queries by a rotary
    embedding that can be read and undone, without a cap on logits. Not defined while a budget is held: it reads the
    queries of the whole prompt.

    Parameters
    ----------
    n_future_positions : int
    n_sink : int
        Tokens that attract attention wherever they say nothing, and whose queries are unlike others.
    use_covariance, use_vnorm : bool
        False leaves out the second term, or the length of values with ``epsilon``.
    epsilon : float
        At least 0. The paper's is 0.02, kvpress's press has 0 by default.

    References
    ----------
    "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv
    2510.00636.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> policy = kvp.ExpectedAttention(n_sink=1)
    >>> kvp.keep(policy, keys, keys, values=keys, rotary=kvp.Rotary(), budget=4).positions[0].tolist()
    [[0, 6, 7, 9], [0, 2, 6, 8]]
    """

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.02
    name = "expected_attention"
    needs_queries = True
    needs_values = True
    needs_rotary = True
    holds = False

    def __post_init__(self) -> None:
        for field, value, least in (("n_future_positions", self.n_future_positions, 1), ("n_sink", self.n_sink, 0)):
            check_whole(field, value, least)
        for field, value in (("use_covariance", self.use_covariance), ("use_vnorm", self.use_vnorm)):
            if not isinstance(value, bool):
                raise ValueError(f"{field} is {value!r}; expected True or False")
        if not is_real(self.epsilon) or not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon is {self.epsilon!r}; expected a number, at least 0")

    def check(self, n_token: int, n_kept: int) -> None:
        """See the class."""
        if n_kept <= self.n_sink:
            raise ValueError(
                f"policy {self!r} was given {n_token} tokens, of which {n_kept} are kept; expected a budget of "
                f"more than its {self.n_sink} sinks, or a smaller n_sink"
            )

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        import torch

        keys, queries, values = (torch.as_tensor(x).detach() for x in (inputs.keys, inputs.queries, inputs.values))
        if queries.shape[2] != keys.shape[2]:
            raise ValueError(
                f"queries has {queries.shape[2]} tokens; policy {self.name!r} expects all {keys.shape[2]} of the prompt"
            )
        if inputs.softcap:
            raise UnsupportedModelError(
                f"softcap is {inputs.softcap}; policy {self.name!r} is not defined for capped logits, expected none"
            )
        scores, n_group = (
            torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device),
            queries.shape[1] // keys.shape[1],
        )
        positions = inputs.rotary.positions(inputs.valid, keys.shape[2]).to(keys.device)
        for row, (begin, end) in enumerate(inputs.valid):
            first = min(begin + self.n_sink, end - 1)
            ahead = positions[row, end - 1] + torch.arange(1, 1 + self.n_future_positions, device=keys.device)
            turn, cuts = inputs.rotary.mean(ahead, keys), [max(stop, first) - first for _, stop in inputs.segments[row]]
            undone = partial(inputs.rotary.undone, positions=positions[row : row + 1, first:end])
            for heads in _blocks(queries[row, :, first:end], n_group):
                group = slice(heads.start * n_group, heads.stop * n_group)
                before = undone(queries[row : row + 1, group, first:end])[0].unflatten(0, (-1, n_group))
                logits = self._logits(before, keys[row, heads, None, first:end].float(), turn, inputs.scaling)
                sinks = None if inputs.sinks is None else inputs.sinks[group].float().unflatten(0, (-1, n_group))
                weights = _shares(logits, cuts, sinks)
                if self.use_vnorm:
                    weights = (weights + self.epsilon) * values[row, heads, first:end].float().norm(dim=-1)
                scores[row, heads, first:end] = weights
            scores[row, :, begin:first] = scores[row, :, first:end].nan_to_num(0).max() + 1
        return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores

    def _logits(
        self, before: "torch.Tensor", keys: "torch.Tensor", turn: "torch.Tensor", scaling: float
    ) -> "torch.Tensor":
        """Logs of the attention (H, G, n) that next queries are expected to give to keys (H, 1, n, D), up to a constant
        each, of queries ``before`` (H, G, n, D)."""
        mean = before.mean(2, keepdim=True)
        logits = (mean @ turn @ keys.mT)[:, :, 0] * scaling
        if self.use_covariance:
            # The layer's own queries, where it turns none: not in place. In four dimensions torch copies what is
            # transposed.
            flat = (before - mean).flatten(0, 1)
            spread = (turn.T @ (flat.mT @ flat / before.shape[2]) @ turn).unflatten(0, before.shape[:2])
            spread = spread.transpose(1, 2).flatten(2)  # (H, D, G*D): one product for all query heads
            along = (keys[:, 0] @ spread).unflatten(-1, (-1, keys.shape[-1])).mul_(keys.transpose(1, 2)).sum(-1)
            logits += along.mT * (scaling**2 / 2)
        return logits


_BLOCK = {"cpu": 2**22, "cuda": 2**28}  # bytes: what a processor's cache holds, and what a GPU is busy with


def _blocks(queries: "torch.Tensor", n_group: int) -> Iterator[slice]:
    """Key heads that are judged together, of queries (H*G, n, D)."""
    n_head = len(queries) // n_group
    n = max(1, _BLOCK.get(queries.device.type, 2**22) // (4 * n_group * queries[0].numel()))
    return (slice(at, min(at + n, n_head)) for at in range(0, n_head, n))


def _shares(logits: "torch.Tensor", cuts: Sequence[int], sinks: "torch.Tensor | None") -> "torch.Tensor":
    """Softmax (H, G, n) of each segment's own logits, mean over the group; ``sinks`` (H, G) join each."""
    import torch

    shares = []
    for begin, end in zip([0, *cuts], cuts, strict=False):
        own = logits[..., begin:end] if sinks is None else torch.cat([logits[..., begin:end], sinks[..., None]], -1)
        shares.append(own.softmax(-1)[..., : end - begin])
    return torch.cat(shares, -1).mean(1)
