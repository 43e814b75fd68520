"""What ``protect`` names has a token to protect, or is refused; a mask is taken from wherever it is."""

import numpy as np
import pytest
import torch

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
