"""LagKV: its scorer against weights in float64, by the laws of its formula, and where the policy is refused."""

import numpy as np
import pytest
import torch
from test_ops import DTYPES, on_every_device, tensors
from tiny_models import build, ids
from tiny_policies import is_defined

import kvpitfalls as kvp
from kvpitfalls import ops, reference

KEYS = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
VALUES = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(2))


def score(keys, values, n_sink=0, lag_size=8, **given):
    return ops.score("lagkv", keys, values=values, n_sink=n_sink, lag_size=lag_size, **given)


def assert_ordered_by_weights(scores, keys, values, valid, n_sink, lag_size, room):
    """Tokens whose weights in float64 differ by more than ``room`` stand in that order, and the rest as it must."""
    exact = reference.score("lagkv", keys, values=values, valid=valid, n_sink=n_sink, lag_size=lag_size)
    for b, (begin, end) in enumerate(valid):
        first = min(begin + n_sink, end)
        last = first + max(0, (end - first) // lag_size - 1) * lag_size
        outside = [*range(first), *range(last, keys.shape[2])]
        assert torch.equal(scores[b][:, outside], exact[b][:, outside])
        if first == last:
            continue
        both = (x[b, :, first : last + lag_size].double().unflatten(1, (-1, lag_size)) for x in (keys, values))
        weights = sum(reference._lag_weights(x) for x in both)
        ours = scores[b, :, first:last].unflatten(1, (-1, lag_size))
        above = weights[..., :, None] > weights[..., None, :] * (1 + room)
        assert (ours[..., :, None] > ours[..., None, :])[above].all()
        assert torch.equal(ours.sort(-1).values, torch.arange(1.0 - lag_size, 1).expand_as(ours).to(ours.device))


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_scores_are_ranks_by_weights_of_float64(dtype, layout, device):
    for n_token, n_dim, of_value, n_sink, lag_size in [
        (70, 80, 33, 4, 16),
        (300, 128, 128, 0, 7),
        (1100, 64, 8, 5, 256),
        (1100, 16, 16, 0, 500),
        (41, 1, 5, 3, 2),
        (9, 8, 8, 20, 3),
        (30, 8, 8, 4, 128),
    ]:
        keys, _ = tensors((2, 3, 1, n_token, n_dim), dtype, layout, device)
        values, _ = tensors((2, 3, 1, n_token, of_value), dtype, layout, device)
        valid = [(0, n_token), (3, n_token - 2)]
        scores = score(keys, values, n_sink, lag_size, valid=np.array(valid))
        assert_ordered_by_weights(scores, keys, values, valid, n_sink, lag_size, room=1e-5)


@on_every_device
@pytest.mark.parametrize("factor", [1e-30, 1e-25, 1e-12, 1, 1e12, 1e18, 1e37, 7e37])
def test_scores_are_those_of_float64_however_narrow_or_wide_a_chunk_is(factor, device):
    keys = KEYS.to(device).clone()
    keys[:, :, 16:24] *= factor  # the third chunk of five
    values = VALUES.to(device)
    assert_ordered_by_weights(score(keys, values), keys, values, [(0, 40)] * 2, 0, 8, room=1e-5)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_bounds_a_chunk_grows_with_it(dtype, device):
    """Powers of two, the sign of a channel, the order of channels and of rows and heads change no score of a token."""
    generator = torch.Generator().manual_seed(4)
    keys = (8 * torch.randn(2, 3, 40, 16, generator=generator)).round().to(device, dtype) / 8
    values = (8 * torch.randn(2, 3, 40, 24, generator=generator)).round().to(device, dtype) / 8
    plain = score(keys, values)
    powers = torch.tensor([2.0**p for p in (-3, 0, 2, 1)] * 4, device=device, dtype=dtype)
    assert torch.equal(score(keys * powers, values * 4), plain)
    rows, heads = [1, 0], [2, 0, 1]
    assert torch.equal(score(keys[rows][:, heads], values[rows][:, heads]), plain[rows][:, heads])
    channels = torch.randperm(16, generator=generator).to(device)
    swapped = score(keys[..., channels], values)
    assert_ordered_by_weights(swapped, keys, values, [(0, 40)] * 2, 0, 8, room=1e-5)


@on_every_device
def test_a_token_that_is_no_number_breaks_its_own_chunk_alone(device):
    keys, values = KEYS.to(device), VALUES.to(device)
    plain = score(keys, values)
    for broken in (0, 11, 31):
        spoilt = values.clone()
        spoilt[1, 2, broken, 5] = torch.nan
        scores, chunk = score(keys, spoilt), slice(broken // 8 * 8, broken // 8 * 8 + 8)
        assert scores[1, 2, chunk].isnan().all()
        scores[1, 2, chunk] = plain[1, 2, chunk]
        # Bounds ignore it, but it may have been the least or the most of those before it.
        before = slice(max(0, chunk.start - 8), chunk.start)
        scores[1, 2, before] = plain[1, 2, before]
        assert torch.equal(scores, plain)


def test_keys_and_values_of_two_dtypes_are_judged_as_they_are():
    """As autocast leaves them; what float32 does not hold is refused."""
    policy, halves = kvp.LagKV(0, 8), VALUES.bfloat16()
    for keys, values in ((KEYS, halves), (halves, KEYS), (halves, VALUES.half())):
        kept = kvp.keep(policy, keys, values=values, budget=28)
        assert torch.equal(kept.scores, score(keys.float(), values.float()))
    with pytest.raises(TypeError, match="values has dtype float64; expected float32, float16 or bfloat16"):
        kvp.keep(policy, KEYS, values=VALUES.double(), budget=28)


@on_every_device
def test_channels_that_do_not_vary_leave_the_order_of_positions(device):
    keys = KEYS.to(device).clone()
    keys[..., ::2] = 1
    for same in (keys, torch.ones_like(keys)):
        kept = kvp.keep(kvp.LagKV(2, 4), same, values=same, budget=20)
        assert kept.scores.isfinite().all() and (kept.counts == 20).all()
    assert torch.equal(score(same, same)[0, 0, :32], -torch.arange(32.0, device=device) % -8)


@pytest.mark.parametrize("lag_size", [2, 5, 9])
@pytest.mark.parametrize("n_sink", [0, 3])
def test_lagkv_is_refused_exactly_where_no_score_would_be_looked_at(n_sink, lag_size):
    policy = kvp.LagKV(n_sink, lag_size)
    for n_token in range(2, 40):
        for budget in range(1, n_token):
            always = n_token - max(0, (n_token - n_sink) // lag_size - 1) * lag_size
            assert is_defined(policy, n_token, budget) == (budget > always)
    assert not any(is_defined(policy, n_sink + 2 * lag_size - 1, k) for k in range(1, n_sink + 2 * lag_size - 1))
    with pytest.raises(
        ValueError,
        match=rf"^policy LagKV\(n_sink={n_sink}, .*given 40 tokens, of which 1 are kept; expected a budget of more",
    ):
        kvp.keep(policy, KEYS, values=VALUES, budget=1)
    told = pytest.raises(ValueError, match="expected a prompt of at least 260 tokens")
    with kvp.wrap(build("llama"), kvp.LagKV(), compression_ratio=0.5) as handle, told:
        handle.compress(ids(1, 20))
    with pytest.raises(
        ValueError, match=r"^policy is 'lagkv', which judges a prompt that is whole; when='always' expects another"
    ):
        kvp.wrap(build("llama"), kvp.LagKV(), compression_ratio=0.5, when="always")
