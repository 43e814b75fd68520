"""What every registered policy must do, and that a new one takes ten lines."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import build, ids
from tiny_policies import EQUAL, EVERY, is_defined

import kvpitfalls as kvp
from kvpitfalls.policies import get_policy, policy_names
from kvpitfalls.policies.base import _registry
from kvpitfalls.policies.random import Random

KEYS = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(2, 9, 40, 16, generator=torch.Generator().manual_seed(1))
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


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_every_policy_keeps_its_contract(policy):
    given = {"compression_ratio": 0.5, "layer": 1, "n_layer": 3}  # the middle one: no pyramid gives it more or less
    kept = kvp.keep(policy, KEYS, QUERIES, values=VALUES, **given)
    assert kept.scores.shape == (2, 3, 40) and kept.scores.dtype == torch.float32 and kept.scores.isfinite().all()
    assert (kept.counts.sum(1) == 60).all() and (policy not in EQUAL or (kept.counts == 20).all())
    again = kvp.keep(policy, KEYS.transpose(1, 2).contiguous().transpose(1, 2), QUERIES, values=VALUES, **given)
    assert torch.equal(kept.positions, again.positions)
    one = kvp.keep(policy, KEYS[1:], QUERIES[1:], values=VALUES[1:], **given)
    assert torch.equal(kept.positions[1:, :, : one.positions.shape[2]], one.positions) and torch.equal(
        kept.counts[1:], one.counts
    )
    numpy = kvp.keep(policy, KEYS.numpy(), QUERIES.numpy(), values=VALUES.numpy(), **given)
    assert np.array_equal(numpy.positions, kept.positions.numpy())
    assert eval(repr(policy), {name: getattr(kvp, name) for name in kvp.__all__}) == policy


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_a_policy_says_exactly_what_it_reads(policy):
    given = {"compression_ratio": 0.5, "queries": QUERIES, "values": VALUES, "layer": 1, "n_layer": 3}
    whole = kvp.keep(policy, KEYS, **given).positions
    for name, needs, what in (
        ("queries", policy.needs_queries, "the queries"),
        ("values", policy.needs_values, "values"),
    ):
        without = {key: value for key, value in given.items() if key != name}
        if needs:
            with pytest.raises(ValueError, match=f"^{name} is None; policy '{policy.name}' .* needs {what}"):
                kvp.keep(policy, KEYS, **without)
        else:
            assert torch.equal(kvp.keep(policy, KEYS, **without).positions, whole)


def test_values_and_layers_that_do_not_fit_are_refused():
    given = {"compression_ratio": 0.5}
    with pytest.raises(
        ValueError,
        match=r"^values has shape \(2, 3, 39, 24\); expected \(2, 3, 40\) before the last dimension, as keys has",
    ):
        kvp.keep("knorm", KEYS, values=VALUES[:, :, :39], **given)
    with pytest.raises(TypeError, match=r"^values is a ndarray and keys is a Tensor; expected the same type"):
        kvp.keep("knorm", KEYS, values=VALUES.numpy(), **given)
    with pytest.raises(TypeError, match=r"^layer is 0.5; expected a whole number"):
        kvp.keep("knorm", KEYS, layer=0.5, **given)
    with pytest.raises(ValueError, match=r"^layer is 2 of 2; expected one in \[0, 2\)"):
        kvp.keep("knorm", KEYS, layer=2, n_layer=2, **given)


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
        ValueError, match=rf"^policy LagKV\(n_sink={n_sink}, .*given 40 tokens, of which 1 are kept.*a larger budget"
    ):
        kvp.keep(policy, KEYS, values=VALUES, budget=1)
    told = pytest.raises(ValueError, match="expected a prompt of at least 260 tokens")
    with kvp.wrap(build("llama"), kvp.LagKV(), compression_ratio=0.5) as handle, told:
        handle.compress(ids(1, 20))
    with pytest.raises(
        ValueError, match=r"^policy is 'lagkv', which judges a prompt that is whole; when='always' expects another"
    ):
        kvp.wrap(build("llama"), kvp.LagKV(), compression_ratio=0.5, when="always")


def test_lagkv_survives_channels_that_do_not_vary():
    keys = KEYS.clone()
    keys[..., ::2] = 1
    for same in (keys, torch.ones_like(KEYS)):
        kept = kvp.keep(kvp.LagKV(2, 4), same, values=same, budget=20)
        assert kept.scores.isfinite().all() and (kept.counts == 20).all()


def test_chunkkv_keeps_whole_chunks_and_no_chunk_lies_in_two_instructions():
    spans = {"a": (3, 14), "b": (14, 30)}
    scores = kvp.keep(kvp.ChunkKV("keydiff", 4), KEYS, budget=20, spans=spans, fair=True).scores
    edges = [0, 3, 7, 11, 14, 18, 22, 26, 30, 34, 38, 40]
    for begin, end in pairwise(edges):
        assert (scores[:, :, begin:end] == scores[:, :1, begin : begin + 1]).all()
    assert all(len(set(row[0].tolist())) == len(edges) - 1 for row in scores)


def test_chunkkv_keeps_instructions_whole_or_not_at_all():
    policy = kvp.ChunkKV("keydiff", "instructions")
    spans = {"a": (3, 14), "b": (14, 30)}
    edges = [(0, 3), (3, 14), (14, 30), (30, 40)]
    for budget in range(1, 40):
        kept = kvp.keep(policy, KEYS, budget=budget, spans=spans).positions
        for head in kept.flatten(0, 1):
            shares = [sum(begin <= t < end for t in head.tolist()) / (end - begin) for begin, end in edges]
            assert sum(0 < share < 1 for share in shares) <= 1
    for fair in (True, 0.5):
        with pytest.raises(
            ValueError, match="was given segments that have quotas; expected instructions, and fair=False or a floor"
        ):
            kvp.keep(policy, KEYS, budget=20, spans=spans, fair=fair)
    with pytest.raises(ValueError, match="was given no instructions; expected instructions"):
        kvp.keep(policy, KEYS, budget=20)
    kept = kvp.keep(policy, KEYS, budget=20, spans=spans, fair="floor=2").positions
    assert all(((kept >= begin) & (kept < end)).sum(-1).min() >= 2 for begin, end in spans.values())
    for wrong in (0, -1, True, 2.0, "sentences"):
        with pytest.raises(ValueError, match=r"^chunks is .*; expected a whole number, at least 1, or 'instructions'"):
            kvp.ChunkKV("keydiff", wrong)
    with pytest.raises(
        ValueError, match=r"^policy is AdaKV.*, which shares its budget by itself; expected one that scores tokens"
    ):
        kvp.ChunkKV("adakv")
    with pytest.raises(ValueError, match=r"^policy is a ChunkKV itself"):
        kvp.ChunkKV(kvp.ChunkKV())


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


@pytest.fixture
def registry():
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)


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
