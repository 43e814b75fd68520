"""What every registered policy must do, and that a new one takes ten lines."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.policies import get_policy, policy_names
from kvpitfalls.policies.base import _registry
from kvpitfalls.policies.random import Random

BUILT_IN = ["h2o", "keydiff", "knorm", "snapkv", "streaming_llm", "tova"]
KEYS = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(2, 9, 40, 16, generator=torch.Generator().manual_seed(1))


def test_names_and_aliases():
    assert set(BUILT_IN) <= set(policy_names())
    for name, policy in [
        ("streamingllm", kvp.StreamingLLM()),
        ("snap", kvp.SnapKV()),
        ("observed_attention", kvp.H2O()),
        ("SnapKV", kvp.SnapKV()),
        (kvp.TOVA, kvp.TOVA()),
        (kvp.KNorm(), kvp.KNorm()),
    ]:
        assert get_policy(name) == policy


@pytest.mark.parametrize("policy", BUILT_IN)
def test_every_policy_keeps_its_contract(policy):
    kept = kvp.keep(policy, KEYS, QUERIES, compression_ratio=0.5)
    assert kept.scores.shape == (2, 3, 40) and kept.scores.dtype == torch.float32 and kept.scores.isfinite().all()
    assert (kept.counts == 20).all()
    again = kvp.keep(policy, KEYS.transpose(1, 2).contiguous().transpose(1, 2), QUERIES, compression_ratio=0.5)
    assert torch.equal(kept.positions, again.positions)
    one = kvp.keep(policy, KEYS[1:], QUERIES[1:], compression_ratio=0.5)
    assert torch.equal(kept.positions[1:], one.positions)
    numpy = kvp.keep(policy, KEYS.numpy(), QUERIES.numpy(), compression_ratio=0.5)
    assert np.array_equal(numpy.positions, kept.positions.numpy())
    assert eval(
        repr(get_policy(policy)), vars(kvp) | {n: getattr(kvp, n) for n in ("H2O", "KNorm", "KeyDiff", "SnapKV", "StreamingLLM", "TOVA")}
    ) == get_policy(policy)


@pytest.mark.parametrize("policy", BUILT_IN)
def test_needs_queries_is_true_exactly_if_it_reads_them(policy):
    if get_policy(policy).needs_queries:
        with pytest.raises(ValueError, match="needs the queries"):
            kvp.keep(policy, KEYS, compression_ratio=0.5)
    else:
        assert torch.equal(
            kvp.keep(policy, KEYS, compression_ratio=0.5).positions, kvp.keep(policy, KEYS, QUERIES, compression_ratio=0.5).positions
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keydiff_looks_at_directions_only(dtype):
    """The length of a key changes nothing, to the ends of the exponent; tokens in another order have the same scores; no NaN for zeros."""
    keys = KEYS.to(dtype)
    scores = kvp.keep("keydiff", keys, budget=20).scores
    powers = torch.randint(-110, 110, keys.shape[:3], generator=torch.Generator().manual_seed(3))
    assert torch.equal(kvp.keep("keydiff", torch.ldexp(keys.float(), powers[..., None]).to(dtype), budget=20).scores, scores)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(kvp.keep("keydiff", keys[:, :, order], budget=20).scores, scores[:, :, order], rtol=0, atol=1e-6)
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
    """Equal segments have equal parts, but for the last one, which has the rest; together they are no more than one window."""
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
    prompt = kvp.Prompt.from_text(smollm2[1], "Be kind. Speak only Spanish.", {"kind": "Be kind.", "spanish": "Speak only Spanish."})
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
    """Every place is kept equally often; heads differ; a row's draw is the same alone, in a batch, and behind padding."""
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
