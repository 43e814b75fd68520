"""A wrapped model against the same model unwrapped: what eviction must leave unchanged, exactly or to 1e-5."""

import copy
import gc

import numpy as np
import pytest
import torch
from model_sweep import not_refused
from tiny_models import build, feed, ids, masked_like, tiny_prompt
from tiny_policies import EQUAL as POLICIES
from tiny_policies import takes
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.cache import KeptCache, KeptLayer
from kvpitfalls.hf.model import attached
from kvpitfalls.hf.verify import Shuffle

CLOSE = {"rtol": 0, "atol": 1e-5}
N_PROMPT = 20
CHUNKS = [1, 1, 5, 1]
SPANS = {"first": (2, 9), "second": (9, 18)}


FAMILIES = [
    ("llama", "eager"),
    ("llama", "sdpa"),
    ("gemma3_text", "sdpa"),
    ("gpt2", "eager"),
]  # test_behaviours.py has many more


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def model(request):
    return build(*request.param)


def left_pad(n_token=30):
    mask = torch.ones(2, n_token, dtype=torch.long)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
def test_ratio_0_is_bit_identical(model, padded):
    tokens, mask = ids(), left_pad() if padded else None
    plain = feed(model, tokens, [N_PROMPT, *CHUNKS], DynamicCache(config=model.config), mask)
    for policy in POLICIES:
        with kvp.wrap(model, policy, compression_ratio=0) as handle:
            wrapped = feed(model, tokens, [N_PROMPT, *CHUNKS], handle.new_cache(), mask)
        real = slice(None) if mask is None else mask[:, : wrapped.shape[1]].bool()
        assert torch.equal(wrapped[real], plain[real]), policy


@pytest.mark.parametrize("padded", [False, True])
def test_order_of_cached_rows_is_invisible(model, padded):
    tokens, mask = ids(), left_pad() if padded else None
    plain = feed(model, tokens, [N_PROMPT, *CHUNKS], DynamicCache(config=model.config), mask)
    with attached(model):
        cache = KeptCache(model.config, Shuffle())
        shuffled = feed(model, tokens, [N_PROMPT, *CHUNKS], cache, mask)
    assert any((layer.pos.diff() < 0).any() for layer in cache.kept_layers)
    torch.testing.assert_close(shuffled[1:], plain[1:], **CLOSE)
    torch.testing.assert_close(shuffled[0, 3:], plain[0, 3:], **CLOSE)
    with kvp.wrap(model, "knorm", budget=5) as handle:
        assert handle.verify() < 1e-5


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("fair", [False, True])
def test_evicting_equals_masking(model, policy, fair):
    if not takes(model, policy):
        pytest.skip("the model turns no queries by their positions, or in a way of its own")
    tokens = ids()
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], spans=SPANS)
        kept = copy.deepcopy(cache)
        evicted = feed(model, tokens, CHUNKS, cache, start=N_PROMPT)
    plain = DynamicCache(config=model.config)
    full = feed(model, tokens, [N_PROMPT], plain)
    untouched = feed(model, tokens, CHUNKS, copy.deepcopy(plain), start=N_PROMPT)
    with masked_like(model, kept, N_PROMPT):
        masked = feed(model, tokens, CHUNKS, plain, start=N_PROMPT)
    torch.testing.assert_close(evicted, masked, **CLOSE)
    assert not torch.allclose(evicted, untouched, atol=1e-3), "eviction changed nothing, so the comparison says nothing"
    assert full.shape[1] == N_PROMPT


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("fair", [False, True])
def test_left_padded_batch_equals_single_rows(model, policy, fair):
    if not takes(model, policy):
        pytest.skip("the model turns no queries by their positions, or in a way of its own")
    tokens, mask, n_pad = ids(), left_pad(), 3
    spans = [{"a": (5, 10), "b": (12, 19)}, {"a": (2, 10), "b": (10, 14)}]
    with kvp.wrap(model, policy, compression_ratio=0.6, fair=fair, protect="sinks") as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], attention_mask=mask[:, :N_PROMPT], spans=spans)
        together = feed(model, tokens, CHUNKS, cache, mask, start=N_PROMPT)
        short = {name: (begin - n_pad, end - n_pad) for name, (begin, end) in spans[0].items()}
        first = handle.compress(tokens[:1, n_pad:N_PROMPT], spans=short)
        alone = feed(model, tokens[:1, n_pad:], CHUNKS, first, start=N_PROMPT - n_pad)
        second = handle.compress(tokens[1:, :N_PROMPT], spans=spans[1])
        other = feed(model, tokens[1:], CHUNKS, second, start=N_PROMPT)
    torch.testing.assert_close(together[:1], alone, **CLOSE)
    torch.testing.assert_close(together[1:], other, **CLOSE)
    for layer in cache.kept_layers:
        of_row = cache.positions(layer.index)[0]
        assert np.array_equal(of_row[of_row >= 0].reshape(of_row.shape[0], -1) - n_pad, first.positions(layer.index)[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [N_PROMPT - 3, N_PROMPT])
def test_positions_are_those_of_the_prompts_real_tokens(side, budget):
    """Also where nothing had to go, and when more tokens came since."""
    model, tokens, mask = build("llama"), ids(), torch.ones(2, N_PROMPT + 2, dtype=torch.long)
    begin, end = (3, N_PROMPT) if side == "left" else (0, N_PROMPT - 3)
    mask[0, :begin] = mask[0, end:N_PROMPT] = 0
    with torch.no_grad(), kvp.wrap(model, "knorm", budget=budget) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT])
        kept = [cache.positions(i) for i in range(3)]
        for each in (cache.copy(), cache.fixed(2)):
            feed(model, tokens, [2], each, mask, start=N_PROMPT)
            assert all(np.array_equal(each.positions(i), of_layer) for i, of_layer in enumerate(kept))
    for padded, whole in kept[0].transpose(1, 0, 2):
        assert padded[padded >= 0].tolist() == list(range(begin, end)) and len(whole) == budget
        assert set(whole) <= set(range(N_PROMPT)) and (np.diff(whole) > 0).all()


def manual_generate(model, cache, tokens, mask, n_new):
    """Greedy, with explicit positions."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    start = cache.get_seq_length()
    with torch.no_grad():
        logits = model(
            tokens[:, start:],
            attention_mask=mask,
            position_ids=positions[:, start:],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for _ in range(n_new):
            new = logits[:, -1:].argmax(-1)
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            logits = model(
                new,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, -1:],
                past_key_values=cache,
                use_cache=True,
            ).logits
    return tokens


@pytest.mark.parametrize("padded", [False, True])
def test_generate_equals_a_manual_loop_and_a_second_turn_works(model, padded):
    tokens, mask = ids(), left_pad() if padded else torch.ones(2, 30, dtype=torch.long)
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], attention_mask=mask[:, :N_PROMPT])
        by_hand = manual_generate(model, copy.deepcopy(cache), tokens, mask, 6)
        answer_cache = copy.deepcopy(cache)
        answer = model.generate(tokens, attention_mask=mask, past_key_values=answer_cache, **greedy)
        assert torch.equal(answer, by_hand)
        assert cache.get_seq_length() == N_PROMPT, "the original cache must not change"
        second = torch.cat([answer, ids(2, 4, seed=7)], 1)
        longer = torch.cat([mask, torch.ones(2, 10, dtype=torch.long)], 1)
        second_by_hand = manual_generate(model, copy.deepcopy(answer_cache), second, longer, 6)
        assert torch.equal(
            model.generate(second, attention_mask=longer, past_key_values=answer_cache, **greedy), second_by_hand
        )
    layer = answer_cache.kept_layers[0]
    assert layer.keys.shape[2] < layer.seen == answer_cache.get_seq_length(layer.index)


def test_plain_generate_compresses_the_whole_prompt(model):
    tokens = ids(1, N_PROMPT)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with kvp.wrap(model, "knorm", budget=6) as handle:
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), return_dict_in_generate=True, **greedy)
        report = handle.report()
        assert isinstance(out.past_key_values, DynamicCache)
        assert {count for row in report["layers"] for of_row in row["kept"] for count in of_row} == {6}
        empty = handle.new_cache()
        assert torch.equal(out.sequences, manual_generate(model, empty, tokens, torch.ones_like(tokens), 4))


def test_report_counts_what_is_there(model):
    with kvp.wrap(model, "h2o", compression_ratio=0.75, fair=True) as handle:
        cache = handle.compress(ids(1, N_PROMPT), spans=SPANS)
        report = handle.report()
    assert report["n_tokens"] == N_PROMPT and report["kept_share"] == pytest.approx(0.25)
    assert report["bytes_after"] == sum(
        x.numel() * x.element_size() for layer in cache.kept_layers for x in (layer.keys, layer.values)
    )
    assert report["bytes_after"] * 4 == report["bytes_before"]
    assert report["peak_bytes"] == report["bytes_after"] + 3 * report["layers"][-1]["bytes_after"], (
        "all compressed but the last layer"
    )
    assert list(report["not_compressed"]) == [
        i for i, layer in enumerate(cache.layers) if not isinstance(layer, KeptLayer)
    ]
    for name, (begin, end) in SPANS.items():
        shares = [((p := cache.positions(layer.index)) >= begin) & (p < end) for layer in cache.kept_layers]
        assert report["spans"][name] == pytest.approx(np.mean([x.sum(-1).mean() for x in shares]) / (end - begin))


def test_a_report_tells_of_every_instruction_of_every_row(model):
    spans = [{"a": (2, 9), "b": (9, 18)}, {"c": (0, 5)}, {}]
    with kvp.wrap(model, "tova", compression_ratio=0.5) as handle:
        cache = handle.compress(ids(3, N_PROMPT), spans=spans)
    report = cache.report()
    shares = [{name: cache.kept(name, row).mean() for name in of_row} for row, of_row in enumerate(spans)]
    assert report["spans_by_row"] == [pytest.approx(of_row) for of_row in shares]
    assert report["spans"] == report["spans_by_row"][0]
    shown = report._repr_html_()
    assert all(f"<bdi>{name}</bdi>" in shown or f">{name}<" in shown for name in "abc")


@pytest.mark.parametrize("amount", [{"compression_ratio": 0.0}, {"budget": 99}, {"budget": 9}], ids=str)
def test_a_report_speaks_of_the_prompt_however_long_the_answer(model, amount):
    """Also where nothing of it went."""
    with kvp.wrap(model, "knorm", **amount) as handle:
        before = handle.compress(tokens := ids(2, N_PROMPT)).report()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, min_new_tokens=5)
        after = handle.report()
    for name in ("n_tokens", "kept_share", "spans_by_row"):
        assert after[name] == before[name], name
    assert before["n_tokens"] == N_PROMPT


@pytest.mark.parametrize("when", ["prefill", "always"])
def test_a_report_outlives_the_cache_of_generate(model, when):
    tokens, spans = ids(1, N_PROMPT), {"a": (2, 9), "b": (9, 18)}
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with kvp.wrap(model, "h2o", compression_ratio=0.5, when=when) as handle:
        older = handle.compress(ids(1, 12, seed=3))
        out = model.generate(tokens, return_dict_in_generate=True, **options)
        wanted = dict(out.past_key_values.report())
        del out
        gc.collect()
        assert dict(handle.report()) == wanted and wanted["n_tokens"] == N_PROMPT, "not of the older cache"
        model.generate(tokens, **options)
        assert dict(handle.report()) == wanted and "No cache yet" not in handle._repr_html_()
        layers = handle._caches.last().layers
        assert all(layer.keys.device.type == layer.values.device.type == "meta" for layer in layers), "it holds no keys"
        cache = handle.compress(tokens, spans=spans)
        del cache
        with pytest.raises(ValueError, match="no cache was compressed yet, or none is in use any more"):
            handle.report()
    assert older.report()["n_tokens"] == 12


def test_a_report_raises_where_nothing_was_compressed(model, monkeypatch):
    monkeypatch.setattr(KeptLayer, "keep", lambda *_: None)
    with kvp.wrap(model, "h2o", compression_ratio=0.75) as handle:
        cache = handle.compress(ids(1, N_PROMPT))
        with pytest.raises(
            kvp.NotInterceptedError,
            match="holds 20 tokens of row 0's prompt; expected at most 5: it was not compressed",
        ):
            handle.report()
    assert cache.get_seq_length() == N_PROMPT


def test_beam_search_and_batch_operations(model):
    tokens = ids(1, N_PROMPT + 4)
    with kvp.wrap(model, "tova", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        both = feed(model, tokens.expand(2, -1), [4], twice, start=N_PROMPT)
        one = feed(model, tokens, [4], copy.deepcopy(cache), start=N_PROMPT)
        torch.testing.assert_close(both, one.expand_as(both), **CLOSE)
        assert twice.report()["kept_share"] == pytest.approx(0.5) and len(twice.valid) == 2
        joined = KeptCache.join([cache, handle.compress(ids(1, N_PROMPT, seed=3))])
        torch.testing.assert_close(feed(model, tokens.expand(2, -1), [4], joined, start=N_PROMPT)[:1], one, **CLOSE)
        joined.batch_select_indices(torch.tensor([0]))
        assert np.array_equal(joined.positions(2), cache.positions(2)) and len(joined.valid) == 1
        with pytest.raises(ValueError, match="differ in length, or in whether they are compressed"):
            KeptCache.join([cache, handle.compress(ids(1, 10))])
        beams = model.generate(tokens, num_beams=3, max_new_tokens=4, do_sample=False)
        assert beams.shape == (1, N_PROMPT + 8)


def test_remove_restores_everything():
    model = build("llama")
    from transformers.models.llama import modeling_llama

    before = modeling_llama.ALL_ATTENTION_FUNCTIONS
    tokens = ids()
    plain = feed(model, tokens, [N_PROMPT, 1], DynamicCache(config=model.config))
    handle = kvp.wrap(model, "knorm", compression_ratio=0.5)
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is not before
    other = build("llama")
    assert torch.equal(feed(other, tokens, [N_PROMPT, 1], DynamicCache(config=model.config)), plain), (
        "an unwrapped model of the same kind"
    )
    cache = handle.compress(tokens[:, :N_PROMPT])
    assert copy.deepcopy(model)(tokens).logits.shape[1] == 30, "a copy is not wrapped"
    handle.remove()
    handle.remove()
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is before
    assert "forward" not in vars(model.model)
    assert torch.equal(feed(model, tokens, [N_PROMPT, 1], DynamicCache(config=model.config)), plain)
    with pytest.raises(kvp.NotInterceptedError, match="not wrapped"):
        model(tokens[:, N_PROMPT:], past_key_values=cache)
    with pytest.raises(ValueError, match="removed"):
        handle.compress(tokens)


def test_a_model_that_is_dropped_while_wrapped_is_freed_and_leaves_nothing():
    import gc
    import weakref

    from transformers.models.llama import modeling_llama

    before = modeling_llama.ALL_ATTENTION_FUNCTIONS
    model = build("llama")
    handle = kvp.wrap(model, "knorm", compression_ratio=0.5)
    handle.compress(ids()[:, :N_PROMPT])
    freed = weakref.ref(model)
    del model, handle
    gc.collect()
    assert freed() is None and modeling_llama.ALL_ATTENTION_FUNCTIONS is before


def test_threads_share_one_wrapped_model():
    from concurrent.futures import ThreadPoolExecutor

    model, batches = build("llama"), [ids(seed=seed) for seed in range(6)]
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:

        def run(tokens):
            return feed(model, tokens, CHUNKS, handle.compress(tokens[:, :N_PROMPT]), start=N_PROMPT)

        alone = [run(tokens) for tokens in batches]
        with ThreadPoolExecutor(3) as pool:
            assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(run, batches), strict=True))


def test_a_layer_that_is_not_intercepted_raises(monkeypatch):
    model = build("llama")
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        attention = model.model.layers[1].self_attn
        monkeypatch.setattr(attention, "forward", _forward_behind_the_interface(attention))
        with pytest.raises(kvp.NotInterceptedError, match=r"layers \[1\]"):
            handle.compress(ids())


def _forward_behind_the_interface(attention):
    def forward(hidden_states, cache=None, past_key_values=None, **kwargs):
        cache = past_key_values if cache is None else cache  # its name before transformers 5.24
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        keys = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
        cache.update(keys, keys, attention.layer_idx)
        return hidden_states, None

    return forward


@pytest.mark.parametrize("number", [int, torch.tensor])  # transformers' own generate gives either
@pytest.mark.parametrize("fixed", [False, True])
def test_crop_takes_back_only_what_came_after_eviction(number, fixed):
    model, tokens = build("llama"), ids(1)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        cache = cache.fixed(10) if fixed else cache
        once = feed(model, tokens, [5], copy.deepcopy(cache), start=N_PROMPT)
        feed(model, tokens, [5], cache, start=N_PROMPT)
        cache.crop(number(-5))
        assert type(cache.n_seen) is int and cache.n_seen == N_PROMPT
        assert torch.equal(feed(model, tokens, [5], cache, start=N_PROMPT), once)
        with pytest.raises(ValueError, match="only the newest 5 came after eviction"):
            cache.crop(-6)


def test_a_crop_that_a_sliding_layer_cannot_follow_leaves_the_layers_before_it_as_they_are():
    model = build("gemma3_text", num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    tokens = ids()
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :24])
        feed(model, tokens, [1, 1, 1], cache, start=24)
        wanted = feed(model, tokens, [1, 1], cache.copy(), start=27)
        with pytest.raises((ValueError, RuntimeError), match="crop"):
            cache.crop(-2)
        assert [layer.get_seq_length() for layer in cache.layers] == [27, 27]
        assert torch.equal(feed(model, tokens, [1, 1], cache, start=27), wanted)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_prompt_is_as_long_as_it_was_given_also_where_every_row_ends_in_padding(ratio):
    """As a tokenizer pads to a maximal length; and where rows go, the others' prompt is no shorter."""
    llama, tokens, mask = build("llama"), ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 17:] = mask[1, 14:] = 0
    with kvp.wrap(llama, "knorm", compression_ratio=ratio) as handle:
        cache = handle.compress(tokens, mask)
        cache.batch_select_indices(torch.tensor([1]))
        assert (cache.n_prompt, cache.report()["n_tokens"], "later" in repr(cache)) == (20, 20, False)
        cache.fixed(4)
        shown = torch.cat([mask[1:], torch.ones(1, 1, dtype=torch.long)], 1)
        shown[0, 18] = 1
        with pytest.raises(ValueError, match=r"hides other tokens of the prompt .* \(row 0, token 18\)"):
            llama.generate(torch.cat([tokens[1:], ids(1, 1)], 1), attention_mask=shown, **cache_argument(llama, cache))


def test_a_prompt_that_is_cut_is_the_shorter_one():
    """What comes then is none of it."""
    llama, tokens = build("llama"), ids(1, 20)
    with kvp.wrap(llama, "knorm", compression_ratio=0) as handle:
        cache = handle.compress(tokens, spans={"a": (2, 10), "b": (12, 20)})
        cache.crop(15)
        for n_later in (0, 3):
            if n_later:
                feed(llama, torch.cat([tokens[:, :15], ids(1, 3, seed=1)], 1), [n_later], cache, start=15)
            report = cache.report()
            assert (report["n_tokens"], cache.n_seen, cache.valid) == (15, 15 + n_later, [(0, 15)])
            assert report["spans"] == {"a": 1.0, "b": 3 / 8} and report["layers"][0]["kept"] == [[15, 15]]
            assert cache.positions(0).shape == (1, 2, 15)
        padded = handle.compress(ids(2, 20), torch.tensor([[0] * 6 + [1] * 14, [1] * 20]))
        padded.crop(4)
        assert padded.report()["layers"][0]["kept"] == [[0, 0], [4, 4]] and padded.valid == [(4, 4), (0, 4)]


def test_what_is_refused_is_as_it_was():
    """A plain cache is still one, an empty one of ours belongs to no other wrap, and the handle knows its newest."""
    llama, tokens, plain = build("llama"), ids(1, 20), DynamicCache()
    with kvp.wrap(llama, "knorm", budget=4, fair=True) as handle:
        cache = handle.compress(tokens, spans={"a": (2, 10)})
        emptied = cache.copy()
        emptied.reset()
        for each in (plain, emptied, None):
            with pytest.raises(ValueError, match="fair eviction needs the instructions' places"):
                llama(tokens, use_cache=True, **({} if each is None else cache_argument(llama, each)))
        assert handle.report()["n_tokens"] == 20
    assert type(plain) is DynamicCache
    feed(llama, tokens, [20], plain)
    with kvp.wrap(llama, "knorm", budget=5):
        feed(llama, tokens, [20], emptied)
    assert emptied.report()["layers"][0]["kept"] == [[5, 5]]


@pytest.mark.parametrize("family", not_refused("gemma3_text", "falcon_h1"))
def test_a_forward_outside_of_the_wrap_leaves_layers_that_are_not_compressed_as_they_are(family):
    """They come before the first one that refuses."""
    model, tokens = build(family), ids(1, 23)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        caches = [handle.compress(tokens[:, :20])]
        caches.append(caches[0].copy())
    with pytest.raises(kvp.NotInterceptedError, match="not wrapped"):
        feed(model, tokens, [2], caches[1], start=20)
    with kvp.wrap(model, "knorm", compression_ratio=0.5):
        assert torch.equal(*(feed(model, tokens, [1, 1], cache, start=20) for cache in caches))


def test_an_audit_inside_generate_measures_the_plain_model_and_leaves_the_handles_report():
    llama, prompt = build("llama"), tiny_prompt()
    setting = {"policies": ["snapkv"], "compression_ratios": [0.5]}
    wanted, made = kvp.audit(llama, prompt, **setting).rows, []

    class Auditor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            made.append(kvp.audit(llama, prompt, **setting).rows)
            return scores

    with kvp.wrap(llama, "knorm", budget=4) as handle:
        llama.generate(ids(1, 20), max_new_tokens=3, do_sample=False, logits_processor=LogitsProcessorList([Auditor()]))
        assert made == [wanted] * 3
        assert (handle.report()["n_tokens"], handle.report()["layers"][0]["kept"]) == (20, [[4, 4]])
