"""Settings in pairs: arrays in which every two values of any two options meet. What a wrap keeps and answers is what a
slow model of the same definitions keeps and answers, or the combination is refused in one sentence."""

import itertools
import random
import re
from fractions import Fraction

import pytest
import slow_choices
import torch
from model_sweep import build as build_type
from model_sweep import not_refused
from slow_choices import Setting
from slow_model import Slow
from tiny_models import build, feed

import kvpitfalls as kvp
from kvpitfalls.eviction.allocation import Ada, Pyramid

N, N_LATER, CLOSE, NEAR = 30, 5, 2e-4, 2e-5
SNAPKV = kvp.SnapKV(window_size=4, kernel_size=3)
POLICIES = [
    *(kvp.StreamingLLM(2), kvp.StreamingLLM(), SNAPKV, kvp.TOVA(), kvp.H2O(), kvp.KNorm(), kvp.KeyDiff()),
    *(kvp.LagKV(n_sink=1, lag_size=3), kvp.AdaKV(window_size=4, kernel_size=3, alpha=0.3)),
    *(kvp.PyramidKV(window_size=2, kernel_size=3, beta=3), kvp.RKV(window_size=3, kernel_size=3)),
    *(kvp.ChunkKV(SNAPKV, chunks=4), kvp.ChunkKV("keydiff", chunks=3)),
]
FAIR = [
    *(False, 0.0, True, "floor", "floor=2", kvp.Fair(weights={"a": 2.0}), kvp.Fair(weights={"a": 0.0})),
    *(kvp.Fair(min_tokens=2), kvp.Fair(template="absorb")),
]
BETWEEN = [0.5, 0.123456789, "paper", kvp.Fair(0.7, {"a": 3.0}, 1), kvp.Fair(0.3, template="absorb")]
SPANS = {
    "touching": {"a": (4, 14), "b": (14, 22)},
    "apart": {"a": (3, 9), "b": (11, 18), "c": (19, 22)},
    "one": {"a": (5, 16)},
    "of one token": {"a": (6, 7), "b": (7, 8), "c": (12, 13)},
    "at both ends": {"a": (0, 5), "b": (-6, 0)},
    "all": {"a": (0, 0)},
    "many": {"a": (0, 2), "b": (2, 5), "c": (5, 9), "d": (9, 10), "e": (11, 13), "f": (15, 18), "g": (18, 20)},
}
# Windows and linear attention count padding that comes after a prompt, as they do without a wrap.
OF_COLUMNS = ("gemma3_text", "gemma2", "gpt_oss", "qwen3_next")
ONE_LAYER = ("gemma2", "gpt_oss", "qwen3_next")  # that is compressed
FAMILIES = ["llama", "mha", "mqa", "qwen3", "gpt2", "gemma3_text"]
FAMILIES += not_refused("gemma2", "gpt_oss", "deepseek_v3", "qwen3_next")
COMMON = {
    "family": FAMILIES,
    "attention": ["sdpa", "eager"],
    "spans": list(SPANS),
    "rows": [(N,), (N, N - 7), (N - 4, N)],
    "later": [(1, 1, 1), (1, 3), (4, 1)],
    "amount": [0.0, 0.1, 0.25, 0.5, 0.75, 9, 15, 100],
    "protect": [None, "sinks", "boundary", ["a"], [1, 3]],
}
KINDS = {
    "at once": {
        "policy": POLICIES,
        "fair": FAIR + BETWEEN,
        "side": ["left", "right"],
        "allocation": [None, Pyramid(beta=2), Ada()],
        "then": ["as it is", "copied", "saved", "fixed"],
    },
    "in chunks": {
        "policy": [policy for policy in POLICIES if policy.in_chunks],
        "fair": FAIR,
        "chunks": [2, 7, (11, 2, N - 13), 1000],
        "allocation": [None, Pyramid(beta=2)],
        "then": ["as it is", "saved"],
    },
    "held": {
        "policy": [policy for policy in POLICIES if policy.holds],
        "fair": FAIR,
        "when": ["always", "decode"],
        "then": ["as it is", "copied"],
        "amount": [*COMMON["amount"], 32],
    },
    "held in place": {
        "policy": [kvp.StreamingLLM(2), kvp.TOVA(), kvp.H2O()],
        "fair": [False],
        "when": ["always"],
        "then": ["fixed"],
        "family": ["llama", "mha", "mqa", "qwen3", "gpt2"],
        "amount": [*COMMON["amount"], 32],
    },
}
REST = {"side": ["left"], "allocation": [None], "when": ["prefill"], "chunks": [None]}


def pairs_of(options, seed=0, n_try=6):
    """Rows of one value for each option, in which any two values of two options meet."""
    names, draw = list(options), random.Random(seed)
    todo = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(len(options[names[i]]))
        for b in range(len(options[names[j]]))
    }
    while todo:
        tries = []
        for _ in range(n_try):
            row = dict(min(todo) if not tries else draw.choice(sorted(todo)))
            for i in draw.sample(range(len(names)), len(names)):
                values = draw.sample(range(len(options[names[i]])), len(options[names[i]]))
                new = {a: sum(tuple(sorted(((i, a), other))) in todo for other in row.items()) for a in values}
                row.setdefault(i, max(values, key=new.__getitem__))
            met = {pair for pair in itertools.combinations(sorted(row.items()), 2) if pair in todo}
            tries.append((len(met), sorted(row.items()), met))
        _, row, met = max(tries, key=lambda one: one[0])
        todo -= met
        yield {names[i]: options[names[i]][a] for i, a in row}


def that_can_be(case):
    """The row, with another value where two cannot meet by what their docstrings say."""
    policy, family = case["policy"], case["family"]
    case = {**case, "attention": "eager" if family in ("gemma2", "gpt_oss") else case["attention"]}
    if case["fair"] == "paper":
        case["spans"] = "touching"
    if policy.allocation != "uniform":
        case["allocation"] = None
    shared = policy.allocation if case["allocation"] is None else case["allocation"]
    is_too_few = isinstance(shared, Ada) and family in ("mqa", "deepseek_v3")
    if is_too_few or (isinstance(shared, Pyramid) and family in ONE_LAYER):
        case["family"] = "llama"
    if case["then"] == "fixed" and case["family"] in OF_COLUMNS:
        case["family"] = "gpt2"
    if case["family"] == "qwen3_next" and case["side"] == "right":
        case["family"] = "qwen3"
    if len(case["rows"]) > 1 and case["protect"] == [1, 3]:  # which are columns of the batch
        case["protect"] = "sinks"
    return case


@pytest.fixture(scope="module")
def model_of():
    models, heads = {}, {"mha": 4, "mqa": 1}

    def made(family, attention):
        if (family, attention) not in models:
            plain = family in ("qwen3", "gpt2", "gemma3_text")
            changes = {"num_key_value_heads": heads[family]} if family in heads else {}
            is_tiny = plain or family == "llama" or family in heads
            name = family if family not in heads else "llama"
            models[family, attention] = build(name, attention, **changes) if is_tiny else build_type(name, attention)
        return models[family, attention]

    return made


def spans_in(case, n):
    """The instructions of a row of ``n`` tokens; an end of 0 is the row's, and places below 0 count from it."""
    return {name: (a % n, b % n or n) for name, (a, b) in SPANS[case["spans"]].items()}


def setting_of(case, n, shares_choice):
    """What is asked for of a row of ``n`` tokens, in the slow model's words."""
    policy, fair, amount, spans = case["policy"], case["fair"], case["amount"], spans_in(case, n)
    kept = amount if isinstance(amount, int) else max(1, int(n * (1 - Fraction(repr(amount)))))
    asked = Setting(policy, kept if case["when"] != "prefill" else min(kept, n), list(spans.values()))
    if isinstance(fair, kvp.Fair):
        asked.strength, asked.min_tokens, asked.absorbs = fair.strength, fair.min_tokens, fair.template == "absorb"
        asked.weights = None if fair.weights is None else [fair.weights.get(name, 1.0) for name in spans]
    elif isinstance(fair, str):
        asked.is_paper = asked.absorbs = fair == "paper"
        asked.strength, asked.min_tokens = float(fair == "paper"), {"floor": 4, "floor=2": 2}.get(fair, 0)
    else:
        asked.strength = float(fair)
    protect, end = case["protect"], asked.kept // 10
    words = {"sinks": range(policy.n_sink), "boundary": [*range(end), *range(n - end, n)], None: ()}
    named = {**words, **{name: range(*span) for name, span in spans.items()}}
    items = protect if isinstance(protect, list) else [protect]
    asked.protected = {t for item in items for t in ([item] if isinstance(item, int) else named[item])}
    shared = policy.allocation if policy.allocation != "uniform" else case["allocation"]
    if isinstance(shared, Pyramid):
        asked.allocation, asked.window = ("pyramid", shared.beta), shared.window_size
    elif isinstance(shared, Ada):
        asked.allocation = ("ada", shared.alpha)
    asked.when, asked.shares_choice = case["when"], shares_choice
    return asked


def batch(case, seed):
    """Ids and mask (B, T) with what comes later, and where each row begins."""
    draw, n_most = torch.Generator().manual_seed(seed), max(case["rows"])
    rows = [3 + torch.randperm(125, generator=draw)[: n + N_LATER] for n in case["rows"]]
    starts = [n_most - n if case["side"] == "left" else 0 for n in case["rows"]]
    ids, mask = torch.zeros(2, len(rows), n_most + N_LATER, dtype=torch.long)
    for b, (row, n) in enumerate(zip(rows, case["rows"], strict=True)):
        for at, tokens in ((starts[b], row[:n]), (n_most, row[n:])):
            ids[b, at : at + len(tokens)], mask[b, at : at + len(tokens)] = tokens, 1
    return ids, mask, starts, rows


def held_in(cache, starts):
    """Per row, layer and head, the prompt's tokens that are held, counted from the row's first."""
    of_layers = [cache.positions(layer.index) for layer in cache.kept_layers]
    return [[[(x[x >= 0] - start).tolist() for x in of[b]] for of in of_layers] for b, start in enumerate(starts)]


def wrapped(model, case, ids, mask, starts, file):
    """What the wrap holds after the prompt and in the end, its logits, and whether heads share one choice."""
    n_most, amount = max(case["rows"]), case["amount"]
    spans = [
        {name: (a + start, b + start) for name, (a, b) in spans_in(case, n).items()}
        for n, start in zip(case["rows"], starts, strict=True)
    ]
    given = {name: case[name] for name in ("policy", "fair", "protect", "allocation", "when")}
    given["budget" if isinstance(amount, int) else "compression_ratio"] = amount
    with kvp.wrap(model, **given) as handle:
        prompt = {"attention_mask": mask[:, :n_most], "spans": spans, "prefill_chunk_size": case["chunks"]}
        cache = handle.compress(ids[:, :n_most], **prompt)
        held, shares = held_in(cache, starts), cache.kept_layers[0].shared
        assert [row["kept"] for row in cache.report()["layers"]] == [
            [list(map(len, of_row[i])) for of_row in held] for i in range(len(held[0]))
        ]
        cache = cache.copy() if case["then"] == "copied" else cache
        cache = cache.fixed(N_LATER) if case["then"] == "fixed" else cache
        if case["then"] == "saved":
            cache.save(file)
            cache = kvp.load_cache(file, model)
        return held, feed(model, ids, case["later"], cache, mask, start=n_most), held_in(cache, starts), shares


def check(model, case, seed, file):
    """Raise where the wrap is not what the slow model is; True if no choice was a matter of rounding."""
    ids, mask, starts, rows = batch(case, seed)
    held, logits, later, shares = wrapped(model, case, ids, mask, starts, file)
    is_clear, n_most, sizes = True, max(case["rows"]), case["chunks"]
    if isinstance(sizes, int):
        sizes = [min(sizes, n_most - begin) for begin in range(0, n_most, sizes)]
    for b, (row, n) in enumerate(zip(rows, case["rows"], strict=True)):
        slow_choices.margins.clear()
        asked, own = setting_of(case, n, shares), [n]
        if sizes is not None and len(sizes) > 1:  # those of a row begin after its padding
            ends = [max(0, end - starts[b]) for end in itertools.accumulate(sizes, initial=0)]
            own = asked.chunks = [d - c for c, d in itertools.pairwise(ends) if d > c]
        slow = Slow(model, asked, n)
        slow.feed(row[:n], own)
        prompt = [slow.layers[i].held for i in slow.places]
        wanted = slow.feed(row[n:], case["later"])
        after = [[[t for t in x if t < n] for x in slow.layers[i].held] for i in slow.places]
        is_same = alike(held[b], prompt) and alike(later[b], after)
        difference = float((logits[b] - wanted).abs().max() / wanted.abs().max())
        counts = case["side"] == "right" and n < n_most and case["family"] in OF_COLUMNS
        if (not is_same or (difference > CLOSE and not counts)) and min(slow_choices.margins, default=1) < NEAR:
            is_clear = False
            continue
        assert is_same, f"row {b} keeps {held[b]} and {later[b]} in the end; expected {prompt} and {after}"
        assert counts or difference < CLOSE, f"row {b} answers otherwise: {difference:.1g}"
    return is_clear


def alike(held, wanted):
    """Whether layers hold the same tokens; where the cache holds what heads are made of, it may have fewer."""
    return all(
        all(mine == theirs for mine, theirs in zip(itertools.cycle(of), slow, strict=False))
        for of, slow in zip(held, wanted, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_two_settings_keep_and_answer_what_a_slow_model_does_or_are_refused(kind, model_of, tmp_path):
    outcomes, taken = [], set()
    for seed, case in enumerate(pairs_of({**COMMON, **REST, **KINDS[kind]})):
        case = that_can_be(case)
        try:
            is_clear = check(model_of(case["family"], case["attention"]), case, seed, tmp_path / "cache")
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        except kvp.BudgetError as refusal:  # no other: all else was made to fit
            assert re.fullmatch(r"[^\n]*[0-9][^\n]*; ?[^\n]*expect[^\n]*", str(refusal)), refusal
            outcomes.append("refused")
            continue
        outcomes.append("clear" if is_clear else "near")
        taken |= {(name, repr(value)) for name, value in case.items()}
    assert outcomes.count("clear") > 0.6 * len(outcomes) and outcomes.count("near") <= 0.02 * len(outcomes)
    assert {("policy", repr(policy)) for policy in KINDS[kind]["policy"]} <= taken
    assert {("fair", repr(fair)) for fair in KINDS[kind]["fair"]} <= taken


def test_a_row_in_chunks_is_the_row_alone_where_its_first_segment_has_no_quota(model_of):
    """Of its first chunk nothing would be held; what other rows hold then is not its affair."""
    model, tokens = model_of("llama", "sdpa"), batch({"rows": (N, N), "side": "left"}, 0)[0]
    first, other = {"a": (0, 6), "b": (6, 20)}, {"a": (20, 26), "b": (6, 20)}
    with kvp.wrap(model, "streaming_llm", budget=9, fair=kvp.Fair(weights={"a": 0.0})) as handle:
        after = []
        for rows, spans in ((tokens, [first, other]), (tokens[:1], [first])):
            cache = handle.compress(rows[:, :N], spans=spans, prefill_chunk_size=2)
            after.append(feed(model, rows, [1] * N_LATER, cache, start=N)[0])
    torch.testing.assert_close(*after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in OF_COLUMNS if name != "qwen3_next" and name in FAMILIES])
def test_what_is_read_after_prompts_with_padding_behind_them_is_refused_where_windows_count_it(family, model_of):
    model, tokens, mask = model_of(family, "eager"), *batch({"rows": (N, N), "side": "left"}, 0)[:2]
    mask[0, N - 8 : N] = 0
    with kvp.wrap(model, kvp.KVzip(n_sink=0), compression_ratio=0.5) as handle:
        with pytest.raises(ValueError, match="padded on the right, and policy 'kvzip' has the model read on"):
            handle.compress(tokens[:, :N], mask[:, :N])
        handle.compress(tokens[:, :N], mask[:, :N].flip(1))
    with kvp.wrap(model_of("llama", "eager"), kvp.KVzip(n_sink=0), compression_ratio=0.5) as handle:
        handle.compress(tokens[:, :N], mask[:, :N])


@pytest.mark.parametrize("family", not_refused("qwen3_next"))
@pytest.mark.parametrize(("rows", "ratio"), [(1, 0.5), (2, 0.5), (1, 0.0)])
def test_nothing_goes_on_from_padding_that_linear_attention_took_for_tokens(family, rows, ratio, model_of):
    model, tokens, mask = model_of(family, "eager"), *batch({"rows": (N, N), "side": "left"}, 0)[:2]
    mask[0, N - 8 : N] = 0
    tokens, mask = tokens[:rows], mask[:rows]
    with kvp.wrap(model, "knorm", compression_ratio=ratio) as handle:
        cache = handle.compress(tokens[:, :N], mask[:, :N])
        assert cache.report()["layers"][0]["kept"][0] == [int((N - 8) * (1 - ratio))] * 2
        with pytest.raises(kvp.UnsupportedModelError, match="padded on the right, and the linear attention of"):
            feed(model, tokens, [1], cache, mask, start=N)


@pytest.mark.parametrize("amount", [{"compression_ratio": 0.0}, {"budget": 100}, {"compression_ratio": 0.5}])
def test_a_cache_of_fixed_size_takes_prompts_that_all_have_padding_behind_them(amount, model_of):
    """The last columns of a prompt are none that came after it, be anything evicted or not."""
    model, tokens, mask = model_of("llama", "sdpa"), *batch({"rows": (N, N), "side": "left"}, 0)[:2]
    mask[0, N - 8 : N] = mask[1, N - 3 : N] = 0
    with kvp.wrap(model, "knorm", **amount) as handle:
        cache = handle.compress(tokens[:, :N], mask[:, :N])
        assert cache.report()["n_tokens"] == N and " later" not in repr(cache)
        after = [feed(model, tokens, [1, 3], x, mask, start=N) for x in (cache.fixed(N_LATER), cache)]
        torch.testing.assert_close(*after, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=r"^the cache has seen tokens after its prompt"):
            cache.fixed(N_LATER)


@pytest.mark.parametrize("when", ["decode", "always"])
@pytest.mark.parametrize("fair", [False, True, "floor=2"])
def test_a_held_budget_has_room_for_the_newest_token(when, fair, model_of):
    """Beside what must be kept, whatever the policy; the error is the one of a prompt that is compressed once."""
    model, tokens = model_of("llama", "sdpa"), batch({"rows": (N,), "side": "left"}, 0)[0]
    spans, n_forced = SPANS["touching"], {False: 8, True: 8, "floor=2": 10}[fair]
    for policy in ("streaming_llm", "knorm", "h2o", "tova"):
        with kvp.wrap(model, policy, budget=n_forced, fair=fair, protect="b", when=when) as handle:
            message = f"budget of row 0 is {n_forced} tokens; when='{when}' expects at least {n_forced + 1}"
            with pytest.raises(kvp.BudgetError, match=message):
                handle.compress(tokens[:, :N], spans=spans)
    newest = kvp.StreamingLLM(0)
    with kvp.wrap(model, newest, budget=n_forced + 1, fair=fair, protect="b", when=when) as handle:
        cache = handle.compress(tokens[:, :N], spans=spans)
        feed(model, tokens, [1], cache, start=N)
        assert all((layer.pos == N).any(-1).all() for layer in cache.kept_layers)


@pytest.mark.parametrize("policy", ["adakv", "pyramidkv"])
def test_a_held_budget_names_the_policy_whose_allocation_it_refuses(policy, model_of):
    message = f"^allocation of policy '{policy}' is .*; when='always' expects 'uniform'"
    with pytest.raises(ValueError, match=message):
        kvp.wrap(model_of("llama", "sdpa"), policy, budget=9, when="always")
    with pytest.raises(ValueError, match=r"^allocation is Ada"):
        kvp.wrap(model_of("llama", "sdpa"), "knorm", budget=9, when="always", allocation="ada")


@pytest.mark.parametrize("spans", ["apart", "touching", "many"])
def test_a_floor_holds_while_an_instruction_comes_in_chunks(spans, model_of, tmp_path):
    case = {"fair": kvp.Fair(min_tokens=2), "spans": spans, "amount": 0.4, "chunks": 1, "policy": kvp.KeyDiff()}
    case |= {"rows": (N, N - 7), "side": "left", "protect": None, "allocation": None, "when": "prefill"}
    case |= {"family": "mqa", "attention": "sdpa", "later": (4, 1), "then": "as it is"}
    assert check(model_of("mqa", "sdpa"), case, 0, tmp_path / "cache")
