"""What must hold for every policy, fairness and protection, on bare arrays."""

from decimal import localcontext
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_policies import EQUAL as POLICIES
from tiny_policies import is_defined, kept_by

import kvpitfalls as kvp
from kvpitfalls.eviction.budget import apportion, blend, floor_and_rest, kept_tokens
from kvpitfalls.eviction.fairness import Fair
from kvpitfalls.eviction.layer_inputs import LayerInputs
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.eviction.selection import count_per_segment, rank
from kvpitfalls.policies import get_policy

RNG = np.random.default_rng(0)
KEYS = RNG.standard_normal((1, 2, 64, 16), dtype=np.float32)
QUERIES = 2 * RNG.standard_normal((1, 6, 64, 16), dtype=np.float32)


@pytest.mark.parametrize(
    ("n_token", "ratio", "kept"),
    [
        (1000, 0.9, 100),
        (10, 0.3, 7),
        (10, 0, 10),
        (3, 0.99, 1),
        (7, np.float32(0.6), 2),
        (100, 0.29, 71),
        (1000, 1e-9, 999),
        (1000, 1e-300, 999),
    ],
)
def test_kept_tokens_are_exact_in_decimal(n_token, ratio, kept):
    assert kept_tokens(n_token, ratio) == kept


def test_kept_tokens_do_not_depend_on_the_precision_of_others():
    with localcontext(prec=2):  # a program may have set it for its own sums
        assert kept_tokens(12347, 0.5) == 6173


def test_a_budget_above_the_length_keeps_all():
    assert kept_tokens(64, budget=65) == 64
    kept = kvp.keep("knorm", KEYS, budget=1000)
    assert kept.positions.shape[-1] == 64 and kept.counts.tolist() == [[64, 64]]


def test_equal_remainders_go_to_the_later_segments():
    assert apportion(5, [5, 5]) == [2, 3]
    assert apportion(8, [4, 4, 4]) == [2, 3, 3]


def test_the_authors_split_rounds_down():
    assert floor_and_rest(67, [89, 46], [0, 0]) == [44, 23]  # 67 * 89 / 135 = 44.2
    assert floor_and_rest(3, [30, 11], [0, 0]) == [2, 1]
    assert floor_and_rest(5, [14, 6], [0, 0]) == [3, 2]  # 3.5


def test_sinks_of_a_padded_row_are_its_first_real_tokens():
    kept = kvp.keep("knorm", KEYS, budget=6, valid=[(10, 64)], protect="sinks")
    assert all(set(range(10, 14)) <= set(head) for head in kept.positions[0].tolist())


def test_spans_may_touch_but_not_share_a_token():
    kvp.keep("knorm", KEYS, budget=6, spans=[(0, 5), (5, 10)], fair=True)
    with pytest.raises(ValueError, match="span 'span 1' starts at 4, inside span 'span 0', which ends at 5"):
        kvp.keep("knorm", KEYS, budget=6, spans=[(0, 5), (4, 10)], fair=True)


@pytest.mark.parametrize("policy", ["snapkv", "tova", "h2o"])
def test_an_instruction_is_judged_by_its_own_queries_only(policy):
    others = QUERIES.copy()
    others[:, :, 32:] = RNG.standard_normal(others[:, :, 32:].shape)
    scores = [keep(policy, KEYS, q, budget=16, spans=[(0, 32), (32, 64)], fair=True).scores for q in (QUERIES, others)]
    assert np.array_equal(scores[0][:, :, :32], scores[1][:, :, :32]) and not np.array_equal(scores[0], scores[1])


def test_shared_heads_go_by_the_mean_of_their_scores():
    layer = LayerInputs(torch.from_numpy(KEYS), share_heads=True)
    shared = rank(get_policy("knorm"), Layout.of(1, 64).split(Fair.parse(False)), layer).scores
    np.testing.assert_allclose(shared, -np.linalg.norm(KEYS.astype(float), axis=-1).mean(1, keepdims=True), rtol=1e-6)


@st.composite
def splits(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum))
    floors = [draw(st.integers(0, n)) if draw(st.booleans()) else 0 for n in lengths]
    total = draw(st.integers(sum(floors), sum(lengths)))
    weights = draw(st.none() | st.lists(st.sampled_from([0, 0.5, 1, 3]), min_size=len(lengths), max_size=len(lengths)))
    return total, lengths, weights, floors


@settings(max_examples=500, deadline=None)
@given(splits())
def test_quotas_sum_to_the_budget_inside_their_bounds(split):
    total, lengths, weights, floors = split
    quotas = apportion(total, lengths, weights, floors)
    assert sum(quotas) == total
    assert all(low <= q <= high for low, q, high in zip(floors, quotas, lengths, strict=True))


@settings(max_examples=300, deadline=None)
@given(splits())
def test_unconstrained_quotas_are_within_one_token_of_proportional(split):
    total, lengths, _, _ = split
    quotas = apportion(total, lengths)
    assert all(abs(q - total * n / sum(lengths)) < 1 for q, n in zip(quotas, lengths, strict=True))


@settings(max_examples=300, deadline=None)
@given(splits(), st.sampled_from([0, 0.1, 0.25, 0.5, 0.9, 1]))
def test_blended_quotas_lie_between_both(split, strength):
    total, lengths, weights, floors = split
    counts, quotas = np.array([apportion(total, lengths, weights)]), np.array([apportion(total, lengths, None, floors)])
    mixed = blend(counts, quotas, strength)
    assert mixed.sum() == total
    assert (mixed >= np.minimum(counts, quotas)).all() and (mixed <= np.maximum(counts, quotas)).all()


def keep(policy, keys, queries, **given):
    """With values, which are made from the keys."""
    return kept_by(policy, keys, queries, values=np.ascontiguousarray(keys[..., ::-1]), rotary=kvp.Rotary(), **given)


def are_defined(policy, rows, ratio) -> bool:
    return all(is_defined(policy, high - low, kept_tokens(high - low, ratio)) for (low, high), _ in rows)


def spans_of(edges):
    return {f"s{i}": (begin, end) for i, (begin, end) in enumerate(edges)}


@st.composite
def settings_of_keep(draw):
    edges = sorted(draw(st.lists(st.integers(0, 64), min_size=2, max_size=8, unique=True)))
    edges = edges[: len(edges) // 2 * 2]
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    budget = draw(st.integers(1, 64))
    protect = draw(st.lists(st.integers(0, 63), max_size=budget, unique=True))
    strength = draw(st.sampled_from([0.0, 0.3, 1.0]))
    template = draw(st.sampled_from(["absorb", "separate"]))
    return spans, budget, protect, strength, template


@st.composite
def layouts(draw):
    """Several rows of 64 slots, each with padding and spans of its own; gaps between spans, or none."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        low, high = draw(st.sampled_from([(0, 64), (0, 50), (9, 64), (40, 64)]))
        edges = sorted(draw(st.lists(st.integers(low, high), min_size=2, max_size=9, unique=True)))
        pairs = list(pairwise(edges)) if draw(st.booleans()) else list(zip(edges[::2], edges[1::2], strict=False))
        rows.append(((low, high), spans_of(pairs)))
    return rows, draw(st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 0.66, 0.7, 0.9]))


def shares_of(positions, spans):
    """Instruction -> (kept, tokens) of one head's kept positions."""
    return {
        name: (int(((positions >= begin) & (positions < end)).sum()), end - begin)
        for name, (begin, end) in spans.items()
    }


def assert_equal_shares(shares, n_payers):
    """Any two differ by less than one token of the shorter; by one, if of equal length and unmarked text cannot pay for
    that."""
    for (kept_a, n_a), (kept_b, n_b) in combinations(shares.values(), 2):
        apart = abs(Fraction(kept_a, n_a) - Fraction(kept_b, n_b)) * min(n_a, n_b)
        assert apart < 1 or (apart == 1 and n_a == n_b and n_payers < len(shares) - 1), shares


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=40, deadline=None)
@given(case=settings_of_keep())
def test_budget_quotas_and_protection_always_hold(policy, case):
    spans, budget, protect, strength, template = case
    assume(is_defined(policy, 64, budget))
    fair = Fair(strength=strength, template=template)
    kept = keep(policy, KEYS, QUERIES, budget=budget, spans=spans_of(spans), fair=fair, protect=protect)
    assert (kept.counts == budget).all() and (kept.quotas.sum(-1) == budget).all()
    assert (np.diff(kept.positions) > 0).all() and (kept.positions >= 0).all()
    assert np.array_equal(count_per_segment(kept, kept.segments), kept.quotas)
    for head in kept.positions[0]:
        assert set(protect) <= set(head.tolist())
    if strength == 1 and not protect:
        lengths = np.diff(kept.segments[0])
        assert (
            np.abs(kept.quotas - budget * lengths / 64) < (2 if template == "separate" else 1)
        ).all()  # unmarked text takes odd tokens


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=120, deadline=None)
@given(case=layouts())
def test_any_two_instructions_keep_the_same_share(policy, case):
    """Whatever lies between them, and however many rows and much padding there are."""
    rows, ratio = case
    assume(are_defined(policy, rows, ratio))
    keys, queries = np.repeat(KEYS, len(rows), 0), np.repeat(QUERIES, len(rows), 0)
    valid, spans = [row for row, _ in rows], [of_row for _, of_row in rows]
    kept = keep(policy, keys, queries, compression_ratio=ratio, spans=spans, fair=True, valid=valid)
    for b, ((low, high), of_row) in enumerate(rows):
        total = max(1, int((high - low) * (1 - Fraction(str(ratio)))))
        for positions in kept.positions[b]:
            positions = positions[positions >= 0]
            shares = shares_of(positions, of_row)
            stretches = [edges for edges in pairwise(kept.segments[b].tolist()) if edges not in of_row.values()]
            unmarked = shares_of(positions, spans_of(stretches)).values()
            n_payers = max(sum(k < n for k, n in unmarked), sum(k > 0 for k, _ in unmarked))
            assert len(positions) == total and low <= positions.min() and positions.max() < high
            assert_equal_shares(shares, n_payers)
            assert all(abs(k - Fraction(total * n, high - low)) < 1 for k, n in shares.values()), (
                "one instruction's share is not its own"
            )


def best_of(scores, budget, first=(), groups=()):
    """The plain rule: first these positions and the best n of each group (positions, n), then the best of all."""
    order = sorted(range(len(scores)), key=lambda t: (t not in first, -scores[t], t))
    chosen = {*first, *(t for group, n in groups for t in [t for t in order if t in group][:n])}
    return sorted([*chosen, *(t for t in order if t not in chosen)][:budget])


@pytest.mark.parametrize("fair", [False, True, 0.3, "floor=2"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=30, deadline=None)
@given(case=layouts())
def test_a_boundary_is_kept_at_both_ends_of_every_row_at_equal_memory(policy, fair, case):
    """And of the rest, where nothing is fair, what the policy thinks best."""
    rows, ratio = case
    assume(are_defined(policy, rows, ratio))
    keys, queries = np.repeat(KEYS, len(rows), 0), np.repeat(QUERIES, len(rows), 0)
    given = {"compression_ratio": ratio, "spans": [of_row for _, of_row in rows], "valid": [row for row, _ in rows]}
    ends, floors = [], []
    for (low, high), of_row in rows:
        n_end = kept_tokens(high - low, ratio) // 10
        ends.append([*range(low, low + n_end), *range(high - n_end, high)])
        least = [max(min(2, e - b), sum(b <= t < e for t in ends[-1])) for b, e in of_row.values()]
        floors.append(sum(least) + sum(not any(b <= t < e for b, e in of_row.values()) for t in ends[-1]))
    if fair == "floor=2" and any(
        n > kept_tokens(h - low, ratio) for n, ((low, h), _) in zip(floors, rows, strict=True)
    ):
        with pytest.raises(
            ValueError,
            match=r"^the budget of row \d is \d+ tokens, but min_tokens=2 and protection need \d+; expected at",
        ):
            keep(policy, keys, queries, fair=fair, protect="boundary", **given)
        return
    kept = keep(policy, keys, queries, fair=fair, protect="boundary", **given)
    assert np.array_equal(kept.counts, keep(policy, keys, queries, fair=False, **given).counts)
    for b, ((low, high), _) in enumerate(rows):
        for head, scores in zip(kept.positions[b], kept.scores[b], strict=True):
            head = head[head >= 0].tolist()
            assert set(ends[b]) <= set(head) and len(head) == kept_tokens(high - low, ratio)
            if fair is False:
                assert head == [low + t for t in best_of(scores[low:high], len(head), {t - low for t in ends[b]})]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=60, deadline=None)
@given(case=layouts(), least=st.integers(1, 9), protect=st.lists(st.integers(40, 49), max_size=4, unique=True))
def test_a_floor_is_met_in_every_head_and_all_else_is_the_policys_choice(policy, case, least, protect):
    rows, ratio = case
    assume(are_defined(policy, rows, ratio))
    keys, queries = np.repeat(KEYS, len(rows), 0), np.repeat(QUERIES, len(rows), 0)
    given = {
        "compression_ratio": ratio,
        "spans": [of_row for _, of_row in rows],
        "valid": [row for row, _ in rows],
        "protect": protect,
    }
    floors = [{name: min(least, e - b) for name, (b, e) in of_row.items()} for _, of_row in rows]
    needed = []
    for of_floor, (_, of_row) in zip(floors, rows, strict=True):
        inside = {name: sum(b <= t < e for t in protect) for name, (b, e) in of_row.items()}
        needed.append(sum(max(of_floor[name], n) for name, n in inside.items()) + len(protect) - sum(inside.values()))
    if any(n > kept_tokens(high - low, ratio) for n, ((low, high), _) in zip(needed, rows, strict=True)):
        with pytest.raises(
            ValueError,
            match=rf"^the budget of row \d is \d+ tokens, but min_tokens={least} and protection need \d+; exp",
        ):
            keep(policy, keys, queries, fair=f"floor={least}", **given)
        return
    kept = keep(policy, keys, queries, fair=f"floor={least}", **given)
    for b, ((low, high), of_row) in enumerate(rows):
        groups = [(range(begin - low, end - low), floors[b][name]) for name, (begin, end) in of_row.items()]
        for head, scores in zip(kept.positions[b], kept.scores[b], strict=True):
            head = head[head >= 0].tolist()
            assert head == [low + t for t in best_of(scores[low:high], len(head), {t - low for t in protect}, groups)]
            assert len(head) == kept_tokens(high - low, ratio)
            assert all(sum(begin <= t < end for t in head) >= floors[b][name] for name, (begin, end) in of_row.items())


def test_rules_are_one_word():
    assert Fair.parse("floor") == Fair.parse("floor=4") == Fair(strength=0, min_tokens=4)
    assert (Fair.parse("floor").label, Fair(min_tokens=4).label) == (
        "floor=4",
        "Fair(strength=1.0, weights=None, min_tokens=4, template='separate', rule='proportional')",
    )
    kept = kvp.keep(
        "knorm", KEYS, budget=20, spans={"a": (30, 40), "boundary": (50, 52)}, protect=["a", "sinks"]
    ).positions
    assert all({*range(30, 40), *range(4)} <= set(head.tolist()) for head in kept[0])
    named = kvp.keep(
        "knorm", KEYS, budget=20, spans={"boundary": (50, 52)}, protect="boundary"
    ).positions  # a span of that name
    assert np.array_equal(named, kvp.keep("knorm", KEYS, budget=20, protect=[50, 51]).positions)
    for wrong in ("floor=0", "floor=-1", "floor=x", "floor=", "Floor"):
        with pytest.raises(
            ValueError, match=r"^fair is .*; expected False, True, a number in \[0, 1\], 'paper', 'floor', 'floor=M' or"
        ):
            Fair.parse(wrong)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_one_instruction_alone_keeps_its_proportional_share(policy):
    for begin, end in ((0, 8), (10, 40), (56, 64)):
        kept = keep(policy, KEYS, QUERIES, compression_ratio=0.5, spans={"a": (begin, end)}, fair=True).positions
        assert (((kept >= begin) & (kept < end)).sum(-1) == (end - begin) // 2).all()


@pytest.mark.parametrize(
    ("policy", "budget"),
    [(policy, k) for policy in POLICIES for k in (1, 7, 16, 32, 63, 64) if is_defined(policy, 64, k)],
    ids=str,
)
def test_one_segment_is_the_biased_policy(policy, budget):
    biased = keep(policy, KEYS, QUERIES, budget=budget)
    for spans, rule in (
        ({"all": (0, 64)}, True),
        ({"all": (10, 40)}, Fair(template="absorb")),
    ):  # absorb: one instruction owns the row
        fair = keep(policy, KEYS, QUERIES, budget=budget, spans=spans, fair=rule)
        assert np.array_equal(biased.positions, fair.positions)
    assert np.array_equal(biased.positions, keep(policy, KEYS, QUERIES, budget=budget, fair=0.0).positions)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_strength_runs_from_biased_to_fair(policy):
    spans = {"a": (2, 40), "b": (40, 60)}

    def counts(fair):
        kept = keep(policy, KEYS, QUERIES, budget=20, spans=spans, fair=fair)
        return count_per_segment(kept, np.array([[0, 2, 40, 60, 64]]))

    biased, fair = counts(False), counts(True)
    assert (fair == apportion(20, [2, 38, 20, 4])).all()
    for strength in (0.25, 0.5, 0.75):
        assert np.array_equal(counts(strength), blend(biased, fair, strength))


def test_equal_scores_go_by_position():
    same = np.ones((1, 1, 10, 4), np.float32)
    assert kvp.keep("knorm", same, budget=4).positions.tolist() == [[[0, 1, 2, 3]]]
    assert kvp.keep("knorm", same, budget=4, spans=[(0, 5), (5, 10)], fair=True).positions.tolist() == [[[0, 1, 5, 6]]]


def test_weights_and_min_tokens():
    spans = {"a": (4, 24), "b": (24, 44), "c": (50, 60)}
    kept = kvp.keep("knorm", KEYS, budget=20, spans=spans, fair=Fair(weights={"a": 3.0}))
    assert kept.segments.tolist() == [[0, 4, 24, 44, 50, 60, 64]]
    assert kept.quotas[0, 0].tolist() == apportion(20, [4, 20, 20, 6, 10, 4], [1, 3, 1, 1, 1, 1])
    kept = kvp.keep("knorm", KEYS, budget=20, spans=spans, fair=Fair(weights={"a": 3.0}, template="absorb"))
    assert kept.segments.tolist() == [[0, 24, 50, 64]]
    assert kept.quotas[0, 0].tolist() == apportion(20, [24, 26, 14], [3, 1, 1])
    kept = kvp.keep("knorm", KEYS, budget=20, spans=spans, fair=Fair(min_tokens=6))
    assert kept.quotas[0, 0].tolist() == apportion(20, [4, 20, 20, 6, 10, 4], None, [0, 6, 6, 0, 6, 0])
    with pytest.raises(
        ValueError,
        match="the budget of row 0 is 20 tokens, but min_tokens=10 and protection need 30; expected at least",
    ):
        kvp.keep("knorm", KEYS, budget=20, spans=spans, fair=Fair(min_tokens=10))
    assert kvp.keep("knorm", KEYS, budget=30, spans=spans, fair=Fair(min_tokens=10)).quotas[0, 0].tolist() == [
        0,
        10,
        10,
        0,
        10,
        0,
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@settings(max_examples=60, deadline=None)
@given(case=settings_of_keep(), min_tokens=st.integers(1, 20), weight=st.sampled_from([0.0, 0.5, 7.0]))
def test_least_tokens_hold_at_every_strength_beside_weights_and_protection(policy, case, min_tokens, weight):
    spans, budget, protect, strength, _ = case
    assume(is_defined(policy, 64, budget))
    floors = [max(min(min_tokens, end - begin), sum(begin <= t < end for t in protect)) for begin, end in spans]
    needed = sum(floors) + sum(not any(begin <= t < end for begin, end in spans) for t in protect)
    fair = Fair(strength=strength, min_tokens=min_tokens, weights={"s0": weight})
    if needed > budget:
        with pytest.raises(
            ValueError,
            match=f"budget of row 0 is {budget} tokens, but min_tokens={min_tokens} and protection need {needed};",
        ):
            keep(policy, KEYS, QUERIES, budget=budget, spans=spans_of(spans), fair=fair, protect=protect)
        return
    kept = keep(policy, KEYS, QUERIES, budget=budget, spans=spans_of(spans), fair=fair, protect=protect)
    for head in kept.positions[0]:
        assert len(set(head.tolist())) == budget and set(protect) <= set(head.tolist())
        assert all(
            ((head >= begin) & (head < end)).sum() >= low for (begin, end), low in zip(spans, floors, strict=True)
        )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_strength_0_with_least_tokens_is_the_biased_policy_with_a_floor(policy):
    """Where the biased policy keeps enough, nothing changes; where it does not, the best of the instruction come in."""
    spans = {"a": (10, 20), "b": (30, 40)}
    biased = keep(policy, KEYS, QUERIES, budget=40, spans=spans)
    least = min(int(((biased.positions >= b) & (biased.positions < e)).sum(-1).min()) for b, e in spans.values())
    for min_tokens in range(1, 11):
        kept = keep(policy, KEYS, QUERIES, budget=40, spans=spans, fair=Fair(strength=0, min_tokens=min_tokens))
        assert np.array_equal(kept.positions, biased.positions) or min_tokens > least
        assert all(
            (((kept.positions >= b) & (kept.positions < e)).sum(-1) >= min_tokens).all() for b, e in spans.values()
        )


def test_equal_settings_share_their_plans():
    layout = Layout.of(1, 64, spans={"a": (0, 9)})
    fairs = [Fair(weights={"a": 2.0}), Fair(weights={"a": 2.0})]
    assert layout.split(fairs[0]) is layout.split(fairs[1]) and len(set(fairs)) == 1


def test_unmarked_text_gets_segments_of_its_own():
    kept = kvp.keep("knorm", KEYS, budget=32, spans={"a": (4, 24), "b": (24, 44), "c": (50, 60)}, fair=True)
    assert kept.segments.tolist() == [[0, 4, 24, 44, 50, 60, 64]]
    assert kept.quotas[0, 0].tolist() == [2, 10, 10, 3, 5, 2]


def test_rows_of_a_padded_batch_are_independent():
    keys = np.concatenate([KEYS, KEYS])
    queries = np.concatenate([QUERIES, QUERIES])
    spans = [{"a": (20, 40), "b": (40, 60)}, {"a": (0, 30), "b": (30, 60)}]
    for policy in POLICIES:
        both = keep(policy, keys, queries, compression_ratio=0.5, spans=spans, fair=True, valid=[(14, 64), (0, 64)])
        alone = keep(
            policy,
            KEYS[:, :, 14:],
            QUERIES[:, :, 14:],
            compression_ratio=0.5,
            spans={"a": (6, 26), "b": (26, 46)},
            fair=True,
        )
        assert both.counts.tolist() == [[25, 25], [32, 32]]
        assert (
            np.array_equal(both.positions[0, :, :25] - 14, alone.positions[0])
            and (both.positions[0, :, 25:] == -1).all()
        )


@pytest.mark.parametrize("strength", [0.1234567890123456, 1e-300, 0.3000000000000001, 5e-324])
def test_blending_is_exact_for_any_strength(strength):
    """Long fractions times thousands of tokens are beyond 64 bits."""
    counts, quotas, share = np.array([[3000, 9000, 1]]), np.array([[6001, 1000, 5000]]), Fraction(str(strength))
    exact = [(1 - share) * int(a) + share * int(b) for a, b in zip(counts[0], quotas[0], strict=True)]
    rest = sorted(range(3), key=lambda j: (exact[j] - int(exact[j]), j), reverse=True)
    expected = [int(x) + (j in rest[: 12001 - sum(map(int, exact))]) for j, x in enumerate(exact)]
    assert blend(counts, quotas, strength)[0].tolist() == expected and sum(expected) == 12001


def test_what_can_be_read_once_is_read_once():
    """An iterator of spans or of what is protected is for all rows of a batch, not for the first one."""
    keys, settings = KEYS.repeat(3, 0), {"budget": 9, "fair": True}
    listed = kvp.keep("knorm", keys, spans=[(0, 9), (9, 30)], protect=[40, 41], **settings)
    once = kvp.keep("knorm", keys, spans=iter([(0, 9), (9, 30)]), protect=iter([40, 41]), **settings)
    assert np.array_equal(once.positions, listed.positions)
    assert (np.isin(once.positions, [40, 41]).sum(-1) == 2).all()


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_those_of_python(number):
    """... as they are written in decimal, wherever fairness takes one."""
    assert Fair(strength=number(0.1)) == Fair.parse(number(0.1)) == Fair(strength=0.1)
    assert Fair(strength=number(0.1)).label == 0.1 and type(Fair(strength=number(0.1)).label) is float
    weighted = [Fair(weights={"span 0": kind(0.3)}) for kind in (number, float)]
    first, second = (kvp.keep("knorm", KEYS, budget=20, spans=[(0, 30), (30, 64)], fair=fair) for fair in weighted)
    assert weighted[0] == weighted[1] and np.array_equal(first.positions, second.positions)
