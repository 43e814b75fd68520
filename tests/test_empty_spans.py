"""A span has a token that can be kept, or is refused, by ``keep`` as by a wrap: no share of it could be told."""

import numpy as np
import pytest

import kvpitfalls as kvp

KEYS = np.random.default_rng(0).standard_normal((1, 2, 12, 8), dtype=np.float32)
ROWS = np.concatenate([KEYS, KEYS])


@pytest.mark.parametrize("fair", [False, True, 0.5, "floor"])
@pytest.mark.parametrize(
    ("keys", "spans"),
    [(KEYS, {"a": (5, 5)}), (KEYS, {"a": (0, 0), "b": (0, 6)}), (ROWS, [{"a": (2, 4)}, {"a": (7, 7)}])],
)
def test_a_span_without_a_token_is_refused(keys, spans, fair):
    """Whether it is protected, gets a share, or is only named."""
    for protect in (None, ["sinks"], ["sinks", "a"]):
        with pytest.raises(ValueError, match=r"^span 'a' is \[\d+, \d+\); expected at least one token$"):
            kvp.keep("knorm", keys, budget=6, spans=spans, fair=fair, protect=protect)
