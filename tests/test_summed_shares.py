"""Shares that a sum missed by a rounding, such as 1 - 0.7, are the decimals that tables show, wherever one is given."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvpitfalls.eviction.allocation import Ada
from kvpitfalls.eviction.budget import kept_tokens
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.experiments.config import SweepConfig


@given(st.integers(1, 5000), st.integers(0, 99), st.integers(1, 100))
def test_a_ratio_that_was_summed_keeps_what_the_decimal_does(n_token, percent, n_step):
    """Tables show both as one."""
    wanted = max(1, n_token * (100 - percent) // 100)
    for ratio in (percent / 100, 1 - (1 - percent / 100), np.linspace(0, percent / 100, n_step + 1)[-1]):
        assert kept_tokens(n_token, ratio) == wanted
    for step in (0.05, 0.1):
        for i, ratio in enumerate(np.arange(0, 0.95, step)):
            assert kept_tokens(n_token, ratio) == kept_tokens(n_token, round(i * step, 2)), (step, i)


@given(st.integers(0, 99))
def test_a_share_that_was_summed_is_the_decimal_wherever_one_is_given(percent):
    """Lambda, Ada-KV's alpha, and the ratios of a sweep, whose records are found by them; NumPy's 32 bits, too."""
    quotas = np.arange(200, dtype=np.int32).reshape(1, 2, 100)
    share = percent / 100
    config = SweepConfig(compression_ratios=[share])
    for given_share in (1 - (1 - share), np.float32(share), np.linspace(0, share, 8)[-1]):
        assert Fair.parse(given_share) == Fair.parse(share) and Fair(strength=given_share) == Fair(strength=share)
        assert np.array_equal(Ada(given_share).parts(quotas), Ada(share).parts(quotas))
        assert SweepConfig(compression_ratios=[given_share]) == config
