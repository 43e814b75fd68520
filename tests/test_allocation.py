"""Laws of every way to share a budget over layers and heads, with every policy, fairness and protection."""

import copy
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from model_sweep import build as build_any
from model_sweep import not_refused
from tiny_models import build, tiny_prompt
from tiny_policies import EQUAL, EVERY, kept_by

import kvpitfalls as kvp
from kvpitfalls.eviction.allocation import Ada, Pyramid
from kvpitfalls.eviction.budget import kept_tokens
from kvpitfalls.hf.parts import decoder_of

N_TOKEN, N_LAYER, N_HEAD = 40, 3, 4
SPANS = {"a": (3, 9), "b": (12, 26), "c": (26, 35)}
FAIRS = [False, True, 0.3, "floor=2"]
PROTECTS = [None, "a", "sinks", ["boundary", 20]]
SHARED = [Pyramid(beta=2), Pyramid(beta=1.5, window_size=2), Ada(), Ada(alpha=0), Ada(alpha=0.5)]
ROTARY = kvp.Rotary()
RNG = np.random.default_rng(5)
OUTPUT = np.random.default_rng(6).standard_normal((8, 8, 12), dtype=np.float32)


def layers_of(n_row=1, n_token=N_TOKEN):
    """Keys, queries and values of each layer; heads attend with different force, or there would be little to share."""
    force = np.array([0.3, 1, 3, 6], np.float32)[:, None, None]
    for _ in range(N_LAYER):
        keys, values = (RNG.standard_normal((n_row, N_HEAD, n_token, 8), dtype=np.float32) for _ in range(2))
        yield keys * force, RNG.standard_normal((n_row, 2 * N_HEAD, n_token, 8), dtype=np.float32), values


LAYERS = list(layers_of())


def kept_of(policy, allocation=None, layers=LAYERS, **settings):
    """What each layer keeps."""
    return [
        kept_by(
            policy,
            keys,
            queries,
            values=values,
            rotary=ROTARY,
            output=OUTPUT,
            layer=i,
            n_layer=N_LAYER,
            allocation=allocation,
            **settings,
        )
        for i, (keys, queries, values) in enumerate(layers)
    ]


def held(kept):
    """Bool (B, H, T): which tokens."""
    mask = np.zeros((*kept.positions.shape[:2], kept.scores.shape[2] + 1), bool)
    np.put_along_axis(mask, kept.positions, True, -1)
    return mask[..., :-1]


@pytest.mark.parametrize("policy", EQUAL, ids=lambda policy: policy.name)
@pytest.mark.parametrize("allocation", SHARED, ids=str)
def test_all_layers_and_heads_together_keep_what_an_equal_share_would(policy, allocation):
    for fair in FAIRS:
        for protect in PROTECTS:
            given = {"budget": 20, "spans": SPANS, "fair": fair, "protect": protect}
            equal, shared = kept_of(policy, **given), kept_of(policy, allocation, **given)
            assert sum(k.counts.sum() for k in shared) == N_LAYER * N_HEAD * 20, (fair, protect)
            for k in shared:
                mask = held(k)
                assert (mask.sum(-1) == k.counts).all() and (k.counts >= (allocation != Ada(alpha=0))).all()
                assert protect != "a" or mask[..., 3:9].all()
                assert fair != "floor=2" or all(
                    (mask[..., low:high].sum(-1) >= 2).all() for low, high in SPANS.values()
                )
            if allocation.shares_heads:  # each layer keeps what it would
                assert [k.counts.sum() for k in shared] == [k.counts.sum() for k in equal]
            else:
                assert all((k.counts == k.counts[0, 0]).all() for k in shared)


@pytest.mark.parametrize("policy", EQUAL, ids=lambda policy: policy.name)
@pytest.mark.parametrize("allocation", SHARED, ids=str)
def test_a_layer_keeps_equal_shares_of_any_two_instructions(policy, allocation):
    for k in kept_of(policy, allocation, budget=17, spans=SPANS, fair=True):
        shares = {name: held(k)[0, :, low:high].mean() for name, (low, high) in SPANS.items()}
        for one, other in combinations(SPANS, 2):
            shorter = min(high - low for low, high in (SPANS[one], SPANS[other]))
            assert abs(shares[one] - shares[other]) < 1 / shorter


@pytest.mark.parametrize("strength", [0, 0.3, 1])
@pytest.mark.parametrize("allocation", [Ada(), Ada(alpha=0)], ids=str)
def test_every_head_keeps_the_floor_of_every_instruction(allocation, strength):
    """Min_tokens is for the head that keeps least; what heads of other force share leaves it."""
    least = {"budget": 20, "spans": SPANS, "fair": kvp.Fair(strength=strength, min_tokens=2)}
    for policy in EQUAL:
        for protect in PROTECTS:
            for k in kept_of(policy, allocation, **least, protect=protect):
                n_least = [held(k)[..., low:high].sum(-1).min() for low, high in SPANS.values()]
                assert min(n_least) >= 2, (policy, protect, n_least)


@pytest.mark.parametrize("fair", FAIRS)
def test_an_equal_share_is_the_limit_of_both(fair):
    for policy in EQUAL:
        for allocation in (Pyramid(beta=1), Ada(alpha=1))[
            : 1 if fair == 0.3 else 2
        ]:  # Ada rounds what lies between over all heads
            given = {"budget": 15, "spans": SPANS, "fair": fair}
            for a, b in zip(kept_of(policy, **given), kept_of(policy, allocation, **given), strict=True):
                assert np.array_equal(a.positions, b.positions), policy


@pytest.mark.parametrize("alpha", [0, 0.2, 0.35, 1])
def test_ada_keeps_the_best_of_all_heads_and_some_of_each(alpha):
    """Against its definition: sort all (score, head, position) of the layer; each head's best few come first."""
    for ties in (False, True):
        for budget in (3, 10, 29):
            keys = np.round(LAYERS[0][0]) if ties else LAYERS[0][0]
            kept = kvp.keep("knorm", keys, budget=budget, allocation=Ada(alpha))
            scores = kept.scores[0]
            order = [sorted(range(N_TOKEN), key=lambda t, h=h: (-scores[h, t], t)) for h in range(N_HEAD)]
            n_sure = max(int(alpha > 0), int(round(alpha * 100) * budget / 100))
            sure = {(h, t) for h in range(N_HEAD) for t in order[h][:n_sure]}
            rest = sorted((-scores[h, t], h, t) for h in range(N_HEAD) for t in range(N_TOKEN) if (h, t) not in sure)
            expected = sure | {(h, t) for _, h, t in rest[: N_HEAD * budget - len(sure)]}
            assert {(h, t) for h, t in np.argwhere(held(kept)[0])} == expected


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_ada_gives_is_what_heads_may_have(data):
    """The same sums, of each head its floor and what must be kept of it at least, no more than a segment has; by NumPy
    and by torch."""
    n_row, n_head, n_segment = (data.draw(st.integers(low, 4)) for low in (1, 2, 1))
    rng, alpha = (
        np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))),
        data.draw(st.sampled_from([0, 0.2, 0.5, 1])),
    )
    edges = np.sort(rng.integers(0, 31, (n_row, n_segment + 1)), axis=-1).astype(np.int32)
    if data.draw(st.booleans()):
        edges[:, 0], edges[:, -1] = 0, 30
    widths = np.diff(edges)
    quotas = np.repeat(rng.integers(0, widths + 1, widths.shape)[:, None], n_head, axis=1).astype(np.int32)
    scores = rng.choice([np.nan, np.inf, -np.inf, 0, 1, 2, 3, 4], (n_row, n_head, 30)).astype(np.float32)
    scores[:, 0] *= data.draw(st.sampled_from([1, 100]))
    shared = Ada(alpha).heads(scores, edges, quotas)
    assert shared.dtype == np.int32 and (shared.sum(1) == quotas.sum(1)).all() and (shared <= widths[:, None]).all()
    infinite = [
        [[np.isposinf(of_head[low:high]).sum() for low, high in pairwise(row)] for of_head in of_row]
        for of_row, row in zip(scores, edges, strict=True)
    ]
    floors = np.minimum(quotas, np.maximum(quotas * round(alpha * 10) // 10, alpha > 0))
    assert (shared >= np.maximum(floors, np.minimum(infinite, quotas))).all()
    assert np.array_equal(Ada(alpha).heads(torch.from_numpy(scores), edges, quotas), shared)


@given(st.integers(2, 3000), st.integers(0, 99), st.integers(2, 40), st.floats(1, 40), st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_a_pyramid_falls_evenly_and_its_sum_is_exact(n_token, percent, n_layer, beta, window_size):
    n_kept, pyramid = kept_tokens(n_token, percent / 100), Pyramid(beta, window_size)
    assume(n_kept < n_token)
    try:
        budgets = pyramid.layers(n_token, n_kept, n_layer)
    except kvp.BudgetError:
        assert (
            n_kept > n_token - window_size or min(n_kept / beta, n_kept) < max(1, window_size) or 2 * n_kept < n_token
        )
        return
    steps = -np.diff(budgets)
    assert (
        sum(budgets) == n_kept * n_layer and (steps >= -1).all() and steps.max() - steps.min() <= 2
    )  # each is rounded
    assert max(1, window_size) <= budgets[-1] and budgets[0] <= n_token - window_size


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_a_row_of_a_padded_batch_keeps_what_it_keeps_alone(policy):
    layers = list(layers_of(n_row=2))
    valid, spans = [(7, N_TOKEN), (0, N_TOKEN)], [{"a": (10, 16), "b": (20, 33)}, SPANS]
    allocations = [None] if policy not in EQUAL else [None, *SHARED]
    for allocation in allocations:
        for fair in FAIRS:
            given = {"compression_ratio": 0.55, "fair": fair}
            both = kept_of(policy, allocation, layers, valid=valid, spans=spans, **given)
            for row, (low, high) in enumerate(valid):
                mine = [tuple(x[row : row + 1, :, low:high] for x in layer) for layer in layers]
                moved = {name: (begin - low, end - low) for name, (begin, end) in spans[row].items()}
                for a, b in zip(both, kept_of(policy, allocation, mine, spans=moved, **given), strict=True):
                    assert np.array_equal(held(a)[row, :, low:high], held(b)[0]), (allocation, fair)


@pytest.mark.parametrize("allocation", [Ada(), Ada(alpha=0)], ids=str)
def test_heads_may_stand_in_any_order_and_scores_in_any_array(allocation):
    keys, order = LAYERS[1][0], [2, 0, 3, 1]
    settings = {"budget": 14, "spans": SPANS, "fair": True, "protect": "a", "allocation": allocation}
    kept = kvp.keep("knorm", keys, **settings)
    assert np.array_equal(held(kvp.keep("knorm", keys[:, order], **settings)), held(kept)[:, order])
    by_torch = kvp.keep("knorm", torch.from_numpy(keys), **settings)
    assert (
        np.array_equal(by_torch.positions.numpy(), kept.positions) and by_torch.quotas.tolist() == kept.quotas.tolist()
    )


def test_scores_that_are_no_numbers_or_infinite_come_last_or_first():
    """A head of NaN keeps its part only; infinite scores take no head's part away, or what is protected."""
    keys = LAYERS[0][0].copy()
    keys[0, 1] = np.nan
    kept = kvp.keep("knorm", keys, budget=10, allocation=Ada(alpha=0.2))
    assert kept.counts[0, 1] == 2 and kept.counts.sum() == 40

    @dataclass(frozen=True)
    class Certain(kvp.Policy):
        name = "certain_head"
        listed = False

        def score(self, inputs):
            scores = inputs.score("norm")
            scores[:, 2] = np.inf
            return scores

    kept = kvp.keep(Certain(), LAYERS[0][0], budget=10, allocation=Ada(alpha=0.2), protect=[39, 7, 8])
    assert kept.counts.tolist() == [[3, 3, 31, 3]] and held(kept)[..., [39, 7, 8]].all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize(
    ("policy", "allocation"),
    [(kvp.AdaKV(window_size=2, kernel_size=1), None), ("h2o", "ada"), ("h2o", Pyramid(beta=2)), ("knorm", Ada(0.5))],
)
def test_a_cache_of_slots_answers_as_a_mask_of_the_same_tokens_would(policy, allocation, fair, padded, tmp_path):
    """And so do its copy, a saved one, one of fixed size, and one joined with another budget's."""
    model, tokens = build("llama"), torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, : 5 * padded] = 0
    spans = [{"a": (6, 12), "b": (12, 20)}] * 2
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair, allocation=allocation) as handle:
        cache = handle.compress(tokens, mask, spans)
        n_kept = [[kept_tokens(int(row.sum()), 0.5)] for row in mask]
        counts = np.array([layer["kept"] for layer in cache.report()["layers"]])
        assert (counts.sum((0, 2)) == np.array(n_kept)[:, 0] * counts.shape[0] * counts.shape[2]).all()
        assert len(np.unique(counts)) > 1 + padded  # something was shared
        cache.save(tmp_path / "cache.safetensors")
        many = {
            "past_key_values": None,
            "max_new_tokens": 5,
            "min_new_tokens": 5,
            "do_sample": False,
            "pad_token_id": 0,
        }
        many |= {"return_dict_in_generate": True, "output_logits": True}
        ids = torch.cat([tokens, tokens[:, :2]], 1)
        full = torch.cat([mask, torch.ones_like(ids[:, :2])], 1)
        others = [cache.copy(), kvp.load_cache(tmp_path / "cache.safetensors", model), cache.fixed(12)]
        outs = [model.generate(ids, attention_mask=full, **many | {"past_key_values": c}) for c in others]
    expected = masked_logits(model, cache, outs[0].sequences[:, :-1], full)
    for out in outs:
        assert torch.equal(out.sequences, outs[0].sequences)
        assert torch.allclose(torch.stack(out.logits, 1), expected[:, -5:], atol=1e-5, rtol=0)


def masked_logits(model, cache, ids, mask):
    """Logits of one forward of the model alone, each layer and head seeing of the prompt what the cache kept of it."""
    n_prompt, n_all = 24, ids.shape[1]
    seen = torch.ones(n_all, n_all, dtype=torch.bool).tril().repeat(len(ids), 1, 1)
    seen[:, :, : mask.shape[1]] &= mask[:, None].bool()
    masks = []
    for layer in cache.kept_layers:
        kept = torch.zeros(*layer.keys.shape[:2], n_prompt + 1, dtype=torch.bool)
        kept.scatter_(2, torch.from_numpy(cache.positions(layer.index).copy()).long() % (n_prompt + 1), True)
        of_layer = seen[:, None].repeat(1, layer.keys.shape[1], 1, 1)
        of_layer[:, :, n_prompt:, :n_prompt] &= kept[:, :, None, :-1]
        masks.append(of_layer)
    return forward_with(model, ids, mask, masks)


def forward_with(model, ids, mask, masks):
    modules = [layer.self_attn for layer in model.model.layers]
    config = model.config
    before, config._attn_implementation = config._attn_implementation, "by_head"
    from transformers import AttentionInterface

    def by_head(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        allowed = masks[modules.index(module)].repeat_interleave(group, 1)
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -1e30)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("by_head", by_head)
    try:
        full = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        with torch.no_grad():
            return model(ids, position_ids=(full.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    finally:
        config._attn_implementation = before


def test_a_report_tells_kept_tokens_slots_and_bytes_apart():
    model = build("llama")
    tokens = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(1))
    with kvp.wrap(model, "h2o", budget=8, allocation=Ada(alpha=0)) as handle:
        report = handle.compress(tokens).report()
    for layer in report["layers"]:
        assert layer["n_slots"] == np.max(layer["kept"]) and np.sum(layer["kept"]) == 8 * len(layer["kept"][0])
        assert layer["bytes_kept"] * layer["n_slots"] * len(layer["kept"][0]) == layer["bytes_after"] * np.sum(
            layer["kept"]
        )
    assert report["bytes_kept"] == sum(layer["bytes_kept"] for layer in report["layers"]) < report["bytes_after"]
    assert "are empty slots, which a ragged layout would save" in report._repr_html_()


class Wrong(kvp.Allocation):
    """Gives what it is told."""

    shares_heads = True

    def __init__(self, layers=None, heads=None):
        self.of_layers, self.of_heads = layers, heads

    def __repr__(self):  # a test's name, the same in every process
        return f"Wrong({self.of_layers}, {self.of_heads})"

    def layers(self, n_token, n_kept, n_layer):
        return [n_kept] * n_layer if self.of_layers is None else self.of_layers

    def heads(self, scores, edges, quotas):
        return quotas if self.of_heads is None else np.array(self.of_heads)


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (Wrong([5, 5]), r"gives the layers \[5, 5\]; expected 3 whole numbers from 1 to 40 with the sum 24"),
        (Wrong([8, 8, 9]), "with the sum 24"),
        (Wrong(24), r"gives the layers 24; expected 3 whole numbers"),
        (Wrong([24, 0, 0]), "whole numbers from 1"),
        (Wrong([8.0, 8.0, 8.0]), "whole numbers"),
        (Wrong(heads=[[[8], [8]]]), r"gives quotas int64 \(1, 2, 1\); expected whole numbers \(1, 4, 1\)"),
        (Wrong(heads=[[[8], [8], [8], [9]]]), "other sums"),
        (Wrong(heads=[[[32], [0], [0], [0]]]), "below what must be kept"),
        ("even", "allocation is 'even'; expected one of 'uniform', 'pyramid', 'ada'"),
        (
            Pyramid(beta=20),
            "the last layer would keep 0.4; allocation .* expects at least 1: a larger budget, or a smaller beta",
        ),
        (
            Pyramid(beta=1, window_size=33),
            "8 of 40 tokens are kept; allocation .* expects a prompt of at least 66, a window .* or a smaller",
        ),
    ],
    ids=str,
)
def test_what_an_allocation_may_not_say(allocation, message):
    with pytest.raises(ValueError, match=message):
        kept_of("knorm", allocation, budget=8, protect=[4])


def test_where_there_is_nothing_to_share_between():
    keys, queries, _ = LAYERS[0]
    with pytest.raises(
        ValueError, match="n_layer is 1; allocation 'pyramid' shares over layers and expects at least 2"
    ):
        kvp.keep("knorm", keys, budget=8, allocation="pyramid")
    with pytest.raises(ValueError, match="one choice serves all heads here; allocation 'ada' shares over heads"):
        kvp.keep("knorm", keys[:, :1], budget=8, allocation="ada")
    with pytest.raises(ValueError, match=r"policy 'adakv' has one of its own, Ada.*, and expects none"):
        kvp.keep("adakv", keys, queries, budget=8, allocation="pyramid", n_layer=3)
    with pytest.raises(TypeError, match=r"allocation is a int; expected a kvpitfalls.Allocation or one of"):
        kvp.keep("knorm", keys, budget=8, allocation=3)
    of_policies = {policy: f"allocation of policy '{policy}'" for policy in ("adakv", "pyramidkv")}
    for policy, said in {"h2o": "allocation", **of_policies}.items():
        allocation = "ada" if policy == "h2o" else None
        for when in ("always", "decode"):
            with pytest.raises(ValueError, match=rf"^{said} is (Ada|Pyramid)\(.*; when='{when}' expects 'uniform'"):
                kvp.wrap(build("llama"), policy, budget=8, allocation=allocation, when=when)
    with pytest.raises(kvp.BudgetError, match="the budget of row 0 is 2 tokens, but 6 are protected"):
        kept_of("knorm", Pyramid(beta=4), budget=8, spans=SPANS, protect="a")


@pytest.mark.parametrize(
    ("family", "changes"), [("deepseek_v3", {}), ("diffllama", {}), ("llama", {"num_key_value_heads": 1})]
)
def test_a_model_whose_heads_share_one_choice_is_refused_before_it_runs(family, changes):
    """When it is wrapped, and before a forward where it is not: nothing is half filled, the model is as it was."""
    if not not_refused(family):
        pytest.skip("this release's model is refused for another reason")
    model = build(family, **changes) if changes else build_any(family, "eager")
    with kvp.wrap(model, "knorm", budget=8) as handle:
        layers = handle.compress(torch.arange(3, 20)[None]).kept_layers
    if not changes and not layers[0].shared:
        pytest.skip("this release caches the keys of every head")
    told = r"^one choice serves all heads of layer 0 of \w+; an allocation that shares over heads expects at least 2"
    for policy, allocation in (("knorm", "ada"), (kvp.AdaKV(window_size=2), None)):
        with pytest.raises(ValueError, match=told):
            kvp.wrap(model, policy, budget=8, allocation=allocation)
        assert "forward" not in vars(decoder_of(model)) and "generate" not in vars(model)
    settings = {"policies": ["knorm"], "compression_ratios": [0.5], "allocation": "ada"}
    with pytest.raises(ValueError, match=told):
        kvp.audit(model, tiny_prompt(), **settings)
    with kvp.wrap(model, "knorm", budget=8) as handle:
        handle.compress(torch.arange(3, 20)[None])
    kvp.wrap(model, "knorm", compression_ratio=0, allocation="ada").remove()  # nothing is shared


def test_budgets_of_layers_are_asked_for_once_a_prompt():
    """By a wrap: an allocation that draws holds to what it drew, and one that was changed in between is asked anew."""
    asked, model = [], build("llama")

    class Slope(kvp.Allocation):
        step = 1

        def layers(self, n_token, n_kept, n_layer):
            asked.append(n_token)
            return [n_kept + self.step, n_kept, n_kept - self.step]

    allocation = Slope()
    for step in (1, 3, 2):
        allocation.step = step
        expected = [8 + step, 8, 8 - step]
        with kvp.wrap(model, "knorm", budget=8, allocation=allocation) as handle:
            cache = handle.compress(torch.arange(3, 33)[None])
            assert repr(cache) and [layer["kept"][0][0] for layer in cache.report()["layers"]] == expected
        assert [int(kept.counts[0, 0]) for kept in kept_of("knorm", allocation, budget=8)] == expected
    assert asked == [30, *[N_TOKEN] * N_LAYER] * 3


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_what_heads_write_to_is_their_own(library):
    """Scores, edges and quotas: what is selected, and what the quotas are held to, stays as it was."""

    class Writes(kvp.Allocation):
        shares_heads = True

        def heads(self, scores, edges, quotas):
            given = quotas.copy()
            given[:, 0, -1] += 1
            given[:, 1, -1] -= 1
            scores[:], edges[:], quotas[:] = 0, 0, 0
            return given

    class Reads(Writes):
        def heads(self, scores, edges, quotas):
            return super().heads(*map(copy.deepcopy, (scores, edges, quotas)))

    keys = library(LAYERS[0][0])
    given = {"budget": 12, "spans": SPANS, "fair": True, "protect": [20]}
    writes, reads = (kvp.keep("knorm", keys, allocation=allocation(), **given) for allocation in (Writes, Reads))
    assert np.array_equal(writes.positions, reads.positions) and np.array_equal(writes.scores, reads.scores)
    assert np.array_equal(writes.quotas, reads.quotas) and len(np.unique(reads.counts)) > 1


@pytest.mark.parametrize(
    "given", [[[1], [2, 3]], object(), torch.ones(1, 2, 1, dtype=torch.int32, device="meta")], ids=type
)
def test_quotas_that_are_no_array_are_refused(given):
    wrong = type("Gives", (kvp.Allocation,), {"shares_heads": True, "heads": lambda self, *inputs: given})()
    with pytest.raises(ValueError, match=r"allocation .* gives quotas .*; expected .*whole numbers \(1, 4, 1\)"):
        kept_of("knorm", wrong, budget=8)


def test_heads_that_nobody_asks_for_are_refused():
    """A class that shares a layer's budget over its heads and does not say so would share it equally."""
    with pytest.raises(TypeError, match=r"allocation Silent defines heads, .* expected shares_heads = True"):
        type("Silent", (kvp.Allocation,), {"heads": Wrong.heads})
    assert type("Told", (Wrong,), {}).shares_heads
