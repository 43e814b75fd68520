"""KeyDiff."""

from dataclasses import dataclass

from .base import Call, Inputs, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keep the keys that are least like the mean of all.

    score[k] = -cos(key[k], mean over the row of key / ||key||), after rotary embedding; needs no attention and looks at
    no position. Fair: each segment's keys are compared with the mean of their own segment, which is the row's where
    there is one segment. A key of length zero has no direction: it scores 0 and takes no part in the mean. Two keys are
    equally like their mean: the first is kept first.

    The paper evicts block by block while it reads the prompt; here the whole prompt is judged once, as in kvpress.

    References
    ----------
    "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", arXiv 2504.15364.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kvp.keep(kvp.KeyDiff(), keys, budget=4).positions[0].tolist()
    [[1, 3, 6, 8], [0, 1, 3, 4]]
    """

    name = "keydiff"

    def call(self, inputs: Inputs) -> Call:
        """See the class."""
        return inputs.apart("keydiff")
