"""A span that ``protect`` names has a token to protect, or is refused."""

import numpy as np
import pytest

import kvpitfalls as kvp

KEYS = np.random.default_rng(0).standard_normal((1, 2, 12, 8), dtype=np.float32)
ROWS = np.concatenate([KEYS, KEYS])


@pytest.mark.parametrize("fair", [False, True, 0.5])
@pytest.mark.parametrize(
    ("keys", "spans"),
    [(KEYS, {"a": (5, 5)}), (KEYS, {"a": (0, 0), "b": (0, 6)}), (ROWS, [{"a": (2, 4)}, {"a": (7, 7)}])],
)
def test_a_name_without_a_token_is_refused(keys, spans, fair):
    with pytest.raises(ValueError, match=r"^protect names span 'a', which is \[\d+, \d+\); expected a token in it$"):
        kvp.keep("knorm", keys, budget=6, spans=spans, fair=fair, protect=["sinks", "a"])
    kvp.keep("knorm", keys, budget=6, spans=spans, fair=fair, protect=["sinks"])
