"""The random control: every token is as likely as any other, and a draw depends on nothing but its row."""

import numpy as np
import pytest
import torch
from test_ops import DTYPES, on_every_device
from tiny_models import build
from transformers import DynamicCache

import kvpitfalls as kvp
from kvpitfalls import ops, reference
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


SEEDS = [0, 1, -1, 7, 2**31, 2**32 + 7, 2**53 + 1, 2**61 + 5, 2**62 - 1, 2**62 + 3, -(2**40)]
STEP, MOST = np.uint64(0x1E3779B97F4A7C15), 2.0**30


def mixed(x):
    """SplitMix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def defined(keys, seed):
    """The draw of a row's keys (H, n, D) by unsigned numbers, which cards depend on."""
    n_head, n_token, n_dim = keys.shape
    told_by = keys[:, [n_token - 1 - i * n_token // 8 for i in range(8)]].double().numpy().reshape(n_head, 8 * n_dim)
    coarse = np.rint(np.clip(np.nan_to_num(4.0 * told_by, posinf=MOST, neginf=-MOST), -MOST, MOST))
    salts = mixed(coarse.astype(np.int64).view(np.uint64) + np.arange(8 * n_dim, dtype=np.uint64) * STEP)
    of_head = mixed(salts.sum(-1) + np.arange(n_head, dtype=np.uint64))
    of_head = mixed(of_head + np.uint64((seed + int(STEP) * n_token) % 2**62))
    drawn = mixed(of_head[:, None] + np.arange(n_token, dtype=np.uint64) * STEP) & np.uint64(0xFFFFFF)
    return drawn.astype(np.float64) / 2**24


def odd_keys(generator, dtype, n_head, n_token, n_dim):
    """Keys that hold what rounds, ties, overflows or is no number."""
    keys = torch.randn(2, n_head, n_token, n_dim, generator=generator)
    odd = [torch.nan, torch.inf, -torch.inf, -0.0, 0.125, 0.375, -0.125, 1e9, -3e38, 3e38, 1e-40, 2.0**28, 7e4]
    chosen = torch.randint(2 * len(odd), keys.shape, generator=generator)
    for i, number in enumerate(odd):
        keys[chosen == i] = number
    return keys.to(dtype)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_device_draws_what_the_definition_does(dtype, device):
    """To the bit, in and around any valid range, by any strides; heads and lengths beyond one block."""
    generator = torch.Generator().manual_seed(12)
    for n_head, n_token, n_dim in ((1, 1, 1), (3, 70, 33), (2, 1025, 128), (5, 4097, 513), (1, 9000, 64)):
        keys = odd_keys(generator, dtype, n_head, n_token, n_dim).to(device)
        apart = torch.stack([keys, keys.flip(2)], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
        for valid in (None, [(0, n_token), (n_token // 3, n_token - n_token // 4)], [(1, 1), (0, 1)]):
            for seed in ({}, {"seed": 2**32 - 1, "seed_high": 2**30 - 1}, {"seed": 5}):
                exact = reference.score("random", keys, valid=valid, **seed)
                for given in (keys, apart):
                    assert torch.equal(ops.score("random", given, valid=valid, **seed), exact), (n_token, valid, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_draw_is_what_it_was(dtype):
    """To the bit, for every seed: so are the kept tokens, with padding, and where each instruction has a quota."""
    generator = torch.Generator().manual_seed(11)
    for i, n_token in enumerate([1, 2, 3, 5, 31, 64, 257, 1024, 1500, 4099]):
        n_head, n_dim = 1 + i % 4, [1, 7, 16, 64, 100, 513][i % 6]
        keys = odd_keys(generator, dtype, n_head, n_token, n_dim)
        low, high = n_token // 7, n_token - n_token // 9
        padded = keys.clone()
        padded[:, :, low:high] = keys[:, :, : high - low]
        for seed in SEEDS:
            kept = kvp.keep(Random(seed), keys, compression_ratio=0.5)
            expected = np.stack([defined(row, seed) for row in keys])
            assert np.array_equal(kept.scores.double().numpy(), expected), (n_token, seed)
            best = np.argsort(-expected, -1, kind="stable")[..., : kept.positions.shape[-1]]
            assert np.array_equal(kept.positions.numpy(), np.sort(best, -1))
        valid = [(low, high), (0, n_token)]
        kept = kvp.keep(Random(3), padded, compression_ratio=0.5, valid=valid)
        for row, (begin, end), scores in zip(padded, valid, kept.scores, strict=True):
            assert np.array_equal(scores[:, begin:end].double().numpy(), defined(row[:, begin:end], 3))
        if n_token > 3:
            fair = kvp.keep(Random(3), keys, budget=3, spans=[(1, 2), (2, n_token)], fair=True)
            assert np.array_equal(fair.scores.double().numpy(), np.stack([defined(row, 3) for row in keys]))


def pairs_apart(keys):
    """Of all pairs of rows (B, H, n, D), (H,): which share keeps other tokens."""
    kept = np.asarray(kvp.keep(Random(), keys, compression_ratio=0.5).positions)
    one, other = np.triu_indices(len(kept), 1)
    return (kept[one] != kept[other]).any(-1).mean(0)


@pytest.mark.parametrize("n_shared", [1, 5, 11])
def test_rows_of_one_length_that_begin_alike_are_drawn_for_one_by_one(n_shared):
    """As prompts are under one template: an interval over them takes their draws to be independent."""
    keys = np.random.default_rng(4).standard_normal((40, 2, 12, 8)).astype(np.float32)
    keys[:, :, :n_shared] = keys[:1, :, :n_shared]
    assert (pairs_apart(keys) > 0.99).all()


def test_prompts_of_one_length_are_drawn_for_one_by_one_in_every_layer_of_a_model():
    """One sentence of twelve tokens between two that all have in common, as a template has."""
    model = build("llama")
    ids = torch.randint(3, 90, (12, 30), generator=torch.Generator().manual_seed(6))
    ids[:, :9], ids[:, 21:] = ids[0, :9], ids[0, 21:]
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert all((pairs_apart(layer.keys) > 0.95).all() for layer in cache.layers)


def test_draws_are_those_that_were_recorded():
    """As of 29 November 2026, from an implementation by unsigned numbers of NumPy (``defined``)."""
    keys = (np.arange(2 * 12 * 3, dtype=np.float32).reshape(1, 2, 12, 3) % 7) - 3
    kept = [kvp.keep(Random(seed), keys, budget=4).positions[0].tolist() for seed in (0, 1, 2**61 + 1)]
    assert kept == [
        [[1, 2, 7, 10], [1, 5, 8, 9]],
        [[1, 2, 6, 9], [0, 2, 4, 10]],
        [[1, 5, 10, 11], [0, 5, 7, 11]],
    ]


def test_a_seed_is_any_whole_number_and_nothing_else():
    keys = np.random.default_rng(0).standard_normal((1, 2, 12, 8), dtype=np.float32)
    for seed in (np.int32(7), np.uint8(7), 7 + 2**62, 7 - 2**62):
        assert (kvp.keep(Random(seed), keys, budget=5).positions == kvp.keep(Random(7), keys, budget=5).positions).all()
    for wrong in (1.5, "7", None, True):
        with pytest.raises(ValueError, match=r"seed is .*; expected a whole number"):
            Random(wrong)
