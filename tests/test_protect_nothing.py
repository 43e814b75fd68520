"""What ``protect`` names protects a token, or is refused: by ``keep`` and by the cache of a model alike."""

import numpy as np
import pytest
from tiny_models import build, ids

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


def test_sinks_of_a_policy_that_has_none_are_refused():
    message = r"^protect names 'sinks', and n_sink is 0; expected a policy whose n_sink is above 0$"
    with pytest.raises(ValueError, match=message):
        kvp.keep(kvp.StreamingLLM(n_sink=0), KEYS, budget=6, protect="sinks")
    with (
        kvp.wrap(build("llama"), kvp.StreamingLLM(n_sink=0), compression_ratio=0.5, protect="sinks") as handle,
        pytest.raises(ValueError, match=message),
    ):
        handle.compress(ids())
    kept = kvp.keep(kvp.StreamingLLM(n_sink=1), KEYS, budget=6, protect="sinks").positions
    assert (kept[..., 0] == 0).all()
