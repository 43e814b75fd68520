"""What ``protect`` names has a token to protect, or is refused; a span without one is as if it was not there; a mask is
taken from wherever it is."""

import numpy as np
import pytest
import torch
from tiny_policies import EVERY, is_defined, kept_by

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


@pytest.mark.parametrize("fair", [False, True, 0.5, "floor=2"])
@pytest.mark.parametrize("empty", [0, 2, 4, 7, 10, 12])
def test_a_span_without_a_token_is_as_if_it_was_not_there(fair, empty):
    """The paper's code makes such; it neither cuts the text around it nor has a part of a window."""
    options = {"values": KEYS, "rotary": kvp.Rotary(), "output": np.eye(16, dtype=np.float32).reshape(2, 8, 16)}
    options |= {"budget": 7, "fair": fair, "layer": 0, "n_layer": 2}
    for policy in [policy for policy in EVERY if is_defined(policy, 12, 7)]:
        spans = {"b": (4, 7), "c": (7, 10)}
        kept, without = (
            kept_by(policy, KEYS, KEYS, spans=given, **options) for given in (spans | {"a": (empty, empty)}, spans)
        )
        assert np.array_equal(kept.positions, without.positions), policy
        assert fair is False or np.array_equal(kept.scores, without.scores), policy


@pytest.mark.parametrize("fair", [True, 0.5, "floor=2"])
def test_fair_eviction_needs_a_span_that_holds_a_token(fair):
    for spans in ({}, {"a": (5, 5)}, {"a": (0, 0), "b": (12, 12)}):
        with pytest.raises(ValueError, match=r"^fair eviction needs the instructions' places; expected spans that hol"):
            kvp.keep("knorm", KEYS, budget=6, spans=spans, fair=fair)
    with pytest.raises(ValueError, match=r"^fair eviction needs"):
        kvp.keep("knorm", ROWS, budget=6, spans=[{"a": (2, 4)}, {"a": (7, 7)}], fair=fair)


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a GPU, of which NumPy makes no array."""

    def __array__(self, *options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_mask_may_be_on_a_gpu():
    mask = torch.arange(12) % 5 == 3
    kept = kvp.keep("knorm", KEYS, budget=6, protect=mask.as_subclass(Elsewhere)).positions
    assert np.array_equal(kept, kvp.keep("knorm", KEYS, budget=6, protect=[3, 8]).positions)
