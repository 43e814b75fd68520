"""A press on a GPU keeps, to the bit, what its score, select and gather keep there, by whatever kernels.

Few short rows are selected and copied by one kernel, others by two: the shapes drawn here are on both sides of that.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvpitfalls import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ["normal", "ties", "zeros", "broken", "ascending"]
LAYOUTS = ["of a model", "by heads", "apart", "narrow", "broadcast"]


def rows(kind, shape, dtype, layout, seed):
    """Keys or values (B,H,T,D) on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    n_row, n_head, n_token, n_dim = shape
    x = torch.randn(n_row, n_token, n_head, n_dim, device="cuda", generator=generator)
    if kind == "ties":
        x = x.round().clamp(-1, 1) * (torch.arange(n_dim, device="cuda") < 4)
    elif kind == "zeros":
        x = x * 0
    elif kind == "broken":
        numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 1e-40], device="cuda")
        where = torch.rand(x.shape[:3], device="cuda", generator=generator)
        x[..., 0] = torch.where(where < 0.3, numbers[(where * 1000).long() % 5], x[..., 0])
    elif kind == "ascending":  # all that is kept stands at one end
        x = x.sign() * (1 + torch.arange(n_token, device="cuda")[:, None, None]) / 64
    x = x.to(dtype).transpose(1, 2)
    if layout == "by heads":
        return x.contiguous()
    if layout == "apart":  # rows with gaps between them, on boundaries of 16 bytes
        wide = torch.empty(n_row, n_head, n_token + 1, n_dim + 24, device="cuda", dtype=dtype)
        wide[:, :, 1:, 16:-8] = x
        return wide[:, :, 1:, 16:-8]
    if layout == "narrow":
        wide = torch.empty(n_row, n_head, n_token, 2 * n_dim, device="cuda", dtype=dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x[:, :1].expand_as(x) if layout == "broadcast" else x


def tables(rng, n_row, n_head, n_token, n_segment):
    """Segments, quotas of each head, valid ranges, protected tokens; some of them not given."""
    edges = np.sort(rng.integers(0, n_token + 1, (n_row, n_segment + 1)), -1).astype(np.int32)
    if rng.random() < 0.7:
        edges[:, 0], edges[:, -1] = 0, n_token
    most = rng.choice([1, n_token // n_segment + 2])
    quotas = rng.integers(0, most + 1, (n_row, n_head, n_segment)).astype(np.int32)
    begin = rng.integers(0, n_token, n_row)
    valid = np.stack([begin, rng.integers(begin, n_token + 1)], -1).astype(np.int32) if rng.random() < 0.5 else None
    protect = torch.from_numpy((rng.random((n_row, n_token)) < 0.2).astype(np.uint8)).cuda()
    return edges, quotas, valid, protect if rng.random() < 0.5 else None


def check(scorer, keys, values, edges, quotas, valid, protect, params=None):
    n_kept = max(1, int(quotas.sum(-1).max()))
    params = params or {}
    pressed = ops.press_checked(scorer, keys, values, None, None, valid, None, edges, quotas, protect, n_kept, params)
    scores = ops.score(scorer, keys, valid=valid, **params)
    positions, _ = ops.select_checked(scores, edges, quotas, protect, valid, n_kept)
    for name, ours, theirs in zip(
        ("positions", "keys", "values"), pressed, (positions, *ops.gather(keys, values, positions)), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), name
    of_cpu, _ = ops.select_checked(
        scores.cpu(), edges, quotas, None if protect is None else protect.cpu(), valid, n_kept
    )
    assert torch.equal(pressed[0].cpu(), of_cpu)
    return pressed


lengths = st.one_of(
    st.integers(1, 300),
    st.sampled_from([1023, 1024, 1025, 4080, 4095, 4096, 4097, 7168, 8191, 8192, 8193, 9000]),
    st.integers(300, 8192),
)


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(
    scorer=st.sampled_from(["norm", "norm", "norm", "position", "random"]),
    n_row=st.integers(1, 3),
    n_head=st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 40, 70]),
    n_token=lengths,
    n_dim=st.sampled_from([8, 64, 72, 80, 96, 128, 192, 256, 40, 7]),
    n_value_dim=st.sampled_from([None, None, 64, 128, 24]),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from([*LAYOUTS, "of a model"]),
    n_segment=st.sampled_from([1, 1, 1, 2, 5, 60]),
    seed=st.integers(0, 10**6),
)
@example("norm", 1, 8, 4096, 128, None, "bfloat16", "normal", "of a model", 1, 0)
@example("norm", 1, 8, 8192, 128, None, "float32", "ties", "of a model", 1, 1)
@example("norm", 1, 2, 7168, 256, None, "float32", "ascending", "of a model", 3, 2)
@example("position", 1, 8, 4096, 128, None, "bfloat16", "normal", "of a model", 1, 3)
def test_a_press_keeps_what_its_parts_keep(
    scorer, n_row, n_head, n_token, n_dim, n_value_dim, dtype, kind, layout, n_segment, seed
):
    n_head = min(n_head, max(1, 300_000 // n_token))
    keys = rows(kind, (n_row, n_head, n_token, n_dim), DTYPES[dtype], layout, seed)
    values = rows("normal", (n_row, n_head, n_token, n_value_dim or n_dim), DTYPES[dtype], layout, seed + 1)
    check(scorer, keys, values, *tables(np.random.default_rng(seed), n_row, n_head, n_token, n_segment))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_token", [1, 5, 64, 1000, 4096, 6000, 8192])
def test_a_press_keeps_what_a_cpu_keeps(n_token, dtype):
    """Sums of whole numbers are exact, so that norms are the same bits on both."""
    keys = rows("ties", (2, 4, n_token, 128), dtype, "of a model", n_token)
    values = rows("normal", (2, 4, n_token, 128), dtype, "of a model", 1)
    for quota in sorted({1, n_token // 3 + 1, n_token}):
        edges, quotas = np.array([[0, n_token]] * 2, np.int32), np.full((2, 4, 1), quota, np.int32)
        case = None, None, None, None, edges, quotas, None, quota, {}
        on_gpu = ops.press_checked("norm", keys, values, *case)
        on_cpu = ops.press_checked("norm", keys.cpu(), values.cpu(), *case)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))


@pytest.mark.parametrize("scorer", ["norm", "position"])
def test_a_captured_press_replays_with_new_keys(scorer):
    keys, values = (rows("normal", (1, 8, 4096, 128), torch.bfloat16, "of a model", seed) for seed in (0, 1))
    edges, quotas = np.array([[0, 4096]], np.int32), np.full((1, 8, 1), 2048, np.int32)
    case = None, None, None, None, edges, quotas, None, 2048, {}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [ops.press_checked(scorer, keys, values, *case) for _ in range(3)]
    for seed in (2, 3):
        keys.copy_(rows("normal", keys.shape, keys.dtype, "of a model", seed))
        graph.replay()
        expected = check(scorer, keys, values, edges, quotas, None, None)
        for each in out:
            assert all(torch.equal(a, b) for a, b in zip(each, expected, strict=True))


def test_presses_of_many_rows_and_the_same_bits_many_times():
    """Batches on both sides of what one kernel takes; a row's bits do not depend on its neighbours."""
    for n_row in (1, 2, 3, 4, 5, 9, 17, 20):
        keys, values = (rows("normal", (n_row, 8, 3000, 128), torch.bfloat16, "of a model", seed) for seed in (0, 1))
        edges, quotas = np.array([[0, 3000]] * n_row, np.int32), np.full((n_row, 8, 1), 1500, np.int32)
        whole = check("norm", keys, values, edges, quotas, None, None)
        alone = check("norm", keys[-1:], values[-1:], edges[:1], quotas[:1], None, None)
        assert all(torch.equal(a[-1:], b) for a, b in zip(whole, alone, strict=True))
    case = None, None, None, None, edges[:1], quotas[:1], None, 1500, {}
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = ops.press_checked("norm", keys[-1:], values[-1:], *case)
        differing += sum((a != b).any().long() for a, b in zip(again, alone, strict=True))
    assert int(differing) == 0
