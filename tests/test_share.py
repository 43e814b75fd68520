"""How many tokens each head keeps where heads share: the core against its definition, and the definition's laws."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import every_isa, on_every_device

from kvpitfalls import ops, reference
from kvpitfalls.eviction.allocation import _parts

__all__ = ["every_isa"]
KINDS = {
    "plain": lambda rng, shape: rng.standard_normal(shape),
    "tied": lambda rng, shape: np.round(rng.standard_normal(shape)),
    "neighbours": lambda rng, shape: 1 + rng.integers(-9, 9, shape) * 2.0**-23,
    "equal": lambda rng, shape: np.full(shape, -0.125),
    "zeros": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "odd": lambda rng, shape: rng.choice([np.nan, np.inf, -np.inf, 0, -0.0, 1, 3e38, -3e38, 1e-40], shape),
    "NaN": lambda rng, shape: np.full(shape, np.nan),
    "infinite": lambda rng, shape: np.where(rng.random(shape) < 0.7, np.inf, rng.standard_normal(shape)),
    "small": lambda rng, shape: rng.random(shape) ** 9,  # as attention is
}


def drawn(rng, kind, n_row, n_head, n_segment, n_token):
    """Scores, edges, quotas that may be any, and floors up to them."""
    edges = np.sort(rng.integers(0, n_token + 1, (n_row, n_segment + 1)), axis=-1).astype(np.int32)
    if rng.integers(2):
        edges[:, 0], edges[:, -1] = 0, n_token
    shape = n_row, n_head, n_segment
    scores = KINDS[kind](rng, (n_row, n_head, n_token)).astype(np.float32)
    quotas = rng.integers(0, np.repeat(np.diff(edges)[:, None], n_head, 1) + 3, shape).astype(np.int32)
    return scores, edges, quotas, (quotas * rng.choice([0, 0.2, 0.7, 1], shape)).astype(np.int32)


def wanted(scores, edges, quotas, floors):
    """By sorting the tokens of a segment: sure ones first, then by score, NaN last, head and position."""
    counts = np.zeros(quotas.shape, int)
    for b, row in enumerate(edges):
        for s, (low, high) in enumerate(pairwise(row)):
            tokens = []
            for h, of_head in enumerate(scores[b, :, low:high].tolist()):
                best = sorted((x != x, -x if x == x else 0, t) for t, x in enumerate(of_head))
                sure = max(floors[b, h, s], min(of_head.count(np.inf), quotas[b, h, s]))
                tokens += [(place >= sure, is_nan, x, h, t) for place, (is_nan, x, t) in enumerate(best)]
            for *_, h, _ in sorted(tokens)[: quotas[b, :, s].sum()]:
                counts[b, h, s] += 1
    return counts


def shared(device, scores, edges, quotas, floors):
    return ops.share(torch.from_numpy(scores).to(device), edges, quotas, floors)


@given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from(sorted(KINDS)))
@settings(max_examples=300, deadline=None)
def test_heads_share_as_a_sort_of_all_their_tokens_would(data, seed, kind):
    sizes = [data.draw(st.integers(1, most)) for most in (3, 5, 4, 40)]
    case = drawn(np.random.default_rng(seed), kind, *sizes)
    counts = wanted(*case)
    assert np.array_equal(ops.share(*case), counts) and np.array_equal(reference.share(*case), counts)
    _, edges, quotas, floors = case
    widths = np.diff(edges)[:, None]
    assert (counts.sum(1) == np.minimum(quotas.sum(1), widths[:, 0] * sizes[1])).all()
    assert (counts <= widths).all() and (counts >= np.minimum(floors, widths)).all()


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
def test_every_device_and_instruction_set_shares_alike(kind, device, every_isa):
    """To the token: many heads and few, short and long segments, every digit of a rank, and scores with gaps."""
    rng = np.random.default_rng(7)
    sizes = [(2, 3, 2, 50), (1, 8, 1, 1023), (1, 2, 3, 5000), (3, 9, 1, 1500), (1, 40, 2, 600), (2, 1, 1, 2000)]
    sizes += [(1, 8, 1, 9000), (40, 3, 2, 70)] + [(1, 8, 1, 40000), (1, 3, 2, 150000), (1, 70, 1, 3000)] * (
        device == "cuda"
    )
    for size in sizes:
        case = drawn(rng, kind, *size)
        expected = reference.share(*case)
        apart = torch.empty(*case[0].shape, 2, device=device)[..., 1]
        apart.copy_(torch.from_numpy(case[0]))
        for isa in every_isa(device):
            assert np.array_equal(shared(device, *case), expected), (size, isa)
            assert np.array_equal(ops.share(apart, *case[1:]), expected), (size, isa)


@on_every_device
def test_rows_of_a_batch_share_by_themselves(device):
    rng = np.random.default_rng(3)
    case = drawn(rng, "tied", 4, 5, 3, 700)
    together = shared(device, *case)
    for b in range(4):
        assert np.array_equal(shared(device, *(x[b : b + 1] for x in case))[0], together[b])


@pytest.mark.parametrize("alpha", [0, 1e-9, 0.1 + 0.2, 0.123456789012345678, 1 / 3, 1])
def test_a_part_of_a_quota_is_exact_whatever_its_digits(alpha):
    """Fractions of many digits would overflow 64 bits."""
    quotas = np.array([[[0, 1, 3, 10, 99_999, 2**31 - 1]]], np.int32)
    whole, _, power = repr(alpha).partition("e")
    front, _, back = whole.partition(".")
    numerator, exponent = int(front + back), len(back) - int(power or 0)
    expected = [min(n, max(n * numerator // 10**exponent, int(alpha > 0))) for n in quotas.ravel().tolist()]
    assert _parts(str(alpha), quotas.shape, quotas.tobytes()).ravel().tolist() == expected
