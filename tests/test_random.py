"""The random control: every token is as likely as any other, and a draw depends on nothing but its row."""

import numpy as np
import pytest
import torch

import kvpitfalls as kvp
from kvpitfalls.policies.random import Random


@pytest.mark.parametrize("as_torch", [False, True])
def test_the_random_control_is_fair_in_the_long_run_and_depends_on_nothing_but_its_row(as_torch):
    """Every place is kept equally often; heads differ; a row's draw is the same alone, in a batch, and behind
    padding."""
    keys = np.random.default_rng(3).standard_normal((200, 2, 12, 8)).astype(np.float32)
    given = torch.from_numpy(keys) if as_torch else keys
    kept = np.asarray(kvp.keep(Random(), given, budget=6).positions)
    shares = np.bincount(kept.ravel(), minlength=12) / (200 * 2)
    assert np.abs(shares - 0.5).max() < 0.1  # 4 standard deviations
    assert (kept[:, 0] != kept[:, 1]).any(-1).mean() > 0.9
    assert (np.asarray(kvp.keep(Random(), given[7:8], budget=6).positions) == kept[7]).all()
    padded = np.concatenate([np.ones((1, 2, 3, 8), np.float32), keys[7:8]], 2)
    assert (kvp.keep(Random(), padded, budget=6, valid=[(3, 15)]).positions == kept[7] + 3).all()
    assert (np.asarray(kvp.keep(Random(seed=1), given, budget=6).positions) != kept).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_random_control_draws_the_same_whatever_torchs_default_dtype(dtype):
    """And draws finely: scores that round would be ties, which the first tokens win."""
    keys = torch.randn(2, 3, 3000, 8, generator=torch.Generator().manual_seed(5))
    wanted = kvp.keep(Random(), keys, compression_ratio=0.5)
    torch.set_default_dtype(dtype)
    try:
        kept = kvp.keep(Random(), keys, compression_ratio=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kept.positions, wanted.positions) and torch.equal(kept.scores, wanted.scores)
    assert all(len(scores.unique()) > 2990 for of_row in kept.scores for scores in of_row)
    assert abs(float(kept.positions.double().mean()) - 1500) < 30  # 6 standard deviations
