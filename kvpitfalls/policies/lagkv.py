"""LagKV."""

from dataclasses import dataclass

from .base import Call, Inputs, Policy


@dataclass(frozen=True)
class LagKV(Policy):
    """Keep what differs most from the ``lag_size`` tokens after it; the first ``n_sink`` and the last chunk come first.

    After the sinks the row is cut into chunks of ``lag_size``. With min and max, by channel, over the next chunk,
    spread(x)[k] = std over channels of (x[k] - min) / (max - min), and score[k] = minus the rank, within k's chunk and
    from 0 for the best, of softmax over that chunk of spread(key) + softmax of spread(value): every chunk keeps equally
    many. The last whole chunk has nothing after it: it and what follows are kept before any
    other chunk's tokens, the newest first. A channel that does not vary in the next chunk counts as 0. Needs keys and
    values, no attention.

    Fair: the same scores, and the quotas. What follows a token is what it is measured by, not its rival, and ranks are
    within a chunk, so no instruction's scores can push out another's; chunks within each instruction would leave most
    instructions with none to compare.

    Defined for rows of at least ``n_sink + 2 * lag_size`` tokens and budgets beyond sinks and last chunk: otherwise no
    score is ever looked at and it would be StreamingLLM (which kvpress's press then is). Not defined while a budget is
    held: its chunks are of whole text.

    Parameters
    ----------
    n_sink : int
    lag_size : int
        Tokens of a chunk. 128 as in the paper; prompts below 260 tokens need a smaller one.

    References
    ----------
    "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arXiv 2504.04704.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.LagKV(n_sink=1, lag_size=3), keys, values=keys, budget=6).positions[0].tolist()
    [[0, 2, 6, 7, 8, 9], [0, 1, 6, 7, 8, 9]]
    """

    n_sink: int = 4
    lag_size: int = 128
    name = "lagkv"
    needs_values = True
    holds = False
    least = (("n_sink", 0), ("lag_size", 2))

    def always(self, n_token: int) -> int:
        """The sinks, and what has no chunk behind it."""
        return n_token - max(0, (n_token - self.n_sink) // self.lag_size - 1) * self.lag_size

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        return Call(inputs, "lagkv", {"n_sink": self.n_sink, "lag_size": self.lag_size}, reads_values=True)
