"""A budget that is held while generating: its size, who is kept, and that what is gone is all that is missing."""

import copy
import dataclasses
import itertools
from fractions import Fraction
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from model_sweep import build as build_type
from model_sweep import mixed, not_refused
from tiny_models import build, feed, ids
from tiny_policies import HELD, rkv_by_hand
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import kvpitfalls as kvp
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.hf.hold import Held, Hold
from kvpitfalls.policies import base

POLICIES = [policy.name for policy in HELD]
N_PROMPT, N_STEP, BUDGET = 14, 16, 10
SPANS = {"a": (1, 6), "b": (6, 12)}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
WINDOW = {"snapkv": kvp.SnapKV(window_size=4, kernel_size=3), "rkv": kvp.RKV(window_size=4, kernel_size=3)}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text"])
def model(request):
    return build(request.param)


def steps(model, cache, tokens, start, chunks):
    """The held positions per layer after each forward."""
    for n in chunks:
        feed(model, tokens, [n], cache, start=start)
        start += n
        yield start, [layer.pos for layer in cache.kept_layers]


@pytest.mark.parametrize("when", ["decode", "always"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fair", [False, True])
def test_the_cache_never_exceeds_the_budget(model, policy, fair, when):
    tokens = ids(2, N_PROMPT + N_STEP)
    with kvp.wrap(model, WINDOW.get(policy, policy), budget=BUDGET, fair=fair, protect=[2, 7], when=when) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], spans=SPANS)
        held = {layer.keys.shape[2] for layer in cache.kept_layers}
        assert held == {N_PROMPT if when == "decode" else BUDGET}
        for seen, positions in steps(model, cache, tokens, N_PROMPT, [1, 1, 4, *[1] * 10]):
            assert cache.get_seq_length(cache.kept_layers[0].index) == seen
            for pos in positions:
                assert pos.shape[2] == BUDGET and (pos.diff(dim=-1) > 0).all() and (pos < seen).all()
                assert all((pos == p).any(-1).all() for p in (2, 7)), "a protected token is gone"


@pytest.mark.parametrize("when", ["decode", "always"])
@pytest.mark.parametrize("policy", POLICIES)
def test_room_for_all_changes_nothing(model, policy, when):
    tokens = ids(2, N_PROMPT)
    plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    with kvp.wrap(model, policy, budget=N_PROMPT + 12, when=when):
        assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY), plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_always_starts_as_prefill_does(model, policy):
    tokens = ids(2, N_PROMPT)
    for fair, protect in ((False, None), (True, None), ("floor=2", None), ("floor=1", "boundary"), (True, "boundary")):
        kept = []
        used = policy if fair in (False, True) else WINDOW.get(policy, policy)
        for when in ("prefill", "always"):
            with kvp.wrap(model, used, compression_ratio=0.2, fair=fair, protect=protect, when=when) as handle:
                cache = handle.compress(tokens, spans=SPANS)
                kept.append([cache.positions(layer.index) for layer in cache.kept_layers])
        assert all(np.array_equal(a, b) for a, b in zip(*kept, strict=True))


def test_fair_quotas_hold_at_every_step(model):
    tokens, budget = ids(1, 60), 12
    lengths = [6, 8]  # absorbed: [0, 6) and [6, 14)
    for policy in POLICIES:
        fair = kvp.Fair(template="absorb")
        with kvp.wrap(model, WINDOW.get(policy, policy), budget=budget, fair=fair, when="always") as handle:
            cache = handle.compress(tokens[:, :N_PROMPT], spans=SPANS)
            counts = (*quotas(budget, lengths, lengths, [0, 0]), 0)
            for seen, positions in steps(model, cache, tokens, N_PROMPT, [1] * 46):
                now = [*counts[:2], counts[2] + 1]
                counts = quotas(budget, [*lengths, seen - N_PROMPT], now, [0, 0, 1])
                for pos in positions:
                    held = [((pos >= begin) & (pos < end)).sum(-1) for begin, end in ((0, 6), (6, 14), (14, seen))]
                    assert all((n == wanted).all() for n, wanted in zip(held, counts, strict=True)), (policy, seen)


@pytest.mark.parametrize("when", ["decode", "always"])
def test_held_instructions_keep_their_least_tokens(model, when):
    """At every step, beside protection and a weight that takes nearly all; unmarked text has no floor."""
    tokens, fair = ids(1, N_PROMPT + N_STEP), kvp.Fair(min_tokens=3, weights={"a": 0.0})
    for policy in POLICIES:
        with kvp.wrap(model, WINDOW.get(policy, policy), budget=9, fair=fair, protect=[6], when=when) as handle:
            cache = handle.compress(tokens[:, :N_PROMPT], spans={"a": (1, 5), "b": (6, 12)})
            for _, positions in steps(model, cache, tokens, N_PROMPT, [1] * N_STEP):
                for pos in positions:
                    assert pos.shape[2] == 9 and (pos == 6).any(-1).all()
                    assert all((((pos >= b) & (pos < e)).sum(-1) >= 3).all() for b, e in ((1, 5), (6, 12)))
    message = f"budget of row 0 is 6 tokens; when='{when}' expects at least 7: 6 that must be kept, and 1"
    with kvp.wrap(model, "knorm", budget=6, fair=fair, when=when) as handle, pytest.raises(ValueError, match=message):
        handle.compress(tokens[:, :N_PROMPT], spans={"a": (1, 5), "b": (6, 12)})


@pytest.mark.parametrize("fair", [False, True, "floor=3"])
@pytest.mark.parametrize("when", ["decode", "always"])
def test_held_boundaries_and_floors_stay_in_every_head_and_layer(model, when, fair):
    """At every step, in rows of different padding: the ends of the prompt, and so many tokens of every instruction."""
    tokens, spans = ids(2, N_PROMPT + N_STEP), [{"a": (4, 7), "b": (8, 12)}, {"a": (1, 3), "b": (5, 12)}]
    mask = torch.ones(2, N_PROMPT, dtype=torch.long)
    mask[0, :3] = 0
    budget = 11
    for policy in POLICIES:
        policy = {"snapkv": kvp.SnapKV(window_size=2), "rkv": kvp.RKV(window_size=2)}.get(policy, policy)
        with kvp.wrap(model, policy, budget=budget, fair=fair, protect="boundary", when=when) as handle:
            cache, seen = handle.compress(tokens[:, :N_PROMPT], attention_mask=mask, spans=spans), mask
            for _ in range(N_STEP):
                seen = torch.nn.functional.pad(seen, (0, 1), value=1)
                model(tokens[:, seen.shape[1] - 1 : seen.shape[1]], attention_mask=seen, past_key_values=cache)
                for layer in cache.kept_layers:
                    for row, low in enumerate((3, 0)):
                        live = (
                            layer.pos[row] if layer.live is None else layer.pos[row].masked_fill(~layer.live[row], -1)
                        )
                        assert ((live >= 0).sum(-1) == min(budget, seen[row].sum())).all()
                        assert all((live == t).any(-1).all() for t in (low, N_PROMPT - 1))
                        kept = {name: ((live >= b) & (live < e)).sum(-1).min() for name, (b, e) in spans[row].items()}
                        floors = {name: min(3, e - b) for name, (b, e) in spans[row].items()}
                        assert fair != "floor=3" or all(kept[name] >= floors[name] for name in floors), (policy, kept)


@pytest.mark.parametrize("when", ["decode", "always"])
def test_held_instructions_keep_the_same_share(model, when):
    """At every step, in rows of different padding and spans; the gaps between the spans are shared out too."""
    tokens, spans = ids(2, N_PROMPT + N_STEP), [{"a": (4, 7), "b": (10, 13)}, {"a": (1, 3), "b": (5, 12)}]
    for policy in POLICIES:
        mask = torch.ones(2, N_PROMPT, dtype=torch.long)
        mask[0, :3] = 0
        with kvp.wrap(model, WINDOW.get(policy, policy), budget=8, fair=True, when=when) as handle:
            cache = handle.compress(tokens[:, :N_PROMPT], attention_mask=mask, spans=spans)
            for _ in range(N_STEP):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                model(tokens[:, mask.shape[1] - 1 : mask.shape[1]], attention_mask=mask, past_key_values=cache)
                for layer in cache.kept_layers:
                    for of_row, row in zip(spans, layer.pos, strict=True):
                        kept = [((row >= begin) & (row < end)).sum(-1) for begin, end in of_row.values()]
                        (n_a, n_b) = (end - begin for begin, end in of_row.values())
                        assert ((kept[0] / n_a - kept[1] / n_b).abs() * min(n_a, n_b) < 1).all(), (policy, kept)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.data())
def test_held_quotas_follow_the_law_of_fair_shares_at_every_step(data):
    """Any spans and gaps, several rows and padding, steps of one or more tokens: sums are exact and shares equal."""
    n_token, rows = 40, []
    for _ in range(data.draw(st.integers(1, 2))):
        low = data.draw(st.integers(0, 20))
        edges = sorted(data.draw(st.lists(st.integers(low, n_token), min_size=2, max_size=7, unique=True)))
        pairs = data.draw(
            st.sampled_from([list(itertools.pairwise(edges)), list(zip(edges[::2], edges[1::2], strict=False))])
        )
        rows.append(((low, n_token), {f"s{i}": pair for i, pair in enumerate(pairs)}))
    layout = Layout.of(len(rows), n_token, valid=[row for row, _ in rows], spans=[spans for _, spans in rows])
    hold = Hold(kvp.KNorm(), kvp.Fair(), None, data.draw(st.integers(2, 40)), when="always")
    segments, names = layout.split(hold.fair).segments, layout.split(hold.fair).names
    n_segment = max(map(len, segments))
    counts = [[end - begin for begin, end in row] + [0] * (n_segment - len(row)) for row in segments]
    newer, seen = [0] * len(rows), n_token
    for n_new in [0, *data.draw(st.lists(st.integers(1, 5), max_size=12))]:
        seen += n_new
        n_slot = max(sum(row) + n + n_new for row, n in zip(counts, newer, strict=True))
        front = torch.tensor([n_slot - sum(row) - n - n_new for row, n in zip(counts, newer, strict=True)])
        n_kept = [
            min(hold.limit(high - low), n_slot - n) for ((low, high), _), n in zip(rows, front.tolist(), strict=True)
        ]
        held = Held(front, torch.tensor(counts), None, None, torch.arange(len(rows)), layout)
        layer = SimpleNamespace(held=held, keys=np.empty((1, 1, n_slot)), seen=seen)
        quotas_now = hold._quotas(layer, n_kept).tolist()
        for of_row, total, before, n_before, row_names, row in zip(
            quotas_now, n_kept, counts, newer, names, segments, strict=True
        ):
            assert sum(of_row) == total
            assert all(0 <= quota <= n for quota, n in zip(of_row, [*before, n_before + n_new], strict=True))
            shares = [
                (k, end - begin)
                for name, k, (begin, end) in zip(row_names, of_row, row, strict=False)
                if name is not None
            ]
            for (kept_a, n_a), (kept_b, n_b) in itertools.combinations(shares, 2):
                apart = abs(Fraction(kept_a, n_a) - Fraction(kept_b, n_b)) * min(n_a, n_b)
                n_payers = sum(k > 0 for name, k in zip(row_names, of_row, strict=False) if name is None) + (
                    of_row[-1] > 1
                )
                assert apart < 1 or (apart == 1 and n_a == n_b and n_payers < len(shares) - 1), (shares, total)
        counts, newer = [row[:-1] for row in quotas_now], [row[-1] for row in quotas_now]


def quotas(total, ever, now, floors):
    """The budget in proportion to the tokens that each segment ever had, none above what it has now: every way to clip
    is tried."""
    for clipped in itertools.product(("low", "free", "high"), repeat=len(ever)):
        fixed = {j: floors[j] if how == "low" else now[j] for j, how in enumerate(clipped) if how != "free"}
        free = sum(n for j, n in enumerate(ever) if j not in fixed)
        rate = Fraction(total - sum(fixed.values()), free) if free else None
        if rate is None or any(
            rate * n > floors[j]
            if how == "low"
            else rate * n < now[j]
            if how == "high"
            else not floors[j] <= rate * n <= now[j]
            for j, (n, how) in enumerate(zip(ever, clipped, strict=True))
        ):
            continue
        shares = [Fraction(fixed.get(j, rate * n)) for j, n in enumerate(ever)]
        rounded = [int(share) for share in shares]
        for j in sorted(range(len(ever)), key=lambda j: (rounded[j] - shares[j], -j))[: total - sum(rounded)]:
            rounded[j] += 1
        return rounded
    raise AssertionError(f"no quotas of {total} for {ever}, of which {now} are there")


def reference(model, policy, tokens, budget, monkeypatch):
    """Feed an unwrapped model one token at a time; its full cache is masked, per head, by what is held; the held set is
    worked out from
    the attention weights that the eager model returns, and from its keys and queries."""
    n_layer, n_head = model.config.num_hidden_layers, model.config.num_key_value_heads
    held = [[list(range(N_PROMPT)) for _ in range(n_head)] for _ in range(n_layer)]
    sums, queries = None, _record_queries(monkeypatch, n_layer)
    cache, logits = DynamicCache(config=model.config), []
    chunks = [N_PROMPT, *[1] * N_STEP]
    seen = 0
    for n in chunks:
        layers = [_Masked(layer.self_attn, rows, seen, n) for layer, rows in zip(model.model.layers, held, strict=True)]
        out = model(tokens[:, seen : seen + n], past_key_values=cache, use_cache=True, output_attentions=True)
        for layer in layers:
            layer.remove()
        logits.append(out.logits)
        seen += n
        received = [a[0].unflatten(0, (n_head, -1)).mean(1).sum(1) for a in out.attentions]  # (H, seen) each
        sums = (
            received
            if sums is None
            else [torch.nn.functional.pad(s, (0, n)) + r for s, r in zip(sums, received, strict=True)]
        )
        for i, rows in enumerate(held):
            asked = torch.cat(queries[i], 1).unflatten(0, (n_head, -1))  # (H, G, seen, D)
            for h in range(n_head):
                if seen > N_PROMPT:
                    rows[h].append(seen - 1)
                if len(rows[h]) > budget and seen > N_PROMPT:
                    if policy in ("snapkv", "knorm", "keydiff", "rkv"):
                        score = _score_of_vectors(policy, rows[h], cache.layers[i].keys[0, h], asked[h])
                    else:
                        score = _score(policy, rows[h], sums[i][h], out.attentions[i][0, :, -1].mean(0), seen)
                    rows[h] = sorted(sorted(rows[h], key=lambda t: (-score[t], t))[:budget])
    return torch.cat(logits, 1), held


def _record_queries(monkeypatch, n_layer):
    """Per layer, the queries (Hq, q, D) of each forward of an eager Llama."""
    found = [[] for _ in range(n_layer)]
    eager = modeling_llama.eager_attention_forward

    def recorded(module, query, *args, **kwargs):
        found[module.layer_idx].append(query[0])
        return eager(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", recorded)
    return found


def _score(policy, row, sums, last, seen):
    if policy == "h2o":
        return {t: float(sums[t]) / (seen - t) for t in row}
    if policy == "tova":
        return {t: 2.0 if t == seen - 1 else float(last[t]) for t in row}
    return {t: 1e6 - t if i < 4 else t for i, t in enumerate(row)}


def _score_of_vectors(policy, row, keys, queries):
    """K-norm, KeyDiff, and SnapKV and R-KV (window 4, kernel 3), by their formulas over the held tokens."""
    keys = keys[row].double()
    if policy == "keydiff":
        anchor = torch.nn.functional.normalize(keys, dim=-1).mean(0)
        return dict(
            zip(row, (-torch.nn.functional.cosine_similarity(keys, anchor[None], dim=-1)).tolist(), strict=True)
        )
    if policy == "knorm":
        return dict(zip(row, (-keys.norm(dim=-1)).tolist(), strict=True))
    old, window = row[:-4], row[-4:]
    if policy == "rkv":
        scores = rkv_by_hand(keys, queries[:, window].double(), kvp.RKV(window_size=4, kernel_size=3))
        return dict(zip(row, [*scores.tolist(), 2, 3, 4, 5], strict=True))
    votes = torch.zeros(len(old) + 2, dtype=torch.float64)  # a zero at either end
    for j in range(4):
        visible = keys[: len(old) + j + 1]
        for query in queries[:, window[j]].double():
            votes[1:-1] += torch.softmax(visible @ query / len(query) ** 0.5, 0)[: len(old)]
    pooled = (votes[:-2] + votes[1:-1] + votes[2:]) / 3 / (4 * len(queries))
    return dict(zip(row, [*pooled.tolist(), 2, 3, 4, 5], strict=True))


class _Masked:
    """Lets one attention module of an unwrapped model see the held tokens only."""

    def __init__(self, attention, rows, seen, n_new):
        group = attention.config.num_attention_heads // len(rows)
        visible = torch.zeros(len(rows), seen + n_new, dtype=torch.bool)
        for h, row in enumerate(rows):
            visible[h, [t for t in row if t < seen + n_new]] = True
        visible[:, seen:] = True
        causal = torch.arange(seen, seen + n_new)[:, None] >= torch.arange(seen + n_new)
        mask = visible.repeat_interleave(group, 0)[:, None] & causal
        self.mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None]
        self.hook = attention.register_forward_pre_hook(self._hide, with_kwargs=True)

    def _hide(self, module, args, kwargs):
        return args, {**kwargs, "attention_mask": self.mask}

    def remove(self):
        self.hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_kept_and_that_the_rest_is_all_that_is_missing(policy, monkeypatch):
    model, tokens = build("llama", "eager"), ids(1, N_PROMPT + N_STEP)
    with monkeypatch.context() as patched:
        wanted, rows = reference(model, policy, tokens, BUDGET, patched)
    with kvp.wrap(model, WINDOW.get(policy, policy), budget=BUDGET, when="decode") as handle:
        cache = handle.new_cache()
        logits = feed(model, tokens, [N_PROMPT, *[1] * N_STEP], cache)
    for layer, row in zip(cache.kept_layers, rows, strict=True):
        assert layer.pos[0].tolist() == row
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    if policy in ("tova", "knorm"):
        assert any(
            (layer.pos[0, 0] >= N_PROMPT).any() and (layer.pos[0, 0] < N_PROMPT).any() for layer in cache.kept_layers
        )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("when", ["decode", "always"])
def test_left_padded_rows_hold_their_own_budgets(policy, fair, when):
    model, tokens, n_pad = build("llama"), ids(2, 30), 4
    mask = torch.ones_like(tokens)
    mask[0, :n_pad] = 0
    spans = [{"a": (5, 9), "b": (9, 13)}, {"a": (2, 8), "b": (9, 12)}]
    with kvp.wrap(
        model, WINDOW.get(policy, policy), compression_ratio=0.4, fair=fair, protect=[5], when=when
    ) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT], spans)
        together = feed(model, tokens, [1, 1, 3, *[1] * 8], cache, mask, start=N_PROMPT)
    single = {"compression_ratio": 0.4, "fair": fair, "when": when}
    with kvp.wrap(model, WINDOW.get(policy, policy), protect=[5 - n_pad], **single) as handle:
        short = {name: (begin - n_pad, end - n_pad) for name, (begin, end) in spans[0].items()}
        first = handle.compress(tokens[:1, n_pad:N_PROMPT], spans=short)
        alone = feed(model, tokens[:1, n_pad:], [1, 1, 3, *[1] * 8], first, start=N_PROMPT - n_pad)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)
    layer, other = cache.kept_layers[1], first.kept_layers[1]
    assert torch.equal(layer.pos[0][layer.live[0]].view_as(other.pos[0]) - n_pad, other.pos[0])


@pytest.mark.parametrize("when", ["decode", "always"])
@pytest.mark.parametrize("fair", [False, True, "floor=2"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # transformers' own sliding layers take padding for tokens
def test_padding_between_turns_is_no_token(family, policy, fair, when):
    """Turns of any length in each row, padded on either side, none at all in one: each row is what it is alone."""
    model = build(family)
    turns = [(1, [3, 6, 9]), (0, [1, 1, 1]), (0, [1, 1, 1]), (1, [5, 0, 2]), (0, [2, 1, 4]), (0, [1, 1, 1])]
    chunks = [max(lengths) for _, lengths in turns]
    mask = torch.ones(3, N_PROMPT + sum(chunks), dtype=torch.long)
    mask[0, :3] = 0
    start = N_PROMPT
    for (is_left, lengths), n in zip(turns, chunks, strict=True):
        for row, n_real in enumerate(lengths):
            mask[row, slice(start, start + n - n_real) if is_left else slice(start + n_real, start + n)] = 0
        start += n
    tokens = ids(3, mask.shape[1])
    spans = [{"a": (4, 7), "b": (9, 13)}, {"a": (1, 6), "b": (7, 12)}, {"a": (2, 5), "b": (6, 13)}]
    settings = {"budget": 11, "fair": fair, "when": when}
    with kvp.wrap(model, WINDOW.get(policy, policy), **settings) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT], spans)
        together = feed(model, tokens, chunks, cache, mask, start=N_PROMPT)
    assert {layer.keys.shape[2] for layer in cache.kept_layers} == {11}
    for row, real in enumerate(mask.bool()):
        n_pad = 3 if row == 0 else 0
        own = {name: (begin - n_pad, end - n_pad) for name, (begin, end) in spans[row].items()}
        with kvp.wrap(model, WINDOW.get(policy, policy), **settings) as handle:
            alone = handle.compress(tokens[row : row + 1, n_pad:N_PROMPT], spans=own)
            lengths = [n for _, of_turn in turns if (n := of_turn[row])]
            logits = feed(model, tokens[row : row + 1, real], lengths, alone, start=N_PROMPT - n_pad)
        torch.testing.assert_close(together[row, real[N_PROMPT:]], logits[0], rtol=0, atol=2e-5)
        order = real.cumsum(0) - 1
        for layer, other in zip(cache.kept_layers, alone.kept_layers, strict=True):
            assert torch.equal(order[layer.pos[row]], other.pos[0])


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_move_take_their_padding_along(policy, fair):
    """Between two padded turns rows are chosen, swapped and repeated, as beams are."""
    model, tokens, mask = build("llama"), ids(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, N_PROMPT : N_PROMPT + 4] = mask[1, N_PROMPT : N_PROMPT + 2] = mask[2, 22:24] = 0
    with kvp.wrap(model, WINDOW.get(policy, policy), budget=9, fair=fair, when="always") as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], spans=SPANS)
        feed(model, tokens, [6], cache, mask, start=N_PROMPT)
        stayed, moved, rows = cache, cache.copy(), [2, 0]
        moved.batch_select_indices(torch.tensor(rows))
        moved.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        wanted = feed(model, tokens, [1, 4, 1], stayed, mask, start=N_PROMPT + 6)
        got = feed(model, tokens[rows], [1, 4, 1], moved, mask[rows], start=N_PROMPT + 6)
    torch.testing.assert_close(got, wanted[rows], rtol=0, atol=1e-5)
    for layer, other in zip(moved.kept_layers, stayed.kept_layers, strict=True):
        assert torch.equal(layer.pos, other.pos[rows])


@pytest.mark.parametrize(
    "family", [*not_refused("deepseek_v3", "jetmoe", "gpt_oss", "gemma2", "qwen3_next", "gemma3n_text"), *mixed()]
)
def test_other_architectures_hold_too(family):
    model, tokens = build_type(family), ids(1, 30)
    for policy in POLICIES:
        with kvp.wrap(model, WINDOW.get(policy, policy), budget=BUDGET, when="always") as handle:
            cache = handle.compress(tokens[:, :N_PROMPT])
            assert feed(model, tokens, [1] * 8, cache, start=N_PROMPT).isfinite().all()
            assert {layer.keys.shape[2] for layer in cache.kept_layers} == {BUDGET}


def test_beams_copies_and_reports(model):
    tokens = ids(1, N_PROMPT)
    with kvp.wrap(model, "h2o", budget=BUDGET, when="always") as handle:
        cache = handle.compress(tokens)
        longer = torch.cat([tokens, ids(1, 4, seed=3)], 1)
        one = feed(model, longer, [1, 3], copy.deepcopy(cache), start=N_PROMPT)
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        both = feed(model, longer.expand(2, -1), [1, 3], twice, start=N_PROMPT)
        torch.testing.assert_close(both, one.expand_as(both), rtol=0, atol=1e-5)
        report = twice.report()
        assert {row["n_slots"] for row in report["layers"]} == {BUDGET} and report["bytes_after"] == twice.held_bytes
        of_prompt = twice.positions(twice.kept_layers[0].index)
        pos = twice.kept_layers[0].pos
        assert (of_prompt >= 0).sum() == (pos < N_PROMPT).sum()
        beams = model.generate(tokens, num_beams=3, **GREEDY)
        assert beams.shape == (1, N_PROMPT + 12)
        with pytest.raises(ValueError, match="crop was called on a cache that holds its budget"):
            twice.crop(-1)
        with pytest.raises(ValueError, match="expected caches of a wrap with when='prefill'"):
            kvp.KeptCache.join([cache, cache])


def test_refusals(tmp_path):
    model = build("llama")
    for given, message in [
        ({"when": "later"}, "when is 'later'; expected 'prefill', 'decode' or 'always'"),
        ({"when": "decode", "fair": 0.5}, r"fair is 0\.5; when='decode' expects False, True"),
        ({"when": "always", "fair": "paper"}, "fair is 'paper'; when='always' expects"),
    ]:
        with pytest.raises(ValueError, match=message):
            kvp.wrap(model, "h2o", budget=4, **given)
    too_small = (
        "the budget of row 0 is 10 tokens; when='always' expects at least 20: 4 that must be kept, and 16 newest"
    )
    with (
        kvp.wrap(model, "snapkv", budget=10, protect="sinks", when="always") as handle,
        pytest.raises(ValueError, match=too_small),
    ):
        handle.compress(ids(1))
    unsaved = "holds its budget while generating; expected one of a wrap with when='prefill'"
    with kvp.wrap(model, "knorm", budget=10, when="always") as handle, pytest.raises(ValueError, match=unsaved):
        handle.compress(ids(1)).save(tmp_path / "cache")


def test_a_policy_must_say_how_many_queries_it_reads(monkeypatch):
    monkeypatch.setattr(base, "_registry", dict(base._registry))

    @dataclasses.dataclass(frozen=True)
    class Asks(kvp.Policy):
        name = "asks_for_queries"
        needs_queries = True

    with pytest.raises(ValueError, match="policy 'asks_for_queries' reads queries but states no recent_queries"):
        kvp.wrap(build("llama"), Asks(), budget=4, when="decode")
