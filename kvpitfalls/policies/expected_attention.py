"""Expected Attention."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedModelError
from ..eviction import forecast
from ..eviction.arrays import Array, Int32, as_torch
from ..numbers import is_real
from .base import Inputs, Policy
from .rotary import in_order

if TYPE_CHECKING:
    import torch

    from .rotary import Rotary


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
    least = (("n_future_positions", 1), ("n_sink", 0))

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value in (("use_covariance", self.use_covariance), ("use_vnorm", self.use_vnorm)):
            if not isinstance(value, bool):
                raise ValueError(f"{field} is {value!r}; expected True or False")
        if not is_real(self.epsilon) or not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon is {self.epsilon!r}; expected a number, at least 0")

    def always(self, n_token: int) -> int:
        """The sinks."""
        return self.n_sink

    def score(self, inputs: Inputs) -> Array:
        """See the class."""

        keys, queries, values = (as_torch(x).detach() for x in (inputs.keys, inputs.queries, inputs.values))
        if queries.shape[2] != keys.shape[2]:
            raise ValueError(
                f"queries has {queries.shape[2]} tokens; policy {self.name!r} expects all {keys.shape[2]} of the prompt"
            )
        if inputs.softcap:
            raise UnsupportedModelError(
                f"softcap is {inputs.softcap}; policy {self.name!r} is not defined for capped logits, expected none"
            )
        if (scores := self._by_core(inputs, keys, queries, values)) is None:
            scores = self._by_products(inputs, keys, queries, values)
        return scores.numpy() if isinstance(inputs.keys, np.ndarray) else scores

    def _by_products(
        self, inputs: Inputs, keys: "torch.Tensor", queries: "torch.Tensor", values: "torch.Tensor"
    ) -> "torch.Tensor":
        """The scores by torch's products, whatever the layer makes of its queries."""
        import torch

        scores = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        positions = inputs.rotary.positions(inputs.valid, keys.shape[2], keys.device)
        for row, (begin, first, *cuts) in enumerate(self._edges(inputs).tolist()):
            rows, end = slice(row, row + 1), cuts[-1]
            of_row = keys[rows, :, first:end], queries[rows, :, first:end], positions[row, first:end]
            logits = self._logits(inputs, *of_row)
            sinks = None if inputs.sinks is None else inputs.sinks.float().unflatten(0, logits.shape[:2])
            weights, out = _shares(logits, [cut - first for cut in cuts], sinks), scores[row, :, first:end]
            if self.use_vnorm:
                torch.mul(weights + self.epsilon, _lengths(values[row, :, first:end]), out=out)
            else:
                out[:] = weights
            scores[row, :, begin:first] = out.nan_to_num(0).max() + 1
        return scores

    def _edges(self, inputs: Inputs) -> Int32:
        """Of each row's first ``n_sink`` tokens and of its segments without them, (B, S+2); shorter rows end in empty
        segments."""
        edges = np.empty((len(inputs.valid), 2 + max(map(len, inputs.segments))), np.int32)
        for of_row, (begin, end), segments in zip(edges, inputs.valid, inputs.segments, strict=True):
            first = min(begin + self.n_sink, end - 1)
            of_row[:] = end
            of_row[: 2 + len(segments)] = [begin, first, *(max(stop, first) for _, stop in segments)]
        return edges

    def _by_core(
        self, inputs: Inputs, keys: "torch.Tensor", queries: "torch.Tensor", values: "torch.Tensor"
    ) -> "torch.Tensor | None":
        """The same by the core, to rounding; None where it does not take these tensors, or does not know how the layer
        turns its queries."""
        if not forecast.is_known(keys, queries):
            return None
        rotary, n_token, one = inputs.rotary, keys.shape[2], queries[:1, :1, :1]
        ahead = inputs.valid, n_token, self.n_future_positions, one
        if (order := rotary.order(keys.shape[-1], rotary.ahead(*ahead)[0].shape[-1])) is None:
            return None
        return forecast.expect(
            in_order(keys, order),
            in_order(queries, order),
            values if self.use_vnorm else None,
            rotary.of_tokens(inputs.valid, n_token, one, order),
            rotary.ahead(*ahead, order),
            self._edges(inputs),
            scaling=inputs.scaling,
            sinks=None if inputs.sinks is None else inputs.sinks.detach().float(),
            epsilon=self.epsilon if self.use_vnorm else 0.0,
            with_spread=self.use_covariance,
        )[1]

    def _logits(
        self, inputs: Inputs, keys: "torch.Tensor", queries: "torch.Tensor", positions: "torch.Tensor"
    ) -> "torch.Tensor":
        """Logits (H, G, n) of the attention that queries to come are expected to give to keys (1, H, n, D), after those
        (1, H*G, n, D) of a prompt; up to a constant each."""
        import torch

        rotary: Rotary = inputs.rotary
        ahead = positions[-1] + torch.arange(1, 1 + self.n_future_positions, device=positions.device)
        turn = rotary.mean(ahead, queries) * inputs.scaling
        back = rotary.backwards(positions[None], queries[:, :1, :1])
        before = (_turned(rotary, queries[:, :, part], [x[:, part] for x in back]) for part in _parts(queries[0]))
        mean, squares = moments(before, self.use_covariance)
        spread = None if squares is None else turn.T @ (squares / (2 * len(positions))) @ turn
        return _logits(keys[0], mean @ turn, spread)


def _turned(rotary: "Rotary", queries: "torch.Tensor", by: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """Queries (Hq, n, D) of one row, turned, in memory of their own: a layer that turns nothing gives back its own."""
    turned: torch.Tensor = rotary.turned(queries.float(), *by)[0]
    is_own = turned.untyped_storage().data_ptr() != queries.untyped_storage().data_ptr()
    return turned if is_own else turned.clone()


_BLOCK = {"cpu": 2**22, "cuda": 2**28}  # bytes: what a processor's cache holds, and what a GPU is busy with


def _parts(x: "torch.Tensor", n_each: int = 1) -> Iterator[slice]:
    """Tokens of x (H, n, D) that are worked on together, where each head's number makes ``n_each`` of float32."""
    n_byte = 4 * n_each * len(x) * x.shape[2]
    n = max(16, _BLOCK.get(x.device.type, 2**22) // n_byte)
    return (slice(at, min(at + n, x.shape[1])) for at in range(0, x.shape[1], n))


def moments(parts: "Iterable[torch.Tensor]", with_squares: bool = True) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """Mean (H, D) of tokens that come in parts (H, n, D), which are used up; and, if asked for, the sum of squares (H,
    D, D) of what they differ from it by: n times their covariance.

    Each part is centred by its own mean, since float32 has no room for what differs beside the square of a large mean.
    """
    import torch

    sizes: list[int] = []
    means: list[torch.Tensor] = []
    squares: torch.Tensor | None = None
    for part in parts:
        sizes.append(part.shape[1])
        means.append(part.mean(1))
        if with_squares:
            part -= means[-1][:, None]
            of_part = part.mT @ part
            squares = of_part if squares is None else squares.add_(of_part)
    if len(sizes) == 1:
        return means[0], squares
    mean = torch.stack([x * (n / sum(sizes)) for x, n in zip(means, sizes, strict=True)]).sum(0)
    if squares is not None:
        between = torch.stack([(x - mean) * n**0.5 for x, n in zip(means, sizes, strict=True)], 1)
        squares += between.mT @ between
    return mean, squares


def _logits(keys: "torch.Tensor", means: "torch.Tensor", spreads: "torch.Tensor | None") -> "torch.Tensor":
    """Logs (H, G, n) of the attention that queries with these means (H*G, D), and these halves of their covariances
    (H*G, D, D), are expected to give to keys (H, n, D), up to a constant each."""
    import torch

    means = means.unflatten(0, (len(keys), -1))
    if spreads is not None:  # (H, D, G*D): one product for all query heads
        spreads = spreads.unflatten(0, means.shape[:2]).transpose(1, 2).flatten(2)
    logits = []
    for part in _parts(keys, means.shape[1]):
        own = keys[:, part].float()
        if spreads is None:
            logits.append(means @ own.mT)
        else:
            along = (own @ spreads).unflatten(-1, (-1, own.shape[-1]))  # (H, n, G, D)
            logits.append(torch.baddbmm(_dots(along, own).mT, means, own.mT))
    return logits[0] if len(logits) == 1 else torch.cat(logits, -1)


def _dots(along: "torch.Tensor", keys: "torch.Tensor") -> "torch.Tensor":
    """Products (H, n, G) of each row of ``along`` (H, n, G, D), which is used up, with its key (H, n, D)."""
    if along.is_cuda:  # in half the time of two passes over it
        return (along @ keys[..., None])[..., 0]
    return along.mul_(keys[:, :, None]).sum(-1)


def _lengths(x: "torch.Tensor") -> "torch.Tensor":
    """Euclidean, float32, of the rows of x."""
    import torch

    if not x.is_cuda:
        x = x.float()
    lengths: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return lengths


def _shares(logits: "torch.Tensor", cuts: Sequence[int], sinks: "torch.Tensor | None") -> "torch.Tensor":
    """Softmax (H, G, n) of each segment's own logits, mean over the group; ``sinks`` (H, G) join each."""
    import torch

    shares = []
    for begin, end in zip([0, *cuts], cuts, strict=False):
        own = logits[..., begin:end] if sinks is None else torch.cat([logits[..., begin:end], sinks[..., None]], -1)
        shares.append(own.softmax(-1)[..., : end - begin])
    return (shares[0] if len(shares) == 1 else torch.cat(shares, -1)).mean(1)
