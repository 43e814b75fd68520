"""What every registered policy must do, and that a new one takes ten lines."""

import ast
import importlib
import io
import tokenize
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import build, ids
from tiny_policies import EQUAL, EVERY, kept_by, read_after, rkv_by_hand

import kvpitfalls as kvp
from kvpitfalls.eviction import forecast
from kvpitfalls.policies import expected_attention, get_policy, policy_names, rkv

KEYS = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(2, 9, 40, 16, generator=torch.Generator().manual_seed(1))
OUTPUT = torch.randn(9, 24, 20, generator=torch.Generator().manual_seed(3))
VALUES = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(2))


def test_names_and_aliases():
    assert {policy.name for policy in EVERY} == set(policy_names())
    for name, policy in [
        ("streamingllm", kvp.StreamingLLM()),
        ("snap", kvp.SnapKV()),
        ("observed_attention", kvp.H2O()),
        ("SnapKV", kvp.SnapKV()),
        (kvp.TOVA, kvp.TOVA()),
        (kvp.KNorm(), kvp.KNorm()),
    ]:
        assert get_policy(name) == policy


@pytest.mark.parametrize("name", policy_names())
def test_a_name_is_known_by_its_letters_and_digits(name):
    for written in (name.upper(), name.replace("_", "-"), name.replace("_", ""), f"{name[:-2]}-{name[-2:]}"):
        assert get_policy(written) == get_policy(name)


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_a_child_of_any_policy_has_a_name_of_its_own_and_leaves_its_parent_its_names(policy, registry):
    parent = type(policy)
    child = type("Child", (parent,), {"name": "child_of_another"})
    assert type(get_policy("child_of_another")) is child
    assert {type(get_policy(name)) for name in (parent.name, *vars(parent).get("aliases", ()))} == {parent}


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_every_policy_keeps_its_contract(policy):
    settings = {
        "compression_ratio": 0.5,
        "layer": 1,
        "n_layer": 3,
        "rotary": kvp.Rotary(),
        "output": OUTPUT,
    }  # the middle one: no pyramid gives it more or less
    kept = kept_by(policy, KEYS, QUERIES, values=VALUES, **settings)
    assert kept.scores.shape == (2, 3, 40) and kept.scores.dtype == torch.float32 and kept.scores.isfinite().all()
    assert (kept.counts.sum(1) == 60).all() and (policy not in EQUAL or (kept.counts == 20).all())
    again = kept_by(policy, KEYS.transpose(1, 2).contiguous().transpose(1, 2), QUERIES, values=VALUES, **settings)
    assert torch.equal(kept.positions, again.positions)
    one = kept_by(policy, KEYS[1:], QUERIES[1:], values=VALUES[1:], **settings)
    assert torch.equal(kept.positions[1:, :, : one.positions.shape[2]], one.positions) and torch.equal(
        kept.counts[1:], one.counts
    )
    numpy = kept_by(policy, KEYS.numpy(), QUERIES.numpy(), values=VALUES.numpy(), **settings)
    assert np.array_equal(numpy.positions, kept.positions.numpy())
    assert eval(repr(policy), {name: getattr(kvp, name) for name in kvp.__all__}) == policy


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_every_policy_takes_floats_of_32_or_16_bits_alone(policy, dtype):
    """Wherever it scores: in the core, or in torch, which would take and round others."""
    settings = {"budget": 20, "layer": 1, "n_layer": 3, "rotary": kvp.Rotary(), "output": OUTPUT}
    kept_by(policy, KEYS, QUERIES, values=VALUES, **settings)
    arrays = {"keys": KEYS, "queries": QUERIES, "values": VALUES}
    for name in arrays:
        kind = str(dtype).removeprefix("torch.")
        message = rf"^{name}( of again\[0\])? has dtype {kind}; expected float32, float16 or bfloat16"
        for of_library in (torch.as_tensor, np.asarray)[: 1 if dtype == torch.float8_e4m3fn else 2]:
            changed = {n: of_library(x.to(dtype) if n == name else x) for n, x in arrays.items()}
            with pytest.raises(TypeError, match=message):
                kept_by(policy, **changed, **settings)


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_a_policy_says_exactly_what_it_reads(policy):
    settings = {
        "compression_ratio": 0.5,
        "queries": QUERIES,
        "values": VALUES,
        "rotary": kvp.Rotary(),
        "output": OUTPUT,
        "layer": 1,
        "n_layer": 3,
        "again": read_after(policy, KEYS, QUERIES),
    }
    whole = kvp.keep(policy, KEYS, **settings).positions
    for name, what in (
        ("queries", "the queries"),
        ("values", "values"),
        ("rotary", "the rotary embedding"),
        ("output", "the output projection"),
        ("again", "the queries and keys of that"),
    ):
        without = {key: value for key, value in settings.items() if key != name}
        if getattr(policy, f"needs_{name}"):
            with pytest.raises(ValueError, match=f"^{name} is None; policy '{policy.name}' .* needs {what}"):
                kvp.keep(policy, KEYS, **without)
        else:
            assert torch.equal(kvp.keep(policy, KEYS, **without).positions, whole)


def test_values_and_layers_that_do_not_fit_are_refused():
    settings = {"compression_ratio": 0.5}
    with pytest.raises(
        ValueError,
        match=r"^values has shape \(2, 3, 39, 24\); expected \(2, 3, 40\) before the last dimension, as keys has",
    ):
        kvp.keep("knorm", KEYS, values=VALUES[:, :, :39], **settings)
    with pytest.raises(TypeError, match=r"^values is a ndarray and keys is a Tensor; expected the same type"):
        kvp.keep("knorm", KEYS, values=VALUES.numpy(), **settings)
    with pytest.raises(TypeError, match=r"^layer is 0.5; expected a whole number"):
        kvp.keep("knorm", KEYS, layer=0.5, **settings)
    with pytest.raises(ValueError, match=r"^layer is 2 of 2; expected one in \[0, 2\)"):
        kvp.keep("knorm", KEYS, layer=2, n_layer=2, **settings)


def test_a_policy_is_told_its_layer_and_its_values(registry):
    seen = []

    class Watching(kvp.Policy):
        """Keep the newest, and look at everything."""

        name = "watching"

        def score(self, inputs):
            seen.append((inputs.layer, inputs.n_layer, inputs.values))
            return inputs.score("position", n_sink=0)

    model, tokens = build("llama"), ids(1, 20)
    with kvp.wrap(model, Watching(), budget=7) as handle:
        cache = handle.compress(tokens)
    n_layer = model.config.num_hidden_layers
    assert [each[:2] for each in seen] == [(i, n_layer) for i in range(n_layer)] and n_layer > 1
    for layer, (*_, values) in zip(cache.kept_layers, seen, strict=True):
        places = layer.pos[..., None].expand_as(layer.values)
        assert torch.equal(values.gather(2, places), layer.values)


def expected_by_hand(keys, before, values, policy, rotary, segments):
    """Expected Attention's scores (H, T) of one row by its formula, in float64, every future rotation written out."""
    n_head, n_token, n_dim = keys.shape
    first, n_group = policy.n_sink, len(before) // n_head
    turns = []
    for t in range(n_token, n_token + policy.n_future_positions):
        angles = rotary.angles(torch.tensor([[t]]), torch.eye(n_dim))
        turns.append(rotary.turned(torch.eye(n_dim)[None, None], *angles)[0, 0].T)  # columns are turned unit vectors
    turn = torch.stack(turns).double().mean(0)
    scores = torch.zeros(n_head, n_token, dtype=torch.float64)
    for head in range(n_head):
        for query in before[head * n_group : (head + 1) * n_group].double():
            mean, spread = query[first:].mean(0), query[first:].T.cov(correction=0)
            for begin, end in segments:
                own = keys[head, max(begin, first) : max(end, first)].double()
                logits = own @ (turn @ mean) / n_dim**0.5
                if policy.use_covariance:
                    logits = logits + torch.einsum("ti,ij,tj->t", own, turn @ spread @ turn.T, own) / n_dim / 2
                scores[head, max(begin, first) : max(end, first)] += logits.softmax(-1) / n_group
    scores = (scores + policy.epsilon) * values.double().norm(dim=-1) if policy.use_vnorm else scores
    scores[:, :first] = scores[:, first:].max() + 1
    return scores


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"use_covariance": False}, {"use_vnorm": False}, {"n_sink": 0, "epsilon": 0.0}]
)
@pytest.mark.parametrize("way", ["core", "products", "products in parts of 16, 16 and 4 tokens or 8"])
def test_expected_attention_is_its_formula(fair, changes, way, monkeypatch):
    if way != "core":
        monkeypatch.setattr(forecast, "is_known", lambda *_: False)
        monkeypatch.setitem(expected_attention._BLOCK, "cpu", 1 if "parts" in way else 2**22)
    policy, rotary, spans = (
        kvp.ExpectedAttention(**{"n_future_positions": 9, **changes}),
        kvp.Rotary(100.0),
        {"a": (3, 14), "b": (14, 30)},
    )
    at = torch.arange(40)[None].expand(2, -1)
    turned = rotary.turned(QUERIES, *rotary.angles(at, QUERIES))
    kept = kvp.keep(policy, KEYS, turned, values=VALUES, rotary=rotary, budget=20, spans=spans, fair=fair)
    segments = list(pairwise([0, 3, 14, 30, 40])) if fair else [(0, 40)]
    for row in range(2):
        wanted = expected_by_hand(KEYS[row], QUERIES[row], VALUES[row], policy, rotary, segments)
        torch.testing.assert_close(kept.scores[row].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1], [40], [1, 1], [39, 1], [16, 16, 8], [7] * 5 + [5]], ids=str)
def test_moments_of_parts_are_those_of_the_whole(sizes):
    """Also where the mean is a thousand times what tokens differ by, beside whose square float32 has no room for theirs
    (the mean itself is then exact to 1e-4 of what they differ by), and where it moves from part to part."""
    for centre in (0, 1000, torch.arange(40)[:, None] * 100.0):
        tokens = QUERIES[0] + centre if sum(sizes) == 40 else QUERIES[0, :, : sum(sizes)]
        mean, squares = expected_attention.moments(part.clone() for part in tokens.split(sizes, 1))
        exact = tokens.double()
        torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=1e-6)
        of_exact = exact - exact.mean(1, keepdim=True)
        wanted = of_exact.mT @ of_exact
        torch.testing.assert_close(squares.double(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
        alone, none = expected_attention.moments((part.clone() for part in tokens.split(sizes, 1)), with_squares=False)
        assert none is None and torch.equal(alone, mean)


class Still(kvp.Rotary):
    def turned(self, x, cos, sin):
        return x


@pytest.mark.parametrize("rotary", [kvp.Rotary(), Still()])
def test_expected_attention_leaves_a_layers_queries_as_they_are(rotary):
    """Also those of a layer that turns none, where what is undone are the queries themselves."""
    queries = QUERIES.clone()
    kvp.keep(kvp.ExpectedAttention(), KEYS, queries, values=VALUES, rotary=rotary, budget=20)
    assert torch.equal(queries, QUERIES)


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"mix_lambda": 0.6, "kernel_size": 1}, {"threshold": -0.1}, {"threshold": 0.99}, {"kernel_size": 2**62 + 1}],
)
def test_rkv_is_its_formula_in_tiles_of_any_size(fair, changes, monkeypatch):
    policy, spans = kvp.RKV(**{"window_size": 8, **changes}), {"a": (3, 14), "b": (14, 30)}
    keys = KEYS.clone()
    keys[:, :, ::5] = keys[:, :, :1] + 0.3 * keys[:, :, ::5]  # some are alike
    settings = {"budget": 20, "spans": spans, "fair": fair}
    kept = kvp.keep(policy, keys, QUERIES, **settings)
    segments = list(pairwise([0, 3, 14, 30, 40])) if fair else [(0, 40)]
    for row in range(2):
        for begin, end in segments:
            width = 2 if fair else 8  # a window of 8 is shared by four
            for head in range(3):
                asked = QUERIES[row, 3 * head : 3 * head + 3, end - width : end].double()
                wanted = rkv_by_hand(keys[row, head, begin:end].double(), asked, policy)
                torch.testing.assert_close(
                    kept.scores[row, head, begin : end - width].double(), wanted, rtol=0, atol=1e-6
                )
            assert (kept.scores[row, :, end - width : end].diff(dim=-1) > 0).all() and (
                kept.scores[row, :, end - width : end] > 1
            ).all()
    for tile in (1, 3 * 40 * 33):  # tiles of 32 and 33 keys of 40
        monkeypatch.setattr(rkv, "_TILE", tile)
        assert torch.equal(kvp.keep(policy, keys, QUERIES, **settings).positions, kept.positions)


def test_rkv_spares_the_last_of_keys_that_repeat_each_other():
    """Of ten equal keys among others, all but the last go first."""
    keys = KEYS[:1].clone()
    keys[:, :, 5:25:2] = keys[:, :, 5:6]
    kept = kvp.keep(kvp.RKV(window_size=4, mix_lambda=0), keys, QUERIES[:1], budget=31).positions
    assert (kept == torch.tensor([t for t in range(40) if t not in range(5, 23, 2)])).all()
    with pytest.raises(
        ValueError,
        match=r"^policy RKV\(.*was given 40 tokens, of which 8 are kept; expected a budget of more than the 8 that",
    ):
        kvp.keep("rkv", KEYS, QUERIES, budget=8)
    with pytest.raises(
        ValueError,
        match=r"^queries has the last 5 of 40 positions, but tokens \[0, 9\) are judged by the query at position 5",
    ):
        kvp.keep("rkv", KEYS, QUERIES[:, :, 35:], budget=20, spans={"a": (0, 9)}, fair=True)


def defensive_by_hand(row, segments, policy):
    """DefensiveKV's scores (H, T) of one of our rows but its windows, in float64; and the windows.

    What is first stage by its rank above 1, the rest to a scale of its own.
    """
    scores, windows, n_group, reach = torch.zeros(3, 40, dtype=torch.float64), [], 3, policy.kernel_size // 2
    norms = torch.stack([(VALUES[row, h // n_group].double() @ OUTPUT[h].double()).abs().sum(-1) for h in range(9)])
    norms = norms.unflatten(0, (3, n_group)).mean(1)
    factors = {"norm": norms, "share": norms / norms.sum(0), None: torch.ones_like(norms)}[policy.factor]
    for begin, end in segments:
        width = policy.window_size // len(segments)
        cut, first = end - width, []
        windows.append((cut, end))
        for head in range(3):
            worst, total = torch.zeros(cut - begin, dtype=torch.float64), torch.zeros(cut - begin, dtype=torch.float64)
            for h in range(n_group * head, n_group * head + n_group):
                for t in range(cut, end):
                    seen = (KEYS[row, head, : t + 1].double() @ QUERIES[row, h, t].double() / 4).softmax(-1)[begin:cut]
                    pooled = torch.stack(
                        [seen[max(0, k - reach) : k + reach + 1].sum() / policy.kernel_size for k in range(cut - begin)]
                    )
                    worst = torch.maximum(worst, pooled / pooled.sum() * seen.sum())
                    total += seen / (n_group * width)
            scores[head, begin:cut] = worst.clamp(min=worst.mean()) * factors[head, begin:cut]
            reached = 1 - total.sum()
            for k in total.argsort(descending=True).tolist():
                if reached >= policy.first_stage:
                    break
                reached += total[k]
                first.append((head, begin + k, 1 + total[k]))
        scores[:, begin:cut] /= scores[:, begin:cut].max()
        for head, k, score in first:
            scores[head, k] = score
    return scores, windows


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"factor": "norm", "first_stage": 0.5}, {"factor": None, "first_stage": 0}, {"kernel_size": 1}]
)
def test_defensivekv_is_its_formula(fair, changes):
    policy, spans = kvp.DefensiveKV(**{"window_size": 8, **changes}), {"a": (3, 14), "b": (14, 30)}
    kept = kvp.keep(policy, KEYS, QUERIES, values=VALUES, output=OUTPUT, budget=20, spans=spans, fair=fair)
    segments = list(pairwise([0, 3, 14, 30, 40])) if fair else [(0, 40)]
    for row in range(2):
        wanted, windows = defensive_by_hand(row, segments, policy)
        for cut, end in windows:
            assert (kept.scores[row, :, cut:end] > 2).all() and (kept.scores[row, :, cut:end].diff(dim=-1) > 0).all()
            wanted[:, cut:end] = kept.scores[row, :, cut:end]
        torch.testing.assert_close(kept.scores[row].double(), wanted, rtol=1e-4, atol=1e-6)
        assert ((wanted > 1) & (wanted <= 2)).any() == (policy.first_stage > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keydiff_looks_at_directions_only(dtype):
    """The length of a key changes nothing, to the ends of the exponent; tokens in another order have the same scores;
    no NaN for zeros."""
    keys = KEYS.to(dtype)
    scores = kvp.keep("keydiff", keys, budget=20).scores
    powers = torch.randint(-110, 110, keys.shape[:3], generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        kvp.keep("keydiff", torch.ldexp(keys.float(), powers[..., None]).to(dtype), budget=20).scores, scores
    )
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        kvp.keep("keydiff", keys[:, :, order], budget=20).scores, scores[:, :, order], rtol=0, atol=1e-6
    )
    some = keys.clone()
    some[0, :, 5:9] = 0
    found = kvp.keep("keydiff", some, budget=20).scores
    assert found.isfinite().all() and (found[0, :, 5:9] == 0).all() and torch.equal(found[1], scores[1])
    without = kvp.keep("keydiff", torch.cat([keys[:1, :, :5], keys[:1, :, 9:]], 2), budget=20).scores
    torch.testing.assert_close(torch.cat([found[:1, :, :5], found[:1, :, 9:]], 2), without, rtol=0, atol=1e-6)


def test_snapkv_shares_its_window_between_segments():
    kept = kvp.keep(kvp.SnapKV(window_size=9), KEYS, QUERIES, budget=20, spans=[(0, 2), (2, 25), (25, 40)], fair=True)
    window = (kept.scores[0, 0] >= 2).nonzero().flatten().tolist()
    assert window == [0, 1, *range(21, 25), *range(37, 40)]  # 3 each; the first segment's spare one goes to the second


@pytest.mark.parametrize("window_size", [1, 5, 16, 64])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_one_window_is_shared_out_whatever_the_number_of_segments(window_size, length):
    """Equal segments have equal parts, but for the last one, which has the rest; together they are no more than one
    window."""
    for n in range(1, 41):
        votes = kvp.SnapKV(window_size=window_size)._votes([(length * i, length * (i + 1)) for i in range(n)])
        parts = [end - begin for begin, end in (vote.queries for vote in votes)]
        share = max(1, window_size // n)
        assert parts[:-1] == [min(share, length)] * (n - 1)
        assert parts[-1] == min(length, max(1, window_size - sum(parts[:-1])))
        assert sum(parts) <= max(n, window_size)


def test_a_short_prompt_inside_snapkvs_window_keeps_the_newest():
    kept = kvp.keep("snapkv", KEYS[:, :, :10], QUERIES[:, :, :10], budget=4)
    assert (kept.positions == torch.arange(6, 10)).all()


def test_tova_keeps_the_same_tokens_in_all_heads():
    kept = kvp.keep("tova", KEYS, QUERIES, budget=7)
    assert (kept.positions == kept.positions[:, :1]).all() and (kept.positions[..., -1] == 39).all()


def test_streaming_llm_below_its_sinks_keeps_the_first_tokens():
    assert kvp.keep("streaming_llm", KEYS, budget=3).positions[0, 0].tolist() == [0, 1, 2]


def code_lines(source: str) -> set[int]:
    """The lines that hold code: no comment, no docstring, no import."""
    tree = ast.parse(source)
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {at for token in tokens if token.type not in skipped for at in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_docstring or is_import or is_for_types:
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_lines_of_code_are_counted():
    source = (
        '"""Doc.\n\nMore."""\nimport os\n\n# a comment\nx = (\n    1,\n)\n\ndef f():\n    """Doc."""\n    return x\n'
    )
    assert code_lines(source) == {7, 8, 9, 11, 13}


@pytest.mark.parametrize("name", ["random", "keydiff", "knorm", "adakv", "pyramidkv"])
def test_a_plain_policy_is_at_most_fifteen_lines(name):
    source = Path(importlib.import_module(f"kvpitfalls.policies.{name}").__file__).read_text("utf-8")
    assert 0 < len(code_lines(source)) <= 15


def test_a_policy_is_ten_lines(registry, smollm2):
    @dataclass(frozen=True)
    class EveryNth(kvp.Policy):
        """Keep every n-th token first."""

        n: int = 3
        name = "every_nth"

        def score(self, inputs):
            t = torch.arange(inputs.n_token)
            return (t % self.n == 0).float().expand(inputs.keys.shape[:3]).contiguous()

    model, tokens = build("llama"), ids(1, 20)
    spans = {"a": (0, 10), "b": (10, 20)}
    with kvp.wrap(model, "every_nth", budget=7) as handle:
        assert handle.compress(tokens).positions(1)[0, 0].tolist() == [0, 3, 6, 9, 12, 15, 18]
    with kvp.wrap(model, EveryNth(n=2), budget=6, fair=True, protect=[1]) as handle:
        assert handle.compress(tokens, spans=spans).positions(1)[0, 0].tolist() == [0, 1, 2, 10, 12, 14]
    assert "every_nth" in policy_names()
    prompt = kvp.Prompt.from_text(
        smollm2[1], "Be kind. Speak only Spanish.", {"kind": "Be kind.", "spanish": "Speak only Spanish."}
    )
    audited = kvp.audit(smollm2[0], prompt, policies=["every_nth", EveryNth(n=2)], compression_ratios=[0.5])
    assert [row["policy"] for row in audited.rows[::4]] == ["every_nth", repr(EveryNth(n=2))]
    with kvp.wrap(smollm2[0], EveryNth(n=2), compression_ratio=0.5, fair=True) as handle:
        kept = handle.compress(prompt).positions(0)[0, 0]
    assert audited.kept_mask(EveryNth(n=2), 0.5, True)[0, 0].nonzero()[0].tolist() == kept.tolist()
    with pytest.raises(ValueError, match="'knorm'"):
        type("Clash", (kvp.Policy,), {"name": "knorm"})
    with pytest.raises(TypeError, match="expected lower-case"):
        type("Nameless", (kvp.Policy,), {})
