"""A press by one call of the core keeps, to the bit, what scoring, selecting and gathering keep."""

import numpy as np
import pytest
import torch
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.eviction import ops
from kvpitfalls.eviction.allocation import get_allocation
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.eviction.layer_inputs import LayerInputs
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.eviction.selection import budgets_of, choose, evict, press, rank
from kvpitfalls.hf.evict import Evict
from kvpitfalls.policies import get_policy

N_TOKEN, SPANS = 40, {"a": (8, 19), "b": (19, 33)}
BY_ONE_CALL = {"streaming_llm", "snapkv", "tova", "h2o", "knorm", "keydiff", "lagkv", "adakv", "pyramidkv"}
FAIR = [False, True, "paper", 0.5, "floor=2"]


def arrays(dtype, library):
    generator = torch.Generator().manual_seed(3)
    drawn = (
        torch.randn(2, n_head, N_TOKEN, n_dim, generator=generator).to(dtype)
        for n_head, n_dim in ((3, 16), (3, 24), (6, 16))
    )
    return [x.numpy() if library == "numpy" else x.to("cuda" if library == "cuda" else "cpu") for x in drawn]


@pytest.mark.parametrize("protect", [None, ["a", 34]], ids=["free", "protected"])
@pytest.mark.parametrize("valid", [None, [(0, 40), (5, 40)]], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("dtype", "library"),
    [
        (torch.float32, "numpy"),
        (torch.float32, "torch"),
        (torch.float16, "torch"),
        (torch.bfloat16, "torch"),
        pytest.param(
            torch.float32, "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
        ),
    ],
)
@pytest.mark.parametrize("name", sorted(BY_ONE_CALL))
def test_a_press_keeps_what_three_calls_keep(name, dtype, library, valid, protect):
    policy = (
        kvp.SnapKV(8, 3) if name == "snapkv" else kvp.PyramidKV(2, 3, 4) if name == "pyramidkv" else get_policy(name)
    )
    keys, values, queries = arrays(dtype, library)
    for label in FAIR:
        fair = Fair.parse(label)
        settings = {"valid": valid, "spans": SPANS, "protect": protect, "n_sink": policy.n_sink}
        layout = Layout.of(2, N_TOKEN, **settings, limit=lambda n: 18)
        allocation = get_allocation(policy.allocation)
        split, layer = layout.split(fair), LayerInputs(keys, queries, values, layer=1, n_layer=3)
        budgets = budgets_of(layout, lambda n: 18, allocation, 3)
        pressed, ranked = press(policy, split, layer, budgets, allocation), rank(policy, split, layer)
        evicted = evict(ranked, keys, values, budgets, allocation)
        is_plain = label in (False, True) or (label == "paper" and policy.paper_quotas)
        is_one_call = is_plain and not (allocation.shares_heads and protect)
        assert (pressed is not None) == is_one_call == (evicted is not None)
        if not is_one_call:
            continue
        kept = choose(ranked, budgets, allocation)
        expected = kept.positions, *ops.gather(keys, values, kept.positions), kept.plan.quotas, kept.plan.edges
        for made in (pressed, evicted):
            assert made.plan.is_full == bool((kept.counts == kept.positions.shape[-1]).all())
            all_of = made.positions, made.keys, made.values, made.plan.quotas, made.plan.edges
            for ours, theirs in zip(all_of, expected, strict=True):
                assert type(ours) is type(theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert bool((ours == theirs).all())


def test_every_policy_says_whether_it_is_one_call():
    keys, values, queries = arrays(torch.float32, "torch")
    layout, found = Layout.of(2, N_TOKEN), set()
    for name in kvp.policies.policy_names():
        policy = get_policy(name)
        if not (policy.needs_rotary or policy.needs_output or policy.needs_again):
            layer = LayerInputs(keys, queries, values)
            if press(policy, layout.split(Fair.parse(False)), layer, [(20, 20)]) is not None:
                found.add(name)
    assert found == BY_ONE_CALL


def test_a_policy_that_scores_anew_is_not_pressed_by_its_parents_call():
    try:

        class Opposite(kvp.KNorm):
            """The keys of largest norm."""

            name = "opposite"

            def score(self, inputs):
                return -super().score(inputs)

        keys, values, _ = arrays(torch.float32, "torch")
        split = Layout.of(2, N_TOKEN).split(Fair.parse(False))
        assert press(Opposite(), split, LayerInputs(keys, None, values), [(9, 9)]) is None
        ours, theirs = (kvp.keep(policy, keys, budget=9).scores for policy in (Opposite(), kvp.KNorm()))
        assert torch.equal(ours, -theirs)
    finally:
        kvp.policies.base._registry.pop("opposite", None)


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", ["adakv", "knorm", "snapkv", "streaming_llm"])
def test_a_wrap_presses_and_holds_what_it_held_by_three_calls(policy, fair, monkeypatch):
    model, tokens, spans = build("llama"), ids(2, 30), {"a": (3, 12), "b": (14, 25)}
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    presses, calls = [], ops.press_checked
    monkeypatch.setattr(ops, "press_checked", lambda *args, **kwargs: presses.append(1) or calls(*args, **kwargs))

    def cache():
        with kvp.wrap(model, policy, budget=12, fair=fair) as handle:
            return handle.compress(tokens, attention_mask=mask, spans=[spans, {"b": (14, 25), "c": (26, 29)}])

    ours = cache()
    assert len(presses) == model.config.num_hidden_layers
    monkeypatch.setattr(Evict, "pressed", lambda self, layer, call, task: None)
    theirs = cache()
    assert len(presses) == model.config.num_hidden_layers
    for a, b in zip(ours.kept_layers, theirs.kept_layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert np.array_equal(a.kept_positions, b.kept_positions) and np.array_equal(a.kept_counts, b.kept_counts)
