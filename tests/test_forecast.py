"""Scores by what queries to come are expected to give to keys: the core against float64, on each device, and when it
is asked."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from model_sweep import build
from tiny_models import ids
from transformers.models.glm import modeling_glm as glm

import kvpitfalls as kvp
from kvpitfalls.eviction import forecast
from kvpitfalls.hf import rotations
from kvpitfalls.policies import expected_attention
from kvpitfalls.policies.rotary import in_order, orders

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Tiles of 64 tokens, chunks of 512, 64 chunks, and longer ones beyond 32768. Of the CPU, four chunks say what eight do.
LENGTHS = [1, 2, 63, 64, 65, 129, 511, 512, 513, 1000]
MOST = {"cpu": 1540, "cuda": 4092}
# Of the largest sum of |terms| of a logit: float32's own error, what 16 bits of a query leave out, and what tensor
# cores cut off (moments.cu). An H100 read up to 1.1e-6 at 511 tokens, 1.9e-6 at 32,768 and 3.4e-6 at 32,769.
TOLERANCE = {"cuda": 4e-6, "cpu": 4e-6}
DIMS = [
    *((n, "cpu") for n in (2, 6, 20, 32, 80, 130)),
    *((n, d) for n in (64, 96, 128) for d in ("cpu", "cuda")),
    (256, "cuda"),
]


def drawn(n_row, n_head, group, n_token, n_dim, dtype, device, centre=0.0):
    """Keys, queries, cosines and sines, and those to come; queries have a mean of up to ``centre`` in each channel, and
    turns are not of length 1."""
    make = torch.Generator(device).manual_seed(n_token * n_dim + group)
    draw = [(n_row, n_token, n_head, n_dim), (n_row, n_token, n_head * group, n_dim), (n_row, 1, n_head * group, n_dim)]
    keys, queries, means = (torch.randn(size, device=device, generator=make) for size in draw)
    scale = torch.linspace(0.2, 3, n_dim, device=device)
    queries = queries * scale + means * centre
    angles = torch.randn(n_row, n_token, n_dim, device=device, generator=make) * 3
    ahead = torch.randn(n_row, n_dim, device=device, generator=make)
    turns = 1.1 * angles.cos(), 1.1 * angles.sin()
    # as in a model, (B,T,H,D) transposed
    return keys.to(dtype).transpose(1, 2), queries.to(dtype).transpose(1, 2), turns, (ahead.cos(), ahead.sin())


def by_definition(keys, queries, turns, ahead, scaling, with_spread):
    """The formula of ``kvp_expect`` in float64, and for each head the largest sum of the lengths of its terms."""
    keys, queries, cos, sin = (x.double() for x in (keys, queries, *turns))
    cos, sin = (x / (cos**2 + sin**2) for x in (cos, sin))
    before = kvp.Rotary().turned(queries, cos, -sin)
    mean = before.mean(2)
    cos, sin = (x.double()[:, None] for x in ahead)
    unit = torch.eye(keys.shape[-1], dtype=torch.float64, device=keys.device).expand(len(keys), 1, -1, -1)
    turn = kvp.Rotary().turned(unit, cos.expand_as(unit[:, 0]), sin.expand_as(unit[:, 0])) * scaling
    n_group = queries.shape[1] // keys.shape[1]
    of_head = keys.repeat_interleave(n_group, 1)
    means = mean[:, :, None] @ turn
    logits, size = (of_head @ means.mT)[..., 0], (of_head.abs() @ means.abs().mT)[..., 0]
    if with_spread:
        centred = (before - mean[:, :, None]) @ turn
        spread = centred.mT @ centred / queries.shape[2] / 2
        logits = logits + ((of_head @ spread) * of_head).sum(-1)
        size = size + ((of_head.abs() @ spread.abs()) * of_head.abs()).sum(-1)
    return logits, size.amax(-1, keepdim=True)


def logits_of(keys, queries, turns, ahead, scaling, with_spread):
    """By the kernels, of all tokens."""
    edges = np.array([[0, 0, keys.shape[2]]] * len(keys), np.int32)
    given = {"scaling": scaling, "with_spread": with_spread}
    return forecast.expect(keys, queries, None, turns, ahead, edges, **given)[0]


def error(arguments):
    wanted, size = by_definition(*arguments)
    return float(((logits_of(*arguments).double() - wanted).abs() / size).max())


def scores_by_definition(logits, values, edges, sinks, epsilon):
    """The second formula of ``kvp_expect`` in float64, from its logits (B, H*G, T)."""
    n_head = values.shape[1]
    scores = torch.zeros(values.shape[:3], dtype=torch.float64, device=values.device)
    for row, (begin, *cuts) in enumerate(edges.tolist()):
        for low, high in pairwise(cuts):
            own = logits[row, :, low:high].double()
            of_sinks = torch.full_like(own[:, :1], -torch.inf) if sinks is None else sinks.double()[:, None]
            shares = torch.cat([own, of_sinks], -1).softmax(-1)[:, : high - low]
            scores[row, :, low:high] = shares.unflatten(0, (n_head, -1)).mean(1) + epsilon
        scores[row] *= values[row].double().norm(dim=-1)
        scores[row, :, begin : cuts[0]] = scores[row].nan_to_num(0).max() + 1
    return scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_dim", "device"), [pytest.param(*x, marks=needs_gpu if x[1] == "cuda" else ()) for x in DIMS]
)
def test_logits_are_their_formula(n_dim, device, dtype):
    for n_token in (*LENGTHS, MOST[device]):
        for n_row, n_head, group, with_spread in ((2, 2, 4, True), (1, 3, 1, True), (1, 1, 7, True), (2, 1, 2, False)):
            arguments = *drawn(n_row, n_head, group, n_token, n_dim, dtype, device), n_dim**-0.5, with_spread
            assert error(arguments) <= TOLERANCE[device], (n_token, n_row, n_head, group, with_spread)


@pytest.mark.parametrize(
    ("n_dim", "device"), [(128, "cpu"), *(pytest.param(n, "cuda", marks=needs_gpu) for n in (128, 256))]
)
@pytest.mark.parametrize("n_token", [2048, 2049, 8193, 32768, 32769, 70000])
def test_long_prompts_have_longer_chunks(n_token, n_dim, device):
    longer = max(1, n_token / 32768)
    assert error((*drawn(1, 1, 2, n_token, n_dim, torch.bfloat16, device), 0.1, True)) <= TOLERANCE[device] * longer


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_mean_leaves_the_covariance_what_it_is(dtype, device):
    """The mean's own part of a logit is a thousand times the other, so that it is left out by its turn: keys are turned
    so that they meet none of it."""
    keys, queries, turns, ahead = drawn(1, 2, 2, 1500, 64, dtype, device)
    still = torch.ones_like(turns[0]), torch.zeros_like(turns[1])
    queries = (queries.float() + 1000).to(dtype)  # in bfloat16 what is left differs by steps of 4
    keys[..., ::2] = -keys[..., 1::2]  # their channels' sum is 0
    to_come = torch.ones_like(ahead[0]), torch.zeros_like(ahead[1])
    ours = logits_of(keys, queries, still, to_come, 1.0, True).double()
    centred = queries.double() - queries.double().mean(2, keepdim=True)
    spread = centred.mT @ centred / 1500 / 2
    of_head = keys.double().repeat_interleave(2, 1)
    means = (of_head @ (queries.double().mean(2) - 1000)[..., None])[..., 0]
    wanted = means + ((of_head @ spread) * of_head).sum(-1)
    # the mean is a float32 near 1000, so that each of 64 products with it is right to 3e-5 of a key's channel
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-3)


# Of 700 tokens, and of three rows: what is kept unjudged, and segments, some of them empty. One row has padding.
EDGES = np.array([[0, 4, 300, 300, 700], [13, 17, 17, 600, 700], [5, 5, 6, 71, 555]], np.int32)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "n_value", "epsilon", "has_sinks"), [(1, 64, 0.02, 1), (4, 128, 0, 0), (6, 20, 1, 1)]
)
def test_scores_are_their_formula(dtype, group, n_value, epsilon, has_sinks, device):
    keys, queries, turns, ahead = drawn(3, 2, group, 700, 64, dtype, device)
    values = torch.randn(3, 2, 700, n_value, device=device, generator=torch.Generator(device).manual_seed(1)).to(dtype)
    sinks = torch.linspace(-1, 3, 2 * group, device=device) if has_sinks else None
    for of_values in (values, values.float(), values.mT.contiguous().mT, None):  # wide rows, of another type, narrow
        given = {"scaling": 0.125, "sinks": sinks, "epsilon": epsilon}
        logits, scores = forecast.expect(keys, queries, of_values, turns, ahead, EDGES, **given)
        by = torch.ones_like(values[..., :1]) if of_values is None else of_values
        wanted = scores_by_definition(logits, by, EDGES, sinks, epsilon)
        # a power is right to 2^-22 of itself for logits up to 16, a sum of 700 to less
        torch.testing.assert_close(scores.double(), wanted, rtol=5e-6, atol=1e-12)
        assert (scores[1, :, :13] == 0).all() and (scores[2, :, 555:] == 0).all()


@on_each_device
@pytest.mark.parametrize("scaling", [-30.0, 3.0, 30.0])
def test_logits_far_from_zero_have_shares(scaling, device):
    """Of thousands, whose powers float32 has no room for, with sinks far above and far below. Of so large a number a
    power is right to one percent."""
    keys, queries, turns, ahead = drawn(3, 2, 3, 700, 64, torch.float32, device)
    for sinks in (None, torch.linspace(-1e5, 1e5, 6, device=device)):
        given = {"scaling": scaling, "sinks": sinks, "epsilon": 0.02}
        logits, scores = forecast.expect(keys, queries, keys, turns, ahead, EDGES, **given)
        judged = [of_row[:, first:end] for of_row, (_, first, *_, end) in zip(logits, EDGES, strict=True)]
        assert min(float(x.abs().max()) for x in judged) > 1000 and scores.isfinite().all()
        wanted = scores_by_definition(logits, keys, EDGES, sinks, 0.02)
        torch.testing.assert_close(scores.double(), wanted, rtol=1e-2, atol=1e-6)


@on_each_device
def test_a_segment_without_a_softmax_is_not_a_number_and_no_other_is(device):
    keys, queries, turns, ahead = drawn(2, 2, 2, 300, 64, torch.float32, device)
    edges = np.array([[0, 4, 100, 200, 300], [0, 4, 100, 200, 300]], np.int32)
    for wrong in (torch.nan, torch.inf):
        keys[0, 1, 150, 3] = wrong
        scores = forecast.expect(keys, queries, keys[..., :8], turns, ahead, edges, scaling=0.1)[1]
        has_none = torch.zeros_like(scores, dtype=torch.bool)
        has_none[0, 1, 100:200] = True
        assert torch.equal(scores.isnan(), has_none)
        assert (scores[0, :, :4] == scores[0, :, 4:].nan_to_num(0).max() + 1).all()


@on_each_device
def test_many_segments_go_by_memory(device):
    """More edges than fit into the parameters of a launch."""
    keys, queries, turns, ahead = drawn(1, 2, 2, 700, 64, torch.bfloat16, device)
    edges = np.array([[0, *sorted({3, *range(0, 701, 4)})]], np.int32)
    logits, scores = forecast.expect(keys, queries, keys, turns, ahead, edges, scaling=0.1)
    torch.testing.assert_close(
        scores.double(), scores_by_definition(logits, keys, edges, None, 0), rtol=5e-6, atol=1e-12
    )


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter_and_rows_are_alone(dtype, device):
    """The same bits: in rows on no boundary, by one row of a batch, as a prompt of its own, and again."""
    keys, queries, turns, ahead = drawn(3, 2, 3, 700, 64, dtype, device)
    given = {"scaling": 0.125, "epsilon": 0.02}
    whole = forecast.expect(keys, queries, keys, turns, ahead, EDGES, **given)[1]
    assert torch.equal(forecast.expect(keys, queries, keys, turns, ahead, EDGES, **given)[1], whole)
    for row, (begin, *_, end) in enumerate(EDGES.tolist()):
        at = slice(row, row + 1)
        of_row = keys[at], queries[at], keys[at], [x[at] for x in turns], [x[at] for x in ahead]
        assert torch.equal(forecast.expect(*of_row, EDGES[at], **given)[1][0], whole[row])
        cut = [x[at, :, begin:end] for x in (keys, queries, keys)]
        own = forecast.expect(*cut, [x[at, begin:end] for x in turns], of_row[-1], EDGES[at] - begin, **given)[1]
        assert torch.equal(own[0], whole[row, :, begin:end])
    wider = [torch.zeros(*x.shape[:3], 65, dtype=dtype, device=device)[..., 1:].copy_(x) for x in (keys, queries)]
    apart = [torch.zeros(3, 700, 128, device=device)[..., ::2].copy_(x) for x in turns]
    later = [x.repeat_interleave(2, 1)[:, ::2] for x in ahead]
    assert torch.equal(forecast.expect(*wider, keys, apart, later, EDGES, **given)[1], whole)


@needs_gpu
@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_covariance": False}, {"n_sink": 0, "use_vnorm": False}])
def test_the_policy_keeps_on_a_gpu_what_it_keeps_on_a_cpu(fair, changes):
    """And scores what its products of torch do there; rows with padding, too, and each as by itself."""
    keys, queries, _, _ = drawn(3, 2, 4, 600, 64, torch.bfloat16, "cuda")
    rotary, policy = kvp.Rotary(), kvp.ExpectedAttention(**changes)
    queries = rotary.turned(queries.float(), *rotary.angles(torch.arange(600, device="cuda")[None], queries)).bfloat16()
    settings = {"rotary": rotary, "budget": 150, "fair": fair, "spans": {"a": (20, 200), "b": (230, 500)}}
    valid = [(0, 600), (13, 600), (5, 555)]
    on_gpu = kvp.keep(policy, keys, queries, values=keys, valid=valid, **settings)
    on_cpu = kvp.keep(policy, keys.cpu(), queries.cpu(), values=keys.cpu(), valid=valid, **settings)
    torch.testing.assert_close(on_gpu.scores.cpu(), on_cpu.scores, rtol=1e-4, atol=1e-7)
    assert torch.equal(on_gpu.positions.cpu(), on_cpu.positions)
    own = kvp.keep(policy, keys[1:2], queries[1:2], values=keys[1:2], valid=valid[1:2], **settings)
    assert torch.equal(own.positions[0], on_gpu.positions[1]) and torch.equal(own.scores[0], on_gpu.scores[1])


@pytest.mark.parametrize("fair", [False, True])
def test_the_core_and_products_of_torch_score_alike(fair, monkeypatch):
    """On a CPU: rows with padding, too, each as by itself, and a layer that pairs other channels goes by products."""
    keys, queries, _, _ = drawn(3, 2, 4, 600, 64, torch.bfloat16, "cpu")
    settings = {"values": keys, "budget": 150, "fair": fair, "spans": {"a": (20, 200), "b": (230, 500)}}
    settings |= {"valid": [(0, 600), (13, 600), (5, 555)]}
    asked, expect = [], forecast.expect
    monkeypatch.setattr(forecast, "expect", lambda *a, **given: asked.append(1) or expect(*a, **given))
    for rotary, n_call in ((kvp.Rotary(), 1), (Interleaved(), 0)):
        with monkeypatch.context() as patch:
            patch.setattr(forecast, "is_known", lambda *_: False)
            by_products = kvp.keep("expected_attention", keys, queries, rotary=rotary, **settings).scores
        assert len(asked) == 0
        scores = kvp.keep("expected_attention", keys, queries, rotary=rotary, **settings).scores
        assert len(asked) == n_call
        asked.clear()
        torch.testing.assert_close(scores, by_products, rtol=1e-4, atol=1e-7)


@needs_gpu
def test_the_kernels_are_asked_where_they_know_the_turn(monkeypatch):
    asked, expect = [], forecast.expect
    monkeypatch.setattr(forecast, "expect", lambda *a, **given: asked.append(1) or expect(*a, **given))
    for n_dim, rotary, n_call in ((64, kvp.Rotary(), 1), (80, kvp.Rotary(), 0), (64, Interleaved(), 0)):
        keys, queries, _, _ = drawn(1, 1, 2, 100, n_dim, torch.float32, "cuda")
        asked.clear()
        policy = kvp.ExpectedAttention()
        on_gpu = kvp.keep(policy, keys, queries, values=keys, rotary=rotary, budget=20).scores
        assert len(asked) == n_call
        on_cpu = kvp.keep(policy, keys.cpu(), queries.cpu(), values=keys.cpu(), rotary=rotary, budget=20).scores
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-6)


class Interleaved(kvp.Rotary):
    def turned(self, x, cos, sin):
        paired = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return super().turned(paired, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


# Of tiny models with 16 channels a head: how many are turned, and whether neighbours are paired or halves.
TURNS = {
    "llama": (16, "halves"),
    "qwen3": (16, "halves"),
    "gemma3_text": (16, "halves"),
    "gpt_oss": (16, "halves"),  # by angles of 8
    "phi": (8, "halves"),
    "gpt_neox": (4, "halves"),
    "cohere": (16, "neighbours"),
    "glm4": (16, "neighbours"),
}


@pytest.mark.parametrize(("family", "turns"), TURNS.items())
def test_how_a_models_layers_turn_is_told_by_trying(family, turns):
    """In the order that is told, plain rotary embedding does what the layer does."""
    seen, model = [], build(family, "eager")

    class Looking(kvp.Policy):
        """Keep the newest."""

        name, listed, needs_queries, needs_rotary = "test_looks", False, True, True

        def score(self, inputs):
            seen.append((inputs.rotary, inputs.queries))
            return inputs.score("position", n_sink=0)

    with kvp.wrap(model, Looking(), budget=4) as handle:
        handle.compress(ids(1, 12))
    assert seen
    for rotary, queries in seen:
        n_dim, by = queries.shape[-1], rotary.angles(torch.arange(12)[None], queries)
        order = rotary.order(n_dim, by[0].shape[-1])
        assert order == list(orders(n_dim, turns[0]))[turns[1] == "neighbours"]
        plain = kvp.Rotary().turned(in_order(queries, order), *rotary.of_halves(*by, order))
        torch.testing.assert_close(plain, in_order(rotary.turned(queries, *by), order), rtol=0, atol=1e-6)


def test_neighbours_of_a_part_and_a_turn_that_is_not_known():
    def of_part(x, cos, sin):
        return glm.apply_rotary_pos_emb(x, x, cos, sin)[0]

    def of_ends(x, cos, sin):  # the first channel with the last, and so on
        return kvp.Rotary().turned(torch.cat([x[..., :8], x[..., 8:].flip(-1)], -1), cos, sin)

    # what is not turned may be paired as one likes
    assert rotations._order(of_part, 16, 16, 8) == list(orders(16, 16))[1]
    assert rotations._order(of_ends, 16, 16, 16) is None


@pytest.mark.parametrize("family", [*TURNS, "smollm3"])  # smollm3: some layers turn nothing
def test_the_core_scores_what_products_do_however_a_layer_turns(family, monkeypatch):
    """Rows with padding, too; and every layer's scores are the core's."""
    asked, expect = [], forecast.expect
    monkeypatch.setattr(forecast, "expect", lambda *a, **given: asked.append(1) or expect(*a, **given))
    policy, scores = kvp.ExpectedAttention(), {}
    score = type(policy).score
    monkeypatch.setattr(type(policy), "score", lambda self, inputs: made.append(score(self, inputs)) or made[-1])
    tokens = ids(2, 24)
    for by_core in (True, False):
        made = scores[by_core] = []
        with monkeypatch.context() as patch, kvp.wrap(build(family, "eager"), policy, budget=8) as handle:
            if not by_core:
                patch.setattr(forecast, "is_known", lambda *_: False)
            handle.compress(tokens, attention_mask=torch.tensor([[0] * 5 + [1] * 19, [1] * 24]))
    assert len(asked) == len(scores[True]) == len(scores[False]) > 0
    for one, other in zip(scores[True], scores[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_expect_refuses():
    keys, queries, turns, ahead = drawn(1, 2, 2, 10, 64, torch.float32, "cpu")
    assert forecast.is_known(keys, queries) and not forecast.is_known(keys, queries.half())
    assert not forecast.is_known(keys[..., 1:], queries[..., 1:])
    given = {"keys": keys, "queries": queries, "values": keys, "turns": turns, "ahead": ahead, "scaling": 1.0}
    given["edges"] = np.array([[0, 4, 10]], np.int32)
    for wrong, match in (
        ({"queries": queries[:, :, :9]}, r"^queries.shape\[2\] is 9, but T is 10 in keys"),
        ({"queries": queries[:, :3]}, r"^queries.shape\[1\] is 3; expected a multiple of the 2 key"),
        (
            {"keys": keys[..., :63], "queries": queries[..., :63], "turns": [x[..., :63] for x in turns]}
            | {"ahead": [x[:, :63] for x in ahead]},
            r"^keys.shape\[3\] is 63; expected an even number, of pairs",
        ),
        ({"turns": [x[..., :32] for x in turns]}, r"^cosines.shape\[3\] is 32, but D is 64 in keys"),
        ({"scaling": np.inf}, r"^scaling is inf; expected a number that is finite in float32"),
        ({"epsilon": -1.0}, r"^epsilon is -1; expected a number from 0 to 3.40282e\+38"),
        ({"edges": np.zeros((1, 2), np.int32)}, r"^segments.shape\[1\] is 2; expected at least 3, the edges of"),
        ({"sinks": torch.zeros(2)}, r"^sinks.shape\[0\] is 2, but N is 4 in queries"),
    ):
        with pytest.raises(ValueError, match=match):
            forecast.expect(**{**given, **wrong})
    with pytest.raises(TypeError, match=r"^queries has dtype float16; expected float32, as keys has"):
        forecast.expect(**{**given, "queries": queries.half()})


@on_each_device
def test_edges_that_do_not_ascend_are_refused(device):
    keys, queries, turns, ahead = drawn(1, 1, 1, 10, 64, torch.float32, device)
    for edges in ([0, 4, 11], [0, 5, 4, 10], [-1, 0, 10]):
        with pytest.raises(ValueError, match=r"^segments\[0,\d\] is -?\d+; expected"):
            forecast.expect(keys, queries, None, turns, ahead, np.array([edges], np.int32), scaling=1.0)


@needs_gpu
@pytest.mark.parametrize("length", [300, 5000])
def test_the_kernels_are_as_exact_as_products_of_torch(length):
    """Beside them, in float32 and on the same GPU: not more than four times their error."""
    keys, queries, _, _ = drawn(1, 2, 4, length, 128, torch.float32, "cuda", centre=3.0)
    rotary, at = kvp.Rotary(), torch.arange(length, device="cuda")
    turned, ahead = (
        rotary.turned(queries, *rotary.angles(at[None], queries)),
        at[-1] + torch.arange(1, 513, device="cuda"),
    )
    turns, to_come = rotary.angles(at[None], queries), [x.mean(1) for x in rotary.angles(ahead[None], queries)]
    wanted, size = by_definition(keys, turned, turns, to_come, 128**-0.5, True)
    mean, squares = expected_attention.moments([rotary.undone(turned, at[None])[0]])
    turn = rotary.mean(ahead, queries) * 128**-0.5
    naive = expected_attention._logits(keys[0], mean @ turn, turn.T @ (squares / (2 * length)) @ turn)
    ours = logits_of(keys, turned, turns, to_come, 128**-0.5, True)
    of_naive, of_ours = (float(((x.double().flatten(0, -2) - wanted[0]).abs() / size[0]).max()) for x in (naive, ours))
    print(f"{length}: {of_ours:.2e} against {of_naive:.2e}")
    assert of_ours <= 4 * of_naive
