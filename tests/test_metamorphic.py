"""What a verb's answer may not depend on, for any numbers: laws that need no reference, on each instruction set and on
a GPU."""

import numpy as np
import pytest
import torch
from test_ops import DTYPES, every_isa, on_every_device  # noqa: F401  (a fixture)

from kvpitfalls import ops
from kvpitfalls.policies import Inputs, Vote

N_ROW, N_HEAD, GROUP, N_TOKEN = 3, 4, 2, 290
VOTES = {
    "whole": [Vote((0, N_TOKEN), (0, N_TOKEN), weight="age", age_end=N_TOKEN)],
    "fair": [Vote((a, b), (a, b), weight="age", age_end=b) for a, b in ((0, 70), (70, 201), (201, N_TOKEN))],
    "window": [Vote((0, N_TOKEN - 32), (N_TOKEN - 32, N_TOKEN), window=(N_TOKEN - 32, N_TOKEN))],
    "last": [Vote((0, N_TOKEN - 1), (N_TOKEN - 1, N_TOKEN), window=(N_TOKEN - 1, N_TOKEN))],
    "two ranges": [
        Vote((0, 100), (0, 100), (250, N_TOKEN), weight="age", age_end=100),
        Vote((100, N_TOKEN), (100, N_TOKEN)),
    ],
    "most": [Vote((0, 100), (130, N_TOKEN), weight="max"), Vote((100, 130), (130, 160), weight="max")],
}
of_each_kind = pytest.mark.parametrize("kind", VOTES)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(device, dtype, seed=0):
    """Keys and queries of a layer; no element is so small that a half of it would be rounded, in float16 either."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(N_ROW, N_HEAD, N_TOKEN, 64, generator=generator)
    queries = (512 * torch.randn(N_ROW, N_HEAD * GROUP, N_TOKEN, 64, generator=generator)).round() / 256
    return keys.to(device, dtype), queries.to(device, dtype)


def attend(keys, queries, votes, valid=None, scaling=0.125, **params):
    """Scores by attention; the same votes for all rows, or a list for each."""
    of_rows = votes if isinstance(votes[0], list) else [votes] * len(keys)
    valid = valid or [(0, keys.shape[2])] * len(keys)
    inputs = Inputs(keys, queries, scaling=scaling, valid=valid, segments=[], spans=[])
    return inputs.attend(of_rows, **params)


def order(n, device, seed=1):
    """Whole numbers below n, shuffled."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


@on_every_device
@of_each_dtype
@of_each_kind
def test_heads_in_another_order_have_their_own_scores(kind, dtype, device, every_isa):  # noqa: F811
    keys, queries = draw(device, dtype)
    heads = order(N_HEAD, device)
    of_queries = (heads[:, None] * GROUP + torch.arange(GROUP, device=device)).flatten()
    for isa in every_isa(device):
        there = attend(keys, queries, VOTES[kind], kernel_size=5)
        assert torch.equal(
            attend(keys[:, heads], queries[:, of_queries], VOTES[kind], kernel_size=5), there[:, heads]
        ), isa
        norms = ops.score("norm", keys)
        assert torch.equal(ops.score("norm", keys[:, heads]), norms[:, heads]), isa


@on_every_device
@of_each_dtype
def test_rows_in_another_order_or_alone_have_their_own_scores(dtype, device, every_isa):  # noqa: F811
    """Each with votes and padding of its own."""
    keys, queries = draw(device, dtype)
    votes, valid = (
        [VOTES[kind] for kind in ("whole", "window", "fair" if device == "cuda" else "most")],
        [(0, N_TOKEN), (17, N_TOKEN), (3, N_TOKEN - 60)],
    )
    rows = order(N_ROW, device)
    for isa in every_isa(device):
        there = attend(keys, queries, votes, valid)
        moved = attend(keys[rows], queries[rows], [votes[b] for b in rows.tolist()], [valid[b] for b in rows.tolist()])
        assert torch.equal(moved, there[rows]), isa
        for b in range(N_ROW):
            assert torch.equal(attend(keys[b : b + 1], queries[b : b + 1], [votes[b]], [valid[b]])[0], there[b]), (
                isa,
                b,
            )


@on_every_device
@of_each_dtype
@of_each_kind
def test_keys_doubled_and_queries_halved_are_the_same(kind, dtype, device, every_isa):  # noqa: F811
    """A power of two is exact in every format, so that not a bit may change."""
    keys, queries = draw(device, dtype)
    for isa in every_isa(device):
        there = attend(keys, queries, VOTES[kind])
        assert torch.equal(attend(2 * keys, queries / 2, VOTES[kind]), there), isa
        assert torch.equal(attend(keys, 4 * queries, VOTES[kind], scaling=0.125 / 4), there), isa


@on_every_device
@of_each_dtype
def test_tokens_in_another_order_have_their_own_norms(dtype, device, every_isa):  # noqa: F811
    keys, _ = draw(device, dtype)
    tokens = order(N_TOKEN, device)
    for isa in every_isa(device):
        assert torch.equal(ops.score("norm", keys[:, :, tokens]), ops.score("norm", keys)[:, :, tokens]), isa


@of_each_dtype
def test_a_range_of_keydiff_is_judged_by_its_directions_alone(dtype, every_isa):  # noqa: F811
    """Not a bit depends on other heads, rows, ranges or padding, on lengths, or on the number of threads."""
    keys, _ = draw("cpu", dtype)
    ranges = [[0, 70, *[0] * 8], [70, 201, *[0] * 8], [201, N_TOKEN, *[0] * 8]]
    heads, rows, before = order(N_HEAD, "cpu"), order(N_ROW, "cpu"), torch.get_num_threads()

    def judge(keys, ranges, **given):
        return ops.score("keydiff", keys, votes=np.array([ranges] * len(keys)), **given)

    for isa in every_isa("cpu"):
        whole = judge(keys, ranges)
        assert torch.equal(judge(keys[rows][:, heads], ranges[::-1]), whole[rows][:, heads]), isa
        lengths = 2.0 ** torch.randint(0, 7, keys.shape[:3], generator=torch.Generator().manual_seed(2))
        assert torch.equal(judge((keys * lengths[..., None]).to(dtype), ranges), whole), isa
        for begin, end in ((0, 70), (70, 201)):
            alone = judge(keys[1:2, :, begin:end], [[0, end - begin, *[0] * 8]])
            assert torch.equal(alone[0], whole[1, :, begin:end]), isa
            padded = judge(keys, [[0, N_TOKEN, *[0] * 8]], valid=np.array([[begin, end]] * N_ROW))
            assert torch.equal(padded[..., begin:end], whole[..., begin:end]), isa
        for n_thread in (1, 3):
            torch.set_num_threads(n_thread)
            assert torch.equal(judge(keys, ranges), whole), (isa, n_thread)
        torch.set_num_threads(before)


@on_every_device
@of_each_dtype
@of_each_kind
@pytest.mark.parametrize("before, behind", [(1, 0), (0, 13), (37, 300)])
def test_padding_changes_no_score(kind, before, behind, dtype, device, every_isa):  # noqa: F811
    """Not of numbers, infinities or NaN, and not by a bit on a CPU; a padded token itself is last."""
    keys, queries = draw(device, dtype)
    n = before + N_TOKEN + behind
    padded = [torch.full((*x.shape[:2], n, 64), float("nan"), dtype=dtype, device=device) for x in (keys, queries)]
    for wide, x in zip(padded, (keys, queries), strict=True):
        wide[:, :, before : before + N_TOKEN] = x
    moved = [
        Vote(
            *[(a + before, b + before) for a, b in vote[:3]],
            vote.weight,
            vote.age_end + before,
            tuple(x + before for x in vote.window),
        )
        for vote in VOTES[kind]
    ]
    valid = [(before, before + N_TOKEN)] * N_ROW
    for isa in every_isa(device):
        wide = attend(*padded, moved, valid)
        own, alone = wide[:, :, before : before + N_TOKEN], attend(keys, queries, VOTES[kind])
        if (
            device == "cuda" and before % 16
        ):  # its tiles of 16 voters begin elsewhere: float32 sums are rounded in another order
            torch.testing.assert_close(own, alone, rtol=1e-6, atol=0, msg=isa)
        else:
            assert torch.equal(own, alone), isa
        assert (wide[:, :, :before] == -torch.inf).all() and (wide[:, :, before + N_TOKEN :] == -torch.inf).all()


@on_every_device
@of_each_dtype
def test_each_voter_gives_one_vote(dtype, device, every_isa):  # noqa: F811
    """A softmax sums to one; so do two halves of the voters, judged by two calls."""
    keys, queries = draw(device, dtype)
    for isa in every_isa(device):
        whole, early, late = (
            attend(keys, queries, [Vote((0, N_TOKEN), voters, weight="sum")])
            for voters in ((0, N_TOKEN), (0, 111), (111, N_TOKEN))
        )
        torch.testing.assert_close(
            whole.double().sum(-1), torch.full_like(whole[..., 0], N_TOKEN, dtype=torch.float64), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(early + late, whole, rtol=1e-5, atol=1e-7, msg=isa)


@on_every_device
@of_each_dtype
def test_the_most_by_all_voters_is_the_most_by_some_and_by_the_others(dtype, device, every_isa):  # noqa: F811
    """Judged by two calls; by one head of each group, and by the others."""
    keys, queries = draw(device, dtype)
    for isa in every_isa(device):
        whole, early, late = (
            attend(keys, queries, [Vote((0, N_TOKEN), voters, weight="max")])
            for voters in ((0, N_TOKEN), (0, 111), (111, N_TOKEN))
        )
        assert (whole > 0).all() and (whole <= 1 + 1e-6).all(), isa
        torch.testing.assert_close(early.maximum(late), whole, rtol=1e-5, atol=1e-7, msg=isa)
        votes = [Vote((0, N_TOKEN), (0, N_TOKEN), weight="max")]
        one, other = (attend(keys, queries[:, i::GROUP], votes) for i in range(GROUP))
        torch.testing.assert_close(one.maximum(other), whole, rtol=1e-5, atol=1e-7, msg=isa)


@on_every_device
def test_a_larger_quota_keeps_what_a_smaller_one_does(device, every_isa):  # noqa: F811
    """Whatever the scores: equal ones, infinities and NaN among them. And a rising map of the scores changes
    nothing."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(-9, 9, (N_ROW, N_HEAD, N_TOKEN), generator=generator).float()
    scores[0, :, ::7], scores[1, :, ::11], scores[2, :, ::13] = np.nan, np.inf, -np.inf
    scores = scores.to(device)
    edges = np.array([0, 40, 41, 200, N_TOKEN], np.int32)
    for isa in every_isa(device):
        smaller = None
        for quota in (0, 1, 5, 30, 159, N_TOKEN):
            quotas = np.full(4, quota, np.int32)
            positions = ops.select(scores, quotas, segments=edges)[0] if quota else None
            kept = (
                [set(row.tolist()) - {-1} for row in positions.flatten(0, 1)] if quota else [set()] * (N_ROW * N_HEAD)
            )
            assert smaller is None or all(a <= b for a, b in zip(smaller, kept, strict=True)), (isa, quota)
            if quota:
                assert torch.equal(ops.select(4 * scores + 3, quotas, segments=edges)[0], positions), (isa, quota)
            smaller = kept
        assert all(len(row) == N_TOKEN for row in smaller)


@on_every_device
@of_each_dtype
def test_gathering_twice_is_gathering_once(dtype, device, every_isa):  # noqa: F811
    keys, queries = draw(device, dtype)
    first = torch.arange(0, N_TOKEN, 2, dtype=torch.int32, device=device).expand(N_ROW, N_HEAD, -1).contiguous()
    second = (
        torch.arange(0, first.shape[-1], 3, dtype=torch.int32, device=device).expand(N_ROW, N_HEAD, -1).contiguous()
    )
    for isa in every_isa(device):
        once = ops.gather(keys, queries[:, ::GROUP], first[..., ::3].contiguous())
        twice = ops.gather(*ops.gather(keys, queries[:, ::GROUP], first), second)
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True)), isa
