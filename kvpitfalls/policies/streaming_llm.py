"""StreamingLLM."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..eviction.arrays import Array
from .base import Call, Inputs, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first ``n_sink`` tokens and the newest ones.

    Fair: every segment keeps its newest tokens. The sinks are the row's first ``n_sink`` tokens, however many segments
    those are in; a segment keeps the sinks that are in it before its newest tokens, and pays for them from its own
    quota.

    Parameters
    ----------
    n_sink : int
        Attention sinks kept at the start. With a budget below ``n_sink`` the first tokens are what is kept.

    References
    ----------
    "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. Fair: arXiv 2510.00231, appendix E.3.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.StreamingLLM(n_sink=1), keys, budget=4).positions[0].tolist()
    [[0, 7, 8, 9], [0, 7, 8, 9]]
    """

    n_sink: int = 4
    name = "streaming_llm"
    least = (("n_sink", 0),)
    paper_quotas = False

    def score(self, inputs: Inputs) -> Array:
        """See the class."""
        if not inputs.paper:
            return super().score(inputs)
        like = inputs.score("position", n_sink=0)
        ramps = np.stack([self._ramps(row, inputs.n_token) for row in inputs.segments])
        scores = np.repeat(ramps[:, None], like.shape[1], axis=1)
        return scores if isinstance(like, np.ndarray) else like.new_tensor(scores)

    def call(self, inputs: Inputs) -> Call | None:
        """See the class. The paper's scores are no scorer of the core."""
        return None if inputs.paper else inputs.call("position", n_sink=self.n_sink)

    def _ramps(self, segments: Sequence[tuple[int, int]], n_token: int) -> npt.NDArray[np.float32]:
        """The authors' scores: 1 for a sink, then one ramp from 0.1 to 0.9 per segment; the best of the whole row are
        kept."""
        (begin, cut), (_, end) = segments
        if cut <= begin + self.n_sink or end <= cut:
            raise ValueError(
                f"fair='paper' with streaming_llm expects a first segment longer than the {self.n_sink} sinks and a "
                "second that is not "
                f"empty; they have {cut - begin} and {end - cut} tokens"
            )
        row = np.full(n_token, -np.inf, np.float32)
        row[begin : begin + self.n_sink] = 1.0
        row[begin + self.n_sink : cut] = np.linspace(0.1, 0.9, cut - begin - self.n_sink)
        row[cut:end] = np.linspace(0.1, 0.9, end - cut)
        return row
