"""The three verbs against reference.py (float64): both array libraries, all dtypes, odd layouts, and the GPU where
there is one."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpitfalls import _core, ops, reference
from kvpitfalls.policies import Inputs, Vote

SHAPES = [(1, 1, 1, 2, 1), (2, 3, 3, 33, 64), (1, 2, 1, 65, 80), (3, 1, 7, 17, 16), (1, 4, 2, 128, 8)]  # B, H, G, T, D
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def every_isa():
    """Sets each instruction set that this CPU can run, one after the other; a GPU has none to choose."""
    before = _core.isa()

    def choose(device):
        for name in _core.isas() if device == "cpu" else ["cuda"]:
            try:
                if device == "cpu":
                    _core.isa_set(name)
            except ValueError:
                continue
            yield name

    yield choose
    _core.isa_set(before)


def tensors(shape, dtype, layout="contiguous", device="cpu"):
    n_row, n_head, group, n_token, n_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    keys = torch.randn(n_row, n_token, n_head, n_dim, generator=generator).to(device, dtype)
    queries = (2 * torch.randn(n_row, n_token, n_head * group, n_dim, generator=generator)).to(device, dtype)
    keys, queries = keys.transpose(1, 2), queries.transpose(1, 2)
    if layout == "contiguous":
        return keys.contiguous(), queries.contiguous()
    if layout == "sliced":  # a view into something longer, with a stride of 2 in D
        wide = torch.zeros(n_row, n_head, n_token + 3, 2 * n_dim, dtype=dtype, device=device)
        wide[:, :, 2:-1, ::2] = keys
        return wide[:, :, 2:-1, ::2], queries
    return keys, queries


def votes(n_token):
    half, window = n_token // 2, max(1, n_token // 4)
    return {
        "all, by age": [Vote((0, n_token), (0, n_token), weight="age", age_end=n_token)],
        "sum": [Vote((0, n_token), (0, n_token), weight="sum")],
        "window": [Vote((0, n_token - window), (n_token - window, n_token), window=(n_token - window, n_token))],
        "two spans": [
            Vote((0, half), (0, half), (n_token - 1, n_token), weight="age", age_end=half),
            Vote((half, n_token - 1), (n_token - 1, n_token), window=(n_token - 1, n_token)),
        ],
        "most": [
            Vote((0, half), (half, n_token), weight="max"),
            Vote((half, n_token), (half, n_token - window), (n_token - 1, n_token), weight="max"),
        ],
    }


def naive_attention(inputs, of_row, kernel_size, share_heads):
    """The same sums in the inputs' own low precision, as an eager implementation would do them: the yardstick of the
    tolerance."""
    keys, queries = inputs.keys.cpu(), inputs.queries.cpu()
    group, n_token = queries.shape[1] // keys.shape[1], keys.shape[2]
    logits = inputs.scaling * queries @ keys.repeat_interleave(group, 1).transpose(-1, -2)
    attention = logits.masked_fill(~torch.ones(n_token, n_token, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    out = torch.zeros(keys.shape[0], keys.shape[1], n_token, dtype=keys.dtype)
    for vote in of_row:
        voters = sorted({*range(*vote.queries), *range(*vote.more_queries)})
        is_most = vote.weight == "max"
        column = attention[:, :, voters].amax(2) if is_most else attention[:, :, voters].sum(2)
        heads = column.unsqueeze(1) if share_heads else column.unflatten(1, (-1, group))
        column = heads.amax(2) if is_most else heads.mean(2)
        key = torch.arange(n_token)
        divisor = {
            "sum": torch.ones(n_token),
            "max": torch.ones(n_token),
            "mean": torch.full((n_token,), len(voters)),
            "age": (vote.age_end - key).clamp(min=1),
        }[vote.weight]
        column = torch.where((key >= vote.keys[0]) & (key < vote.keys[1]), column / divisor.to(keys.dtype), 0)
        pooled = torch.nn.functional.avg_pool1d(column.float(), kernel_size, 1, kernel_size // 2).to(keys.dtype)
        out = torch.where((key >= vote.keys[0]) & (key < vote.keys[1]), pooled, out)
    return out


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_attention_scores(shape, dtype, layout, device):
    """At most twice the error of the same mathematics done naively in the low precision, against float64."""
    keys, queries = tensors(shape, dtype, layout, device)
    n_row, n_token = shape[0], shape[3]
    inputs = Inputs(keys, queries, valid=[(0, n_token)] * n_row, segments=[], spans=[])
    for name, of_row in votes(n_token).items():
        for kernel_size, share_heads in [(1, False), (5, False), (1, True)]:
            ours = inputs.attend([of_row] * n_row, kernel_size=kernel_size, share_heads=share_heads)
            assert ours.device == keys.device
            ours = ours.cpu()
            packed = np.stack(
                [
                    [
                        *v.keys,
                        *v.queries,
                        *v.more_queries,
                        {"sum": 0, "mean": 1, "age": 2, "max": 3}[v.weight],
                        v.age_end,
                        *v.window,
                    ]
                    for v in of_row
                ]
            )
            exact = reference.score(
                "attention",
                keys,
                queries=queries,
                votes=np.stack([packed] * n_row),
                scaling=inputs.scaling,
                kernel_size=kernel_size,
                share_heads=int(share_heads),
            ).cpu()
            window = sorted({t for vote in of_row for t in range(*vote.window)})
            free = [t for t in range(n_token) if t not in window]
            exact_free = exact[..., free].numpy()
            error = np.abs(ours[..., free].numpy() - exact_free).max(initial=0)
            naive = np.abs(
                naive_attention(inputs, of_row, kernel_size, share_heads)[..., free].float().numpy() - exact_free
            ).max(initial=0)
            assert error <= 2 * naive + 1e-6 * np.abs(exact_free).max(initial=0), (name, kernel_size, share_heads)
            assert torch.equal(ours[..., window], exact[..., window])


@on_every_device
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_valid_ranges_softcap_fewer_queries_and_given_lse(softcap, device):
    keys, queries = tensors((2, 2, 3, 20, 16), torch.float32, device=device)
    valid = np.array([[4, 20], [0, 20]])
    packed = np.array([[[0, 14, 14, 20, 0, 0, 1, 0, 14, 20]]] * 2)
    call = {"votes": packed, "valid": valid, "scaling": 0.25, "softcap": softcap, "kernel_size": 3}
    exact = reference.score("attention", keys, queries=queries, **call)
    torch.testing.assert_close(ops.score("attention", keys, queries=queries, **call), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        ops.score("attention", keys, queries=queries[:, :, -6:], **call), exact, rtol=1e-5, atol=1e-7
    )
    logits = 0.25 * queries @ keys.repeat_interleave(3, 1).transpose(-1, -2)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    hidden = ~torch.ones(20, 20, dtype=torch.bool, device=device).tril()[None].repeat(2, 1, 1)
    hidden[0, :, :4] = True
    lse = logits.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(
        ops.score("attention", keys, queries=queries, lse=lse, **call), exact, rtol=1e-5, atol=1e-7
    )
    lse[:, :, 15] = torch.inf  # a row without a denominator casts no vote
    without = ops.score("attention", keys, queries=queries, lse=lse, **call)
    torch.testing.assert_close(
        without, reference.score("attention", keys, queries=queries, lse=lse, **call), rtol=1e-5, atol=1e-7
    )
    assert not torch.allclose(without, exact)
    assert (exact[0, :, :4] == -torch.inf).all()


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", ["snapkv", "tova", "h2o"])
@pytest.mark.parametrize("fair", [False, True], ids=["plain", "fair"])
@pytest.mark.parametrize("n_token", [258, 530])
def test_moving_all_logits_together_changes_nothing(n_token, fair, policy, dtype, device, every_isa):
    """Softmax does not notice what all logits of a call have in common, as models with biased keys have hundreds of
    it."""
    generator = torch.Generator().manual_seed(n_token)
    keys = torch.randn(1, 2, n_token, 16, generator=generator).to(device, dtype)
    queries = torch.randn(1, 6, n_token, 16, generator=generator).to(device, dtype)
    queries[..., 0] = 1
    half, window = n_token // 2, 9
    spans = [(0, half), (half, n_token)] if fair else [(0, n_token)]
    rules = {
        "snapkv": lambda begin, end: Vote((begin, end - window), (end - window, end)),
        "tova": lambda begin, end: Vote((begin, end), (end - 1, end), weight="sum"),
        "h2o": lambda begin, end: Vote((begin, end), (begin, end), weight="age", age_end=end),
    }
    cast = [[rules[policy](*span) for span in spans]]
    for _ in every_isa(device):
        scores = {}
        for shift in (0, -1000, -150, 150, 1000):
            keys[..., 0] = 2 * shift  # exact in every dtype
            inputs = Inputs(keys, queries, scaling=0.5, valid=[(0, n_token)], segments=[], spans=[])
            scores[shift] = inputs.attend(cast, share_heads=policy == "tova").cpu()
            torch.testing.assert_close(
                scores[shift], scores[0], rtol=5e-3, atol=1e-7
            )  # float32 logits of 1443 are 1e-4 apart
        assert scores[0].std() > 0


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("n_query", [1, 9, 60])
def test_a_broken_key_means_the_same_everywhere(n_query, number, dtype, device, every_isa):
    """A query without a softmax makes the keys that it sees and votes on NaN, and only those; with a given lse only the
    broken key."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 60, 16, generator=generator).to(device, dtype)
    queries = torch.randn(1, 4, n_query, 16, generator=generator).to(device, dtype)
    queries[..., 3] = 1
    keys[0, 1, 55, 3] = number
    summed = np.array([[[0, 30, min(58, 60 - n_query), 58, 0, 0, 0, 0, 0, 0], [30, 60, 59, 60, 0, 0, 0, 0, 0, 0]]])
    lses = None, torch.zeros(1, 4, n_query, device=device)
    for packed, lse in product((summed, summed + 3 * (np.arange(10) == 6)), lses):
        exact = reference.score("attention", keys, queries=queries, votes=packed, lse=lse)
        for _ in every_isa(device):
            scores = ops.score("attention", keys, queries=queries, votes=packed, lse=lse)
            assert torch.equal(scores.isnan(), exact.isnan())
        assert not exact[0, 0].isnan().any()
        if lse is None:
            assert exact[0, 1, 30:].isnan().all() and exact[0, 1, :30].isnan().all() == (n_query > 1)
        else:
            assert exact[0, 1].isnan().nonzero().flatten().tolist() == ([55] if number != number else [])


@on_every_device
def test_softmax_rows_sum_to_one(device):
    """Sums over all keys of the raw column sums count the queries: causality, groups and padding at once."""
    keys, queries = tensors((2, 2, 3, 50, 16), torch.float32, device=device)
    valid = np.array([[7, 50], [0, 50]])
    packed = np.array([[[0, 50, 0, 50, 0, 0, 0, 0, 0, 0]]] * 2)
    scores = ops.score("attention", keys, queries=queries, votes=packed, valid=valid)
    scores[0, :, :7] = 0
    torch.testing.assert_close(scores.sum(-1).cpu(), torch.tensor([[43.0, 43.0], [50.0, 50.0]]), rtol=1e-5, atol=0)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_norm_and_position_scores(dtype, layout, device):
    keys, _ = tensors((2, 3, 1, 33, 80), dtype, layout, device)
    valid = np.array([[5, 33], [0, 30]])
    torch.testing.assert_close(
        ops.score("norm", keys, valid=valid), reference.score("norm", keys, valid=valid), rtol=1e-6, atol=0
    )
    assert torch.equal(
        ops.score("position", keys, valid=valid, n_sink=3), reference.score("position", keys, valid=valid, n_sink=3)
    )


def of_keys(*ranges):
    """Votes (V,10) that name key ranges alone."""
    return [[begin, end, *[0] * 8] for begin, end in ranges]


RANGES = np.array([of_keys((0, 20), (22, 40), (40, 41)), of_keys((30, 60), (0, 30), (60, 62)), of_keys(*[(0, 0)] * 3)])


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_keydiff_scores(dtype, layout, device):
    """Of ranges that padding cuts, of keys of any length, of zeros, and of keys under no vote."""
    keys, _ = tensors((3, 3, 1, 64, 80), dtype, layout, device)
    keys[0, :, 7] = 0
    if dtype != torch.float16:
        keys[1, :, 3] *= 1e30
        keys[1, :, 4] *= 1e-35
    valid = np.array([[5, 33], [0, 64], [0, 64]])
    scores = ops.score("keydiff", keys, votes=RANGES, valid=valid)
    torch.testing.assert_close(
        scores, reference.score("keydiff", keys, votes=RANGES, valid=valid), rtol=1e-6, atol=1e-6
    )
    assert (scores[0, :, 7] == 0).all() and (scores[0, :, 20:22] == 0).all() and (scores[1, :, 60:] == 0).all()
    assert (scores[2] == 0).all() and (scores[0, :, 33:] == -torch.inf).all() and scores[1, :, :60].abs().max() <= 1.001


def test_numpy_and_torch_agree_bit_for_bit():
    keys, queries = tensors((2, 2, 2, 40, 16), torch.float32)
    packed = np.array([[[0, 40, 0, 40, 0, 0, 2, 40, 0, 0]]] * 2)
    from_torch = ops.score("attention", keys, queries=queries, votes=packed)
    from_numpy = ops.score("attention", keys.numpy(), queries=queries.numpy(), votes=packed)
    assert isinstance(from_numpy, np.ndarray) and np.array_equal(from_torch.numpy(), from_numpy)


@st.composite
def selections(draw):
    n_row, n_head, n_token = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([[0.0, -0.0, 1.0], [np.nan, np.inf, -np.inf, 0.0], list(np.linspace(-1, 1, 50))]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.choice(levels, (n_row, n_head, n_token)).astype(np.float32)
    inner = sorted(draw(st.lists(st.integers(0, n_token), max_size=3)))
    segments = np.array([[0, *inner, n_token]] * n_row)
    quotas = rng.integers(0, n_token + 2, (n_row, n_head, segments.shape[1] - 1))
    valid = np.sort(rng.integers(0, n_token + 1, (n_row, 2)), -1) if draw(st.booleans()) else None
    protect = rng.random((n_row, n_token)) < 0.2 if draw(st.booleans()) else None
    return scores, quotas, segments, protect, valid


@on_every_device
@settings(max_examples=300, deadline=None)
@given(case=selections())
def test_select_equals_the_reference(case, device):
    scores, quotas, segments, protect, valid = case
    ours = ops.select(scores, quotas, segments=segments, protect=protect, valid=valid)
    exact = reference.select(scores, quotas, segments=segments, protect=protect, valid=valid)
    assert np.array_equal(ours[1], exact[1])
    assert (
        np.array_equal(ours[0][..., : exact[0].shape[-1]], exact[0])
        and (ours[0][..., exact[0].shape[-1] :] == -1).all()
    )
    torch_positions, torch_counts = ops.select(
        torch.from_numpy(scores).to(device), quotas, segments=segments, protect=protect, valid=valid
    )
    assert np.array_equal(torch_positions.cpu().numpy(), ours[0]) and np.array_equal(
        torch_counts.cpu().numpy(), ours[1]
    )


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_gather_copies_bits(dtype, layout, device):
    keys, values = tensors((2, 3, 2, 33, 16), dtype, layout, device)
    values = values[:, :3]
    positions = torch.arange(0, 33, 2, dtype=torch.int32, device=device).expand(2, 3, 17).clone()
    positions[1, :, -2:] = -1
    ours, exact = ops.gather(keys, values, positions), reference.gather(keys, values, positions)
    for a, b in zip(ours, exact, strict=True):
        assert a.is_contiguous() and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
    assert (ours[0][1, :, -2:] == 0).all()


@pytest.mark.parametrize("n_thread", [1, 2, 3])
def test_bits_do_not_depend_on_threads_or_batch(n_thread):
    keys, queries = tensors((3, 4, 2, 200, 32), torch.bfloat16)
    packed = np.array([[[0, 200, 0, 200, 0, 0, 2, 200, 0, 0]]] * 3)
    before = torch.get_num_threads()
    torch.set_num_threads(n_thread)
    try:
        together = ops.score("attention", keys, queries=queries, votes=packed)
        alone = ops.score("attention", keys[1:2], queries=queries[1:2], votes=packed[1:2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together, ops.score("attention", keys, queries=queries, votes=packed))


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scorer", ["norm", "position", "attention", "keydiff", "lagkv", "random"])
@pytest.mark.parametrize("n_token", [33, 700])
def test_press_is_the_three_verbs(n_token, scorer, dtype, device):
    """The same bits, in the same library and on the same device."""
    check_press("torch", n_token, scorer, dtype, device)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bfloat16], ids=str)
@pytest.mark.parametrize("scorer", ["norm", "position", "attention", "keydiff", "lagkv", "random"])
@pytest.mark.parametrize("n_token", [33, 700])
def test_press_of_numpy_is_the_three_verbs(n_token, scorer, dtype):
    check_press("numpy", n_token, scorer, dtype, "cpu")


def check_press(library, n_token, scorer, dtype, device):
    keys, queries = tensors((2, 3, 2, n_token, 40), dtype, "transposed", device)
    values = torch.randn(2, 3, n_token, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    lse = torch.full(queries.shape[:3], 3.0, device=device)
    if library == "numpy":
        keys, queries, values, lse = (x.numpy() for x in (keys, queries, values, lse))
    valid = np.array([[3, n_token], [0, n_token]], np.int32)
    votes = np.array([[[0, n_token, 3, n_token, 0, 0, 1, 0, 0, 0]]] * 2, np.int32)
    edges, quotas = np.array([[0, 9, n_token]] * 2, np.int32), np.full((2, 3, 2), 6, np.int32)
    protect = ops.beside(np.array([[t == 8 for t in range(n_token)]] * 2, np.uint8), keys)
    params = {
        "attention": {"scaling": 0.2, "kernel_size": 3},
        "position": {"n_sink": 2},
        "lagkv": {"n_sink": 2, "lag_size": 6},
        "random": {"seed": 5, "seed_high": 2},
    }.get(scorer, {})
    given = {"queries": None, "votes": None, "lse": None}
    if scorer == "attention":
        given = {"queries": queries, "votes": votes, "lse": lse}
    elif scorer == "keydiff":
        given["votes"] = np.array([of_keys((0, 9), (9, n_token))] * 2, np.int32)
    read = {"values": values} if scorer == "lagkv" else given
    scores = ops.score(scorer, keys, **read, valid=valid, **params)
    positions, counts = ops.select(scores, quotas, segments=edges, protect=protect, valid=valid)
    expected = positions, *ops.gather(keys, values, positions)
    pressed = ops.press_checked(
        scorer,
        keys,
        values,
        queries=given["queries"],
        votes=given["votes"],
        valid=valid,
        lse=given["lse"],
        segments=edges,
        quotas=quotas,
        protect=protect,
        n_kept=12,
        params=params,
    )
    for ours, theirs in zip(pressed, expected, strict=True):
        assert type(ours) is type(theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert library == "numpy" or ours.device == theirs.device
        assert bool((ours == theirs).all())
    assert int(counts.sum()) == 2 * 3 * 12


@pytest.mark.parametrize("n_token", [3, 50, 2000])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_every_output_begins_at_a_multiple_of_64_bytes(library, n_token):
    """Whatever its size, so that rows are written past the caches a line at a time."""
    convert = torch.from_numpy if library == "torch" else np.asarray
    held = []  # so that no memory is given out twice
    for n_dim in (1, 5, 16):
        keys = convert(np.random.default_rng(n_dim).standard_normal((1, 3, n_token, n_dim), np.float32))
        scores = ops.score("norm", keys)
        quotas, segments = np.full((1, 3, 1), 2, np.int32), np.array([[0, n_token]], np.int32)
        chosen = ops.select(scores, quotas)
        held += [scores, *chosen, *ops.gather(keys, keys, chosen[0])]
        if ops._is_lent(keys):  # torch's, from 2.10 on: the core itself asks for the memory
            held += _core.press("norm", keys, keys, None, None, None, None, segments, quotas, None, None, 2, 1)
    address = {"numpy": lambda x: x.ctypes.data, "torch": lambda x: x.data_ptr()}[library]
    assert len(held) == 3 * (8 if ops._is_lent(keys) else 5) and not [x.shape for x in held if address(x) % 64]
