"""The few voters of SnapKV and TOVA on a GPU: the engine for windows, and rows whose sums have one term.

Needs a CUDA GPU; what holds for any votes is in test_cuda_kernels.py.
"""

import math
from itertools import pairwise

import pytest
import torch
from test_cuda_kernels import attend, error, tensors, two_intervals, whole

from kvpitfalls import ops, reference
from kvpitfalls.policies import Vote
from kvpitfalls.policies.votes import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# No vote here has a window, whose scores of 2 and more would hide what error() is to see.
def observed(n, w, n_segment):
    """SnapKV's votes under fairness: each segment's last w / n_segment tokens judge the others of it."""
    edges = [n * i // n_segment for i in range(n_segment + 1)]
    width = max(1, w // n_segment)
    ends = [(a, max(a, b - width), b) for a, b in pairwise(edges)]
    return [Vote((a, c), (c, b)) for a, c, b in ends]


def last(n, w=64):
    return observed(n, w, 1)


def agree(ours, exact, row_bytes=256):
    """To the rounding of a product, a sum of so many steps as a row has 32 bytes, each of which cuts off."""
    tolerance = 2e-6 * max(1, row_bytes / 512)
    return bool((ours == exact).all()) or error(ours, exact) <= tolerance  # all 0, too, where nobody votes


# From 64 to 256 rows of queries for a key head the engine for windows works, from 8192 tokens on by a kernel apart; its
# tiles are of 128 keys, its warpgroups of 64 keys and 64 or 128 rows.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group, w", [(4, 64), (4, 16), (8, 32), (2, 128), (2, 101), (7, 20), (4, 37), (4, 65)])
def test_windows_against_float64(group, w, dtype):
    for n_token in (w, w + 1, 129, 255, 256, 1000, 2500, 5001, 9001):
        if n_token < w:
            continue
        keys, queries = tensors(2, 3, group, n_token, 128, dtype)
        valid = [(0, n_token), (n_token // 7, n_token - n_token // 9)]
        of_rows = {"last": [last(n_token, w)] * 2, "three": [observed(n_token, w, 3)] * 2}
        if n_token > 10 * w:
            late = Vote((0, n_token // 2), (n_token // 3, n_token // 3 + w // 2), (n_token - w // 2, n_token))
            of_rows["two intervals"] = [[late], observed(n_token, w, 5)]
            of_rows["early"] = [[Vote((0, n_token), (n_token // 4, n_token // 4 + w))], last(n_token, w)]
        for name, votes in of_rows.items():
            for params in ({}, {"kernel_size": 5}, {"share_heads": 1}, {"softcap": 2.0}):
                exact = attend(keys, queries, votes, valid, verb=reference.score, **params)
                assert agree(attend(keys, queries, votes, valid, **params), exact), (n_token, name, params)


@pytest.mark.parametrize(
    "n_dim, dtype",
    [
        (128, torch.bfloat16),
        (64, torch.float16),
        (256, torch.bfloat16),
        (512, torch.float16),
        (40, torch.float32),
        (256, torch.float32),
    ],
)
@pytest.mark.parametrize("n_segment", [1, 2, 5, 90])
def test_one_voter_a_key_against_float64(n_segment, n_dim, dtype):
    """TOVA; with 90 segments the splits are joined by a kernel of their own."""
    for n_token in (90, 1000, 5003):
        keys, queries = tensors(2, 2, 4, n_token, n_dim, dtype, scale=2.0)
        votes = observed(n_token, n_segment, n_segment)
        early = [Vote((0, n_token // 2), (n_token // 3, n_token // 3 + 1)), Vote((n_token // 2, n_token), (0, 1))]
        valid = [(0, n_token), (n_token // 7, n_token - n_token // 9)]
        for of_rows in ([votes, votes], [votes, early], [early, whole(n_token)], [last(n_token, 64), votes]):
            for params in ({}, {"share_heads": 1}, {"softcap": 2.0}, {"kernel_size": 7}, {"kernel_size": 101}):
                exact = attend(keys, queries, of_rows, valid, verb=reference.score, **params)
                assert agree(attend(keys, queries, of_rows, valid, **params), exact, n_dim * dtype.itemsize), (
                    n_token,
                    params,
                )


@pytest.mark.parametrize("n_dim", [64, 128])
def test_logits_may_have_any_sign_and_the_denominators_may_be_given(n_dim):
    n = 3000
    keys, queries = tensors(1, 2, 4, n, n_dim)
    numbers = torch.randn(1, 8, n, device="cuda") + 9
    numbers[:, ::3, n - 40 :: 7] = math.inf
    for votes in (last(n, 1), observed(n, 3, 3), last(n, 64), observed(n, 64, 4)):
        for settings in ({"scaling": -0.1}, {"scaling": 0.0}, {"lse": numbers, "scaling": 0.09}):
            both = [
                verb("attention", keys, queries=queries, votes=pack((tuple(votes),)), **settings)
                for verb in (ops.score, reference.score)
            ]
            assert agree(*both), settings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_wherever_it_stands(dtype):
    """Rows of one engine each, and of all other lengths of votes, in a batch."""
    n = 4000
    keys, queries = tensors(6, 2, 4, n, 128, dtype)
    votes = [last(n), last(n, 1), whole(n), observed(n, 64, 5), observed(n, 40, 40), two_intervals(n)]
    valid = [(0, n), (0, n), (100, n), (333, n), (129, n - 65), (0, n)]
    together = attend(keys, queries, votes, valid)
    assert agree(together, attend(keys, queries, votes, valid, verb=reference.score))
    for b in range(6):
        alone = attend(keys[b : b + 1], queries[b : b + 1], votes[b : b + 1], valid[b : b + 1])
        assert torch.equal(alone, together[b : b + 1]), b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_broken_key_is_nan_where_a_voter_sees_it(number, dtype):
    n = 2048
    keys, queries = tensors(1, 2, 4, n, 128, dtype)
    keys[:, 0, 1500] = number
    for votes in (last(n), last(n, 1), observed(n, 60, 3), observed(n, 3, 3)):
        ours, exact = (attend(keys, queries, [votes], verb=verb) for verb in (ops.score, reference.score))
        assert torch.equal(ours.isnan(), exact.isnan())
        assert agree(ours.nan_to_num(0), exact.nan_to_num(0))


@pytest.mark.parametrize("n_token, n_head, w", [(1280, 8, 64), (4096, 7, 64), (900, 3, 16), (4096, 8, 1)])
def test_the_same_bits_a_thousand_times(n_token, n_head, w):
    """Reads that race with the copy engine show in one of a thousand launches."""
    keys, queries = tensors(1, n_head, 4, n_token, 128)
    first = attend(keys, queries, [last(n_token, w)])
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (attend(keys, queries, [last(n_token, w)]) != first).any()
    assert int(differing) == 0


@pytest.mark.parametrize("number", [math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("n_dim", [64, 96, 128, 256])
def test_one_infinite_element_gives_a_logit_as_infinite_as_its_product(n_dim, number):
    """Tensor cores take float32 in two parts, and what the first part leaves of infinity is no number. Minus infinity
    is the logit of a key that gets nothing, and the others share what there is."""
    n = 1500
    keys, queries = tensors(1, 2, 4, n, n_dim, torch.float32)
    keys[:, :, 700, 5] = number
    queries[..., 5] = -queries[..., 5].abs() * math.copysign(1, number)
    for votes in (last(n), last(n, 1), whole(n)):
        ours, exact = (attend(keys, queries, [votes], verb=verb) for verb in (ops.score, reference.score))
        assert not exact.isnan().any() and (exact[..., 700] == 0).all()
        assert agree(ours, exact)


@pytest.mark.parametrize("n_dim", [40, 64, 100, 128, 160, 256, 288])
def test_keys_times_a_power_of_two_and_queries_by_it_leave_every_bit(n_dim):
    n = 1500
    keys, queries = tensors(1, 2, 4, n, n_dim, torch.float32)
    for votes in (last(n), last(n, 1), whole(n), observed(n, 60, 3)):
        plain = attend(keys, queries, [votes])
        for power in (-100, -50, 50, 100):
            assert torch.equal(attend(keys * 2.0**power, queries * 2.0**-power, [votes]), plain), power
