"""What only a GPU shows: every engine of the kernels against float64, exact selection at length, streams, graphs, and
the same bits.

Needs a CUDA GPU; the bodies of test_ops.py run there too.
"""

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from kvpitfalls import keep, ops, reference
from kvpitfalls.policies import Inputs, Vote
from kvpitfalls.policies.votes import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GENERATOR = 2510


def tensors(n_row, n_head, group, n_token, n_dim, dtype=torch.bfloat16, n_query=None, scale=1.0):
    """Keys and queries laid out as in a model, (B,T,H,D) transposed."""
    generator = torch.Generator("cuda").manual_seed(GENERATOR + n_token)
    keys = torch.randn(n_row, n_token, n_head, n_dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
    queries = scale * torch.randn(n_row, n_query or n_token, n_head * group, n_dim, device="cuda", generator=generator)
    return keys, queries.to(dtype).transpose(1, 2)


def attend(keys, queries, votes, valid=None, verb=ops.score, **params):
    n_token = keys.shape[2]
    inputs = Inputs(keys, queries, valid=valid or [(0, n_token)] * len(keys), segments=[], spans=[])
    packed = pack(tuple(map(tuple, votes)))
    return verb(
        "attention", keys, queries=queries, votes=packed, valid=inputs.valid_array, scaling=inputs.scaling, **params
    )


def error(ours, exact):
    """Relative 2-norm over the scores that are finite in the reference; the others must be equal."""
    finite = exact.isfinite()
    assert torch.equal(ours[~finite], exact[~finite])
    ours, exact = ours[finite].double(), exact[finite].double()
    return float((ours - exact).norm() / exact.norm())


def whole(n):
    return [Vote((0, n), (0, n), weight="age", age_end=n)]


def fair(n, *cuts):
    edges = [0, *cuts, n]
    return [Vote((a, b), (a, b), weight="age", age_end=b) for a, b in pairwise(edges)]


def two_intervals(n):
    """As under fair="paper": the earlier span's keys are not judged by the later one, but by what follows it."""
    a, b, c = n // 5, n // 2, n - n // 7
    own = Vote((a, b), (a, b), (c, n), weight="age", age_end=b)
    return [Vote((0, a), (0, n), weight="age", age_end=n), own, Vote((b, n), (b, n), weight="age", age_end=n)]


def window(n, w=64):
    return [Vote((0, n - w), (n - w, n), window=(n - w, n))]


# The kernels' edges: tiles of 64, 128 and 192, splits of 1024, and 1024 voters for Hopper's engine.
LENGTHS = [1, 2, 63, 64, 65, 127, 129, 191, 193, 333, 1023, 1024, 1025, 1153, 2500]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_dim", [64, 80, 96, 128, 256, 320, 512])
def test_errors_against_float64(n_dim, dtype):
    for n_token in LENGTHS:
        for group, n_head in ((4, 2), (1, 3), (7, 1)):
            keys, queries = tensors(2, n_head, group, n_token, n_dim, dtype)
            votes = {"whole": whole(n_token)}
            if n_token > 10:
                votes |= {
                    "fair": fair(n_token, n_token // 3, n_token // 2),
                    "two": two_intervals(n_token),
                    "last": window(n_token, 1),
                }
            for name, of_row in votes.items():
                exact = attend(keys, queries, [of_row] * 2, verb=reference.score)
                assert error(attend(keys, queries, [of_row] * 2), exact) <= 2e-6, (n_token, group, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_dim", [1, 7, 40, 64, 80, 96, 128, 192, 256, 512, 576])
def test_keydiff_against_float64(n_dim, dtype):
    """Keys of any length, of none, and under no vote; rows of a batch that differ in all of that."""
    for n_token in (1, 2, 3, 5, 255, 257, 1024, 2500, 40000):
        keys, _ = tensors(2, 3, 1, n_token, n_dim, dtype)
        keys[0, :, n_token // 2] = 0
        if dtype != torch.float16:
            keys[1, :, n_token // 3] *= 1e30
            keys[1, :, n_token // 4] *= 1e-38
        cut, late = n_token // 3, n_token - n_token // 5
        ranges = [[(0, cut), (cut, late), (late, n_token)], [(0, n_token), (0, 0), (0, 0)]]
        votes = np.array([[[*range_, *[0] * 8] for range_ in of_row] for of_row in ranges])
        for valid in (None, [(0, n_token), (n_token // 10, n_token - n_token // 20)]):
            ours = ops.score("keydiff", keys, votes=votes, valid=valid)
            exact = reference.score("keydiff", keys, votes=votes, valid=valid)
            finite = exact.isfinite()
            assert torch.equal(ours[~finite], exact[~finite])
            assert ((ours - exact)[finite].abs() <= 2e-6).all(), (n_token, valid)
            for b in range(2):
                of_one = None if valid is None else valid[b : b + 1]
                alone = ops.score("keydiff", keys[b : b + 1], votes=votes[b : b + 1], valid=of_one)
                assert torch.equal(alone, ours[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_dim", [8, 64, 80, 128, 256, 512])
def test_keydiff_has_the_same_bits_whatever_is_in_the_batch(n_dim, dtype):
    """Heads and rows in another order or alone, and votes for no key: of all these blocks read other runs of pieces."""
    for n_token in (3, 255, 257, 2500, 4096, 8192, 8193, 33000):
        keys, _ = tensors(3, 5, 1, n_token, n_dim, dtype)
        keys = keys + (torch.arange(3, device="cuda")[:, None, None, None] / 4).to(dtype)  # means that are none's noise
        votes = np.zeros((3, 1, 10), np.int32)
        votes[:, 0, 1] = n_token
        scores = ops.score("keydiff", keys, votes=votes)
        assert torch.equal(ops.score("keydiff", keys, votes=votes), scores)
        rows, heads = [2, 0, 1], [3, 1, 4, 0, 2]
        assert torch.equal(ops.score("keydiff", keys[rows][:, heads], votes=votes), scores[rows][:, heads])
        assert torch.equal(ops.score("keydiff", keys[1:2, 3:4], votes=votes[:1]), scores[1:2, 3:4])
        empty = np.concatenate([votes, np.zeros((3, 2, 10), np.int32)], 1)
        assert torch.equal(ops.score("keydiff", keys, votes=empty), scores), n_token


def test_keydiff_of_broken_keys_and_of_strides():
    """A key that is no number breaks its own range alone; strides change nothing."""
    keys, _ = tensors(1, 2, 1, 600, 72)
    votes = np.array([[[0, 300, *[0] * 8], [300, 600, *[0] * 8]]])
    plain = ops.score("keydiff", keys, votes=votes)
    apart = torch.empty(1, 2, 600, 145, device="cuda", dtype=keys.dtype)[..., 1::2]
    apart.copy_(keys)
    torch.testing.assert_close(ops.score("keydiff", apart, votes=votes), plain, rtol=0, atol=2e-6)
    for number in (torch.nan, torch.inf, -torch.inf):
        broken = keys.clone()
        broken[0, 0, 7, 3] = number
        scores = ops.score("keydiff", broken, votes=votes)
        assert scores[0, 0, :300].isnan().all() and torch.equal(scores[0, 0, 300:], plain[0, 0, 300:])
        assert torch.equal(scores[0, 1], plain[0, 1])


@pytest.mark.parametrize("n_dim", [64, 128])
def test_windows_pooling_and_shared_heads(n_dim):
    for n_token, w in ((100, 16), (1500, 64), (5000, 64), (5000, 1), (5001, 100)):
        keys, queries = tensors(2, 2, 4, n_token, n_dim, n_query=max(w, 70))
        for params in (
            {},
            {"kernel_size": 5},
            {"share_heads": 1},
            {"kernel_size": 7, "share_heads": 1},
            {"softcap": 2.0},
            {"kernel_size": 101},
        ):
            exact = attend(keys, queries, [window(n_token, w)] * 2, verb=reference.score, **params)
            assert error(attend(keys, queries, [window(n_token, w)] * 2, **params), exact) <= 2e-6, (n_token, w, params)


def test_rows_of_a_batch_may_differ_in_everything():
    n = 3000
    keys, queries = tensors(4, 2, 4, n, 128)
    votes, valid = (
        [whole(n), fair(n, 700, 1900), window(n), two_intervals(n)],
        [(0, n), (333, n), (129, n - 65), (0, n)],
    )
    together = attend(keys, queries, votes, valid)
    assert error(together, attend(keys, queries, votes, valid, verb=reference.score)) <= 2e-6
    for b in range(4):
        alone = attend(keys[b : b + 1], queries[b : b + 1], votes[b : b + 1], valid[b : b + 1])
        assert torch.equal(alone, together[b : b + 1])


def test_large_logits_lse_given_and_fewer_queries():
    n = 2048
    keys, queries = tensors(1, 8, 4, n, 128, scale=6.0)
    exact = attend(keys, queries, [whole(n)], verb=reference.score)
    assert (
        error(attend(keys, queries, [whole(n)]), exact) <= 4e-6
    )  # logits up to 300: 2^-24 of those is the argument's own rounding
    keys, queries = tensors(1, 8, 4, n, 128)
    wide = keys.double().repeat_interleave(4, 1)
    hidden = torch.ones(n, n, dtype=torch.bool, device="cuda").triu(1)
    lse = (128**-0.5 * queries.double() @ wide.transpose(-1, -2)).masked_fill(hidden, -math.inf).logsumexp(-1).float()
    lse[:, :, 1500] = math.inf
    exact = attend(keys, queries, [whole(n)], verb=reference.score, lse=lse)
    assert error(attend(keys, queries, [whole(n)], lse=lse), exact) <= 2e-6
    late = [Vote((0, n - 1200), (n - 1200, n))]
    few = queries[:, :, -1300:]
    assert error(attend(keys, few, [late]), attend(keys, few, [late], verb=reference.score)) <= 2e-6


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "n_dim, dtype", [(80, torch.float32), (256, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)]
)
def test_a_query_that_casts_no_vote_has_no_say_on_broken_keys_either(n_dim, dtype, number):
    """By each engine: a key that is no number is NaN only where a query that votes sees it."""
    n = 2048
    keys, queries = tensors(1, 2, 4, n, n_dim, dtype)
    keys[:, :, [300, 1700]] = number
    lse = torch.full((1, 8, n), 9.0, device="cuda")
    lse[:, :, 1600:] = lse[:, :, 200:900:7] = math.inf
    lse[:, 4:, :1650] = -math.inf
    for votes in (whole(n), fair(n, 500, 1200), window(n)):
        ours, exact = (attend(keys, queries, [votes], lse=lse, verb=verb) for verb in (ops.score, reference.score))
        assert torch.equal(ours.isnan(), exact.isnan()) and (votes[0].window != (0, 0) or ours[0, 0, 1000].isfinite())
        assert error(ours.nan_to_num(0), exact.nan_to_num(0)) <= 2e-6


REWRITES = """
import sys, threading, time

sys.setswitchinterval(1e-5)
import numpy as np
import torch
from kvpitfalls import ops

T = 4096
keys, queries = (torch.randn(1, 8, n, 64, device="cuda") for n in (T, 64))
votes = np.array([[[0, T - 64, T - 64, T, 0, 0, 1, 0, 0, 0]]], np.int32)
segments, quotas = np.array([[0, T]], np.int32), np.full((1, 8, 1), 64, np.int32)
scores = keys[..., 0].contiguous()
table, place, call = {
    "votes": (votes, 1, lambda: ops.score("attention", keys, queries=queries, votes=votes, scaling=1.0)),
    "segments": (segments, 1, lambda: ops.select(scores, quotas, segments=segments)[0]),
}[sys.argv[1]]
right, flat, stop = call().cpu(), table.reshape(-1), time.monotonic() + 5

def rewrite():
    good = int(flat[place])
    while time.monotonic() < stop:
        flat[place] = 1 << 30
        flat[place] = good

threading.Thread(target=rewrite, daemon=True).start()
n = {True: 0, False: 0}
while time.monotonic() < stop:
    try:
        n[torch.equal(call().cpu(), right)] += 1
    except ValueError:
        pass
print(n[True], n[False])
"""


@pytest.mark.parametrize("name", ["votes", "segments"])
def test_a_thread_that_rewrites_a_table_changes_nothing(name):
    """What is checked is what is sent: a call is refused or right."""
    run = subprocess.run([sys.executable, "-c", REWRITES, name], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    right, wrong = map(int, run.stdout.split())
    assert right > 100 and wrong == 0


def test_many_votes_travel_by_the_workspace():
    n = 4000
    keys, queries = tensors(3, 2, 2, n, 64)
    of_row = fair(n, *range(40, n, 40))
    assert error(attend(keys, queries, [of_row] * 3), attend(keys, queries, [of_row] * 3, verb=reference.score)) <= 2e-6
    with pytest.raises(NotImplementedError, match="at most 4096"):
        attend(*tensors(1, 1, 1, 4097, 64), [[Vote((i, i + 1), (i, i + 1)) for i in range(4097)]])


def test_the_most_of_attention_is_of_all_votes_or_none():
    """A vote on no keys counts for neither."""
    most = [Vote((0, 40), (0, 40), weight="max")]
    keys, queries = tensors(2, 2, 2, 40, 64)
    with pytest.raises(
        NotImplementedError, match=r"^1 of 2 votes have weight 3 \(max\); on a CUDA device expected all "
    ):
        attend(keys, queries, [whole(40), most])
    nothing = Vote((7, 7), (0, 40))
    votes = [[nothing, *most], [*most, nothing]]
    assert error(attend(keys, queries, votes), attend(keys, queries, votes, verb=reference.score)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["snapkv", "tova", "h2o", "knorm", "streaming_llm"])
def test_400_sentences_of_5000_tokens(policy, dtype):
    """What `audit` meets without marking; with a gap before each, 801 segments. Positions are the CPU's, but where
    scores all but tie."""
    n, rng = 5000, np.random.default_rng(0)
    edges = np.sort(rng.choice(np.arange(1, n), 800, replace=False)).tolist()
    spans = {f"s{i}": pair for i, pair in enumerate(zip(edges[::2], edges[1::2], strict=True))}
    keys, queries = (x.to(dtype) for x in tensors(1, 2, 4, n, 128))
    settings = {"compression_ratio": 0.5, "spans": spans, "fair": True}
    gpu = keep(policy, keys, queries, **settings)
    cpu = keep(policy, keys.float().cpu(), queries.float().cpu(), **settings)
    assert gpu.quotas.shape[-1] == 801 and np.array_equal(gpu.quotas, cpu.quotas)
    same = [
        len(set(a.tolist()) & set(b.tolist())) for a, b in zip(gpu.positions[0].cpu(), cpu.positions[0], strict=True)
    ]
    assert min(same) >= 0.999 * 2500
    shares = [((gpu.positions >= a) & (gpu.positions < b)).sum(-1).cpu().numpy() / (b - a) for a, b in spans.values()]
    assert all((abs(share - 0.5) * (b - a) < 1).all() for share, (a, b) in zip(shares, spans.values(), strict=True))


@pytest.mark.parametrize("n_token", [1, 1000, 8192, 8193, 20_000, 131_072, 131_073, 300_000])
def test_selection_equals_the_cpu(n_token):
    rng = np.random.default_rng(n_token)
    for scores in (
        rng.standard_normal((2, 3, n_token)),
        rng.integers(0, 5, (2, 3, n_token)),
        np.zeros((2, 3, n_token)),
        rng.standard_cauchy((2, 3, n_token)) ** 9,
    ):
        scores = scores.astype(np.float32)
        scores[:, :, ::97] = np.nan
        for quota in {1, n_token // 2, n_token}:
            for protect in (None, rng.random(n_token) < 0.3):
                cpu = ops.select(scores, [quota], protect=protect)
                gpu = ops.select(torch.from_numpy(scores).cuda(), [quota], protect=protect)
                assert all(np.array_equal(a, b.cpu().numpy()) for a, b in zip(cpu, gpu, strict=True)), (
                    quota,
                    protect is None,
                )
        if n_token > 10:
            edges, quotas = [0, n_token // 7, n_token // 7, n_token // 2, n_token], [n_token // 20, 3, n_token, 5]
            case = {"segments": edges, "valid": [[3, n_token - 2], [0, n_token]]}
            cpu, gpu = ops.select(scores, quotas, **case), ops.select(torch.from_numpy(scores).cuda(), quotas, **case)
            assert all(np.array_equal(a, b.cpu().numpy()) for a, b in zip(cpu, gpu, strict=True))


@pytest.mark.parametrize("n_token", [8192, 8193, 131_073, 300_000])
def test_selection_of_scores_with_gaps_equals_the_cpu(n_token):
    """Every third number of longer rows, and rows one of a batch's: no load takes its neighbours along. Above 8192 a
    cluster reads them again for each digit."""
    rng = np.random.default_rng(n_token)
    for scores in (rng.standard_normal((2, 3, 3 * n_token)), rng.integers(0, 5, (2, 3, 3 * n_token))):
        apart = scores.astype(np.float32)[..., 1::3]
        apart[:, :, ::97] = np.nan
        gaps = torch.from_numpy(scores.astype(np.float32)).cuda()[..., 1::3]
        gaps.copy_(torch.from_numpy(np.ascontiguousarray(apart)))
        assert gaps.stride(2) == 3
        edges, quotas = [0, n_token // 7, n_token], [n_token // 20, n_token // 2]
        for case in ({}, {"protect": rng.random(n_token) < 0.3}, {"valid": [[3, n_token - 2], [0, n_token]]}):
            cpu, gpu = (ops.select(x, quotas, segments=edges, **case) for x in (np.ascontiguousarray(apart), gaps))
            assert all(np.array_equal(a, b.cpu().numpy()) for a, b in zip(cpu, gpu, strict=True)), case


def test_positions_out_of_range_give_zeros():
    keys, _ = tensors(1, 2, 1, 50, 64)
    positions = torch.tensor([[[0, 49, 50, 10**9, -7], [1, 2, 3, 4, -1]]], dtype=torch.int32, device="cuda")
    out, _ = ops.gather(keys, keys, positions)
    assert torch.equal(out[:, 0, :2], keys[:, 0, [0, 49]]) and (out[:, 0, 2:] == 0).all() and (out[:, 1, 4] == 0).all()


@pytest.mark.parametrize(
    ("n_token", "n_head", "n_repeat"), [(1280, 8, 3000), (1280, 7, 1500), (4096, 8, 1000), (1000, 8, 1000)]
)
def test_the_same_bits_thousands_of_times(n_token, n_head, n_repeat):
    """Reads that race with the copy engine show in one of a thousand launches, where a block takes a short unit and
    then another."""
    keys, queries = tensors(1, n_head, 4, n_token, 128)
    first = attend(keys, queries, [whole(n_token)])
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(n_repeat):
        differing += (attend(keys, queries, [whole(n_token)]) != first).any()
    assert int(differing) == 0


def test_work_waits_for_a_delayed_producer_on_a_side_stream():
    n = 4096
    keys, queries = tensors(1, 8, 4, n, 128)
    expected = keep("h2o", keys, queries, compression_ratio=0.5)
    stream, late_keys, late_queries = torch.cuda.Stream(), torch.zeros_like(keys), torch.zeros_like(queries)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late_keys.copy_(keys)
        late_queries.copy_(queries)
        kept = keep("h2o", late_keys, late_queries, compression_ratio=0.5)
        out = ops.gather(late_keys, late_keys, kept.positions)[0]
    stream.synchronize()
    assert torch.equal(kept.positions, expected.positions)
    assert torch.equal(out, ops.gather(keys, keys, expected.positions)[0])


@pytest.mark.parametrize("policy", ["knorm", "streaming_llm", "snapkv", "tova", "h2o"])
def test_a_captured_graph_replays_with_new_inputs(policy):
    n = 2000
    keys, queries = tensors(1, 2, 4, n, 128)
    spans = [(0, 600), (600, n)]

    def press():
        kept = keep(policy, keys, queries, compression_ratio=0.5, spans=spans, fair=True)
        return (kept.scores, kept.positions, *ops.gather(keys, keys, kept.positions))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        out = press()
    for _ in range(2):
        keys.copy_(torch.randn_like(keys, dtype=torch.float32))
        graph.replay()
        replayed = [x.clone() for x in out]
        for a, b in zip(replayed, press(), strict=True):
            assert torch.equal(a, b)


def test_memory_is_linear_in_the_length():
    """H2O at 32768 tokens: no 32768 x 32768 matrix, which would be 4 GB a head."""
    keys, queries = tensors(1, 8, 4, 32768, 128)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(keys, queries, [whole(32768)])
    assert torch.cuda.max_memory_allocated() - before < 16 << 20
