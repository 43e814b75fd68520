"""Policies that have the model read on after the prompt: what they see of it, that nothing of it stays, and who is
refused."""

import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from model_sweep import build as built
from model_sweep import mixed, not_refused
from tiny_models import build, ids, longrope, tiny_prompt

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.evict import Evict
from kvpitfalls.hf.fork import compress_each
from kvpitfalls.policies import Again, Inputs, Vote, attention_sinks, kvzip

REQUEST = (7, 8, 9)
SPANS = {"a": (3, 9), "b": (9, 16)}


def scores_of(model, policy, tokens, mask=None, spans=None, fair=False):
    """What the policy scores each layer's prompt by, (layers, B, H, T)."""
    seen, choose = [], Evict.after_turns

    def after_turns(action, layer, valid):
        seen.append(torch.as_tensor(layer.judged.scores))
        choose(action, layer, valid)

    with pytest.MonkeyPatch.context() as patch, kvp.wrap(model, policy, budget=6, fair=fair) as handle:
        patch.setattr(Evict, "after_turns", after_turns)
        handle.compress(tokens, mask, spans)
    return torch.stack(seen)


def attention_of(model, ids):
    """The model's own attention weights of a plain forward, per compressed layer (B, Hq, n, n)."""
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return [out.attentions[layer.index] for layer in KeptCache(model.config).kept_layers]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_scores_are_the_most_attention_that_the_model_gives_when_it_reads_all_of_it_at_once(family):
    """Sliding layers, too, come to the repeat from the whole prompt, though their caches hold a window."""
    model, tokens = build(family), ids(2, 20)
    policy = kvp.KVzip(repeat_ids=REQUEST, answer_ids=(5,), n_sink=0)
    whole = torch.cat([tokens, torch.tensor([[*REQUEST, 5]]).expand(2, -1), tokens], 1)
    biased = scores_of(model, policy, tokens)
    fair = scores_of(model, policy, tokens, spans=SPANS, fair=True)
    for attention, of_layer, of_segments in zip(attention_of(model, whole), biased, fair, strict=True):
        shared = attention.unflatten(1, (of_layer.shape[1], -1))
        torch.testing.assert_close(of_layer, shared[..., 20:, :20].amax((2, 3)), rtol=1e-4, atol=1e-6)
        for begin, end in [(0, 3), *SPANS.values(), (16, 20)]:
            own = shared[..., 24 + begin : 24 + end, begin:end].amax((2, 3))
            torch.testing.assert_close(of_segments[..., begin:end], own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_padding", [0, 3])
@pytest.mark.parametrize("n_short", [16, 17, 19, 20, 43, 44])
@torch.no_grad()
def test_longrope_reads_a_prompt_again_as_it_reads_all_at_once_or_is_refused(n_short, n_padding):
    """20 positions of a prompt and 24 that are read, of which all are turned alike, or else it is said."""
    model, tokens = longrope(n_short), ids(2, 20)
    policy, mask = kvp.KVzip(repeat_ids=REQUEST, answer_ids=(5,), n_sink=0), torch.ones_like(tokens)
    mask[:, :n_padding] = 0
    n_real = 20 - n_padding
    if n_real <= n_short < 2 * n_real + 4:
        message = rf"^policy 'kvzip' has Phi3Model read {n_real + 4} tokens after a prompt of {n_real}, from short"
        with pytest.raises(kvp.UnsupportedModelError, match=message):
            scores_of(model, policy, tokens, mask)
        return
    whole = torch.cat([tokens, torch.tensor([[*REQUEST, 5]]).expand(2, -1), tokens[:, n_padding:]], 1)[:, n_padding:]
    for attention, of_layer in zip(attention_of(model, whole), scores_of(model, policy, tokens, mask), strict=True):
        most = attention.unflatten(1, (of_layer.shape[1], -1))[..., n_real:, :n_real].amax((2, 3))
        torch.testing.assert_close(of_layer[..., n_padding:], most, rtol=1e-4, atol=1e-6)


def parts_by_hand(policy, keys, turns, segments):
    """KVzip's scores (H, T) of one row by its formula, in float64, query by query."""
    keys, (n_head, n_token, n_dim) = keys.double(), keys.shape
    scores = torch.full((n_head, n_token), -1.0, dtype=torch.float64)
    for i, (queries, read) in enumerate(turns):
        first, last = i * policy.chunk_size, min((i + 1) * policy.chunk_size, n_token)
        n_lead = read.shape[1] - (last - first)
        sinks = list(range(min(policy.n_sink, first)))
        for h in range(n_head):
            for head in range(2 * h, 2 * h + 2):
                for q, query in enumerate(queries[head].double()):
                    seen = torch.cat([keys[h, sinks], keys[h, first:last], read[h, : q + 1].double()])
                    shares = (seen @ query / n_dim**0.5).softmax(0)
                    for k in range(first, last):
                        segment = next(x for x in segments if x[0] <= k < x[1])
                        is_own = q >= n_lead and segment[0] <= first + q - n_lead < segment[1]
                        if len(segments) == 1 or is_own:
                            scores[h, k] = max(scores[h, k], shares[len(sinks) + k - first])
    scores[:, : policy.n_sink] = 2
    return scores


@pytest.mark.parametrize("n_sink", [0, 3])
@pytest.mark.parametrize("n_token", [23, 14, 7, 3])
def test_parts_are_scored_by_the_formula(n_token, n_sink):
    policy = kvp.KVzip((1, 2), (3,), (4,), chunk_size=7, n_overlap=2, n_sink=n_sink)
    draw = torch.Generator().manual_seed(n_token)
    keys = torch.randn(2, 3, n_token, 8, generator=draw)
    lengths = [len(turn) for turn in policy.again(range(100, 100 + n_token))]
    turns = [tuple(torch.randn(2, n, k, 8, generator=draw) for n in (6, 3)) for k in lengths]
    spans = {"a": (1, 2)} if n_token < 9 else {"a": (2, 5), "b": (5, 9)}
    edges = sorted({0, n_token, *(x for span in spans.values() for x in span)})
    kept = {"budget": n_token - 1 if n_token == 3 else max(n_sink + 1, n_token // 2), "spans": spans, "again": turns}
    for fair, segments in ((False, [(0, n_token)]), (True, list(pairwise(edges)))):
        if n_sink >= kept["budget"]:
            continue
        scores = kvp.keep(policy, keys, fair=fair, **kept).scores
        for row in range(2):
            of_row = [(queries[row], read[row]) for queries, read in turns]
            by_hand = parts_by_hand(policy, keys[row], of_row, segments)
            torch.testing.assert_close(scores[row].double(), by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_torch_gives_what_the_core_gives(has_sinks, softcap, dtype, monkeypatch):
    """By a few queries at a time; two segments, of which the read ones' queries are not the only ones."""
    n_old, n_read, draw = 40, 33, torch.Generator().manual_seed(9)
    keys = torch.randn(1, 2, n_old + n_read, 16, generator=draw).to(dtype)
    queries = torch.randn(1, 6, n_read, 16, generator=draw).to(dtype)
    sinks = 3 * torch.randn(6, generator=draw) if has_sinks else None
    given = {"softcap": softcap, "sinks": sinks, "segments": [], "spans": [], "valid": [(0, n_old + n_read)]}
    part = Inputs(keys, queries, **given)
    votes = [Vote((2, 15), (44, 57), weight="max"), Vote((15, 36), (40, 73), weight="max")]
    ours, without = part.attend([votes])[0], Inputs(keys, queries, **given | {"sinks": None}).attend([votes])[0]
    for tile in (2**24, 6 * 73 * 5):
        monkeypatch.setitem(attention_sinks.TILE, "cpu", tile)
        torch.testing.assert_close(kvzip._most(part, votes), ours, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours, without) != has_sinks and (ours[:, 2:36] > 0).all() and not ours[:, 36:].any()


def test_what_is_read_is_the_request_and_the_prompt_part_by_part():
    policy = kvp.KVzip((1, 2), (3,), (4,), chunk_size=5, n_overlap=2)
    assert policy.again(range(10, 22)) == [
        [1, 2, 4, 10, 11, 12, 13, 14],
        [3, 13, 14, 4, 15, 16, 17, 18, 19],
        [3, 18, 19, 4, 20, 21],
    ]
    assert kvp.KVzip((1, 2), chunk_size=5, n_overlap=9).again(range(10, 16))[1] == [1, 2, *range(10, 16)]
    assert kvp.KVzip().again(range(4096)) == [list(range(2048)), [*range(2040, 4096)]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_nothing_of_what_was_read_stays(family):
    model, tokens = build(family), ids(2, 20)
    with kvp.wrap(model, "knorm", compression_ratio=0.0) as handle:
        plain = handle.compress(tokens)
    policy = kvp.KVzip(REQUEST, chunk_size=6, n_sink=0)
    with kvp.wrap(model, policy, budget=6) as handle:
        cache = handle.compress(tokens)
    assert cache.n_seen == 20 and torch.equal(cache.tokens, tokens)
    for ours, whole in zip(cache.layers, plain.layers, strict=True):
        assert ours.get_seq_length() == 20
        if ours in cache.kept_layers:
            places = torch.as_tensor(cache.positions(ours.index)).long()[..., None].expand_as(ours.keys)
            assert torch.equal(ours.keys, whole.keys.gather(2, places)) and ours.judged is None
            assert torch.equal(ours.values, whole.values.gather(2, places))
        else:
            assert torch.equal(ours.keys, whole.keys) and torch.equal(ours.values, whole.values)
    of_layer = cache.report()["layers"][0]["bytes_before"]
    longest = max(len(turn) for turn in policy.again(range(20)))
    assert cache.report()["peak_bytes"] == cache.report()["bytes_before"] + of_layer * (20 + longest) // 20


def test_rows_of_other_lengths_keep_what_they_keep_alone():
    """Some have fewer parts than others, on whichever side they are padded."""
    model, policy = build("llama"), kvp.KVzip(REQUEST, chunk_size=8, n_sink=1)
    tokens, n_real = ids(3, 21), [21, 12, 7]
    for on_left in (True, False):
        mask = torch.zeros(3, 21, dtype=torch.long)
        for row, n in zip(mask, n_real, strict=True):
            row[slice(21 - n, 21) if on_left else slice(0, n)] = 1
        with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
            both = handle.compress(tokens, mask)
            for row, n in enumerate(n_real):
                begin = 21 - n if on_left else 0
                alone = handle.compress(tokens[row : row + 1, begin : begin + n])
                for layer in both.kept_layers:
                    mine = both.positions(layer.index)[row]
                    own = alone.positions(layer.index)[0] + begin
                    assert np.array_equal(mine[mine >= 0].reshape(own.shape), own), (on_left, row)


def test_one_prefill_serves_policies_that_read_different_things():
    model, prompt = build("llama"), tiny_prompt()
    n = len(prompt)
    policies = [
        kvp.KVzip(n_sink=0),
        kvp.KVzip(REQUEST, n_sink=0, chunk_size=n // 2),
        kvp.KNorm(),
        kvp.KVzip(n_sink=0),
    ]
    settings = [
        (policy, kvp.Fair(strength=strength), 0.5, None)
        for policy, strength in zip(policies, (0, 0.5, 1, 1), strict=True)
    ]
    for cache, (policy, fair, ratio, _) in zip(
        compress_each(model, [prompt], [Evict(*given) for given in settings]), settings, strict=True
    ):
        with kvp.wrap(model, policy, compression_ratio=ratio, fair=fair) as handle:
            alone = handle.compress(prompt)
        for one, other in zip(cache.kept_layers, alone.kept_layers, strict=True):
            assert np.array_equal(one.kept_positions, other.kept_positions) and torch.equal(one.keys, other.keys)


def test_another_policy_that_reads_on_is_one_class(registry):
    """Two questions are asked; a token counts for what both attend to, and the model's forward runs three times."""

    @dataclass(frozen=True)
    class Asked(kvp.Policy):
        """Keep what questions attend to."""

        questions: tuple = ((5, 6), (9,))
        name = "asked"
        needs_again = needs_values = True

        def again(self, tokens):
            return [list(question) for question in self.questions]

        def score(self, inputs):
            again = inputs.again
            assert isinstance(again, Again) and again.values.shape[:3] == again.keys.shape[:3]
            grouped = again.queries.unflatten(1, (again.keys.shape[1], -1))
            mean = (grouped @ inputs.keys[:, :, None].mT).mean((2, 3))
            seen.append((again.turn, inputs.layer, inputs.values.shape[2]))
            return mean if again.before is None else mean + again.before

    seen, calls, model = [], [], build("llama")
    with model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1)):
        with kvp.wrap(model, Asked(), budget=6, fair=0.3) as handle:
            cache = handle.compress(ids(1, 20), spans=SPANS)
        assert len(calls) == 3
    assert seen[::2] == [(turn, layer, 20) for turn in (0, 1) for layer in range(3)] and seen[::2] == seen[1::2]
    assert (cache.report()["kept_share"], cache.n_seen) == (0.3, 20)
    with kvp.wrap(model, Asked(), budget=40) as handle:
        handle.compress(ids(1, 20))
    assert len(seen) == 12  # everything is kept, so nothing was asked


def test_generate_compresses_by_what_is_read_after_its_prompt():
    model, tokens = build("llama"), ids(2, 20)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with kvp.wrap(model, kvp.KVzip(REQUEST, n_sink=0), budget=6) as handle:
        plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        told = handle.report()["kept_share"]
        cache = handle.compress(tokens[:, :-1])
        ahead = handle.new_cache()
        again = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=ahead, **options)
        beams = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_beams=2, **options)
    assert told == 0.3 and torch.equal(plain, again) and beams.shape == plain.shape and cache.n_seen == 19


def test_a_second_forward_that_is_broken_off_leaves_the_model_whole():
    model, tokens = build("llama"), ids(1, 20)
    before = model(tokens).logits
    with kvp.wrap(model, kvp.KVzip(REQUEST, n_sink=0), budget=6) as handle:
        cache = handle.new_cache()
        calls = []

        def stop(*_):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        with model.model.layers[1].register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            model(tokens, **cache_argument(model, cache))
        with pytest.raises(ValueError, match="an earlier forward on this cache was broken off"):
            model(tokens, **cache_argument(model, cache))
        assert handle.compress(tokens).report()["kept_share"] == 0.3
    assert torch.equal(model(tokens).logits, before)


def test_what_cannot_be_read_after_a_prompt_is_refused_by_name():
    tokens = ids(1, 20)
    policy = kvp.KVzip(REQUEST, n_sink=0)

    def refused(error, match, model, policy=policy, **given):
        with kvp.wrap(model, policy, budget=6) as handle, pytest.raises(error, match=match):
            handle.compress(tokens) if not given else model(**given)
        assert "past_key_values" not in given

    refused(
        ValueError,
        r"^policy 'kvzip' has LlamaModel read 23 tokens after a prompt of 20; expected at most its 42 positions",
        build("llama", max_position_embeddings=42),
    )
    with kvp.wrap(build("llama", max_position_embeddings=43), policy, budget=6) as handle:
        handle.compress(tokens)
    refused(
        ValueError,
        r"^policy 'kvzip' has the model read token 128 after the prompt; expected ids in \[0, 128\)",
        build("llama"),
        kvp.KVzip((128,), n_sink=0),
    )
    model = build("llama")
    refused(
        kvp.UnsupportedModelError,
        "^policy 'kvzip' has the model read the prompt again, and LlamaModel was given embeddings, .*token ids",
        model,
        inputs_embeds=model.get_input_embeddings()(tokens),
    )
    with pytest.raises(ValueError, match=r"^policy is 'kvzip', which judges a prompt that is whole; when='decode'"):
        kvp.wrap(model, "kvzip", budget=6, when="decode")
    with pytest.raises(ValueError, match=r"^policy KVzip.* more than the 4 that it keeps unjudged"):
        kvp.wrap(model, "kvzip", budget=4).compress(tokens)
    kvp.unwrap(model)
    for family in [*not_refused("qwen3_next"), *mixed()]:
        refused(
            kvp.UnsupportedModelError,
            r"^policy 'kvzip' has the model read on after the prompt and then forget that, which layer 0 of "
            r"\w+ cannot \(\w+: its state has a fixed size\); expected another policy",
            built(family, "eager"),
        )


@pytest.mark.parametrize("family", not_refused("bert"))
def test_what_a_decoder_is_told_of_a_prompts_tokens_is_not_read_after_it(family):
    """Kinds of tokens, such as of two texts."""
    model, tokens = built(family), ids(1, 20)
    told = {"token_type_ids": torch.ones_like(tokens), "attention_mask": torch.ones_like(tokens)}
    message = r"^policy 'kvzip' has the model read on after the prompt, for which BertModel was given token_type_ids"
    with kvp.wrap(model, kvp.KVzip(REQUEST, n_sink=0), budget=6) as handle:
        for call in (model, model.generate):
            with pytest.raises(kvp.UnsupportedModelError, match=message):
                call(input_ids=tokens, **told)
        handle.compress(tokens)


def test_what_a_decoder_is_told_of_a_whole_forward_holds_of_what_it_reads_after_it():
    model, heard = build("llama"), []
    layer = model.model.layers[0].self_attn
    with (
        layer.register_forward_pre_hook(lambda _, __, given: heard.append(given.get("tone")), with_kwargs=True),
        kvp.wrap(model, kvp.KVzip(REQUEST, n_sink=0), budget=6),
    ):
        model(ids(1, 20), tone=3)
    assert heard == [3, 3]


def test_arrays_of_what_was_read_must_fit():
    keys = torch.zeros(1, 2, 10, 8)
    policy = kvp.KVzip((1,), chunk_size=6, n_sink=0)
    good = [(torch.zeros(1, 4, 7, 8), torch.zeros(1, 2, 7, 8)), (torch.zeros(1, 4, 11, 8), torch.zeros(1, 2, 11, 8))]
    assert kvp.keep(policy, keys, budget=4, again=good).counts.tolist() == [[4, 4]]
    for wrong, error, match in (
        ("ab", TypeError, r"^again is a str; expected a list of tuples \(queries, keys\), one a forward"),
        ([1, 2], TypeError, r"^again is a list; expected a list of tuples"),
        (good[:1], ValueError, r"^again has 1 tuples; expected 2 of \(queries, keys\), one a forward"),
        ([good[0], good[1][:1]], ValueError, r"^again has 2 tuples; expected 2 of \(queries, keys\)"),
        (
            [good[1], good[0]],
            ValueError,
            r"^queries of again\[0\] is a Tensor of shape \(1, 4, 11, 8\); expected a .*7, 8",
        ),
        ([good[0], (good[1][0].numpy(), good[1][1])], ValueError, r"^queries of again\[1\] is a ndarray of shape"),
        ([good[0], (good[1][0], 3)], ValueError, r"^keys of again\[1\] is a int of shape \(\); expected a Tensor"),
        ([good[0], good[1][::-1]], ValueError, r"^keys of again\[1\] is a Tensor .* expected a Tensor \(1, 2, 11, 8\)"),
        (
            [good[0], (good[1][0].half(), good[1][1])],
            TypeError,
            r"^queries of again\[1\] has dtype torch.float16; expect",
        ),
        (
            [good[0], (good[1][0], good[1][1].to("meta"))],
            TypeError,
            r"^keys of again\[1\] has device meta; expected cpu",
        ),
    ):
        with pytest.raises(error, match=match):
            kvp.keep(policy, keys, budget=4, again=wrong)


def test_settings_of_kvzip_are_checked():
    for field in ("repeat_ids", "part_ids", "answer_ids"):
        for wrong in ("Repeat.", [1.5], [-1], [True], 3):
            with pytest.raises(ValueError, match=rf"^{field} is .*; expected a list of token ids"):
                kvp.KVzip(**{field: wrong})
    for field, wrong in (("chunk_size", 0), ("n_overlap", -1), ("n_sink", 1.5)):
        with pytest.raises(ValueError, match=f"^{field} is {wrong}; expected a whole number"):
            kvp.KVzip(**{field: wrong})
    with pytest.raises(ValueError, match=r"^policy is KVzip.*, which judges part by part what the model reads after"):
        kvp.ChunkKV("kvzip")
    assert kvp.KVzip([1, np.int64(2)]) == kvp.KVzip((1, 2)) == copy.deepcopy(kvp.KVzip((1, 2)))


def test_a_request_in_words_is_a_message_of_the_users(smollm2):
    _, tokenizer = smollm2
    policy = kvp.KVzip.for_tokenizer(tokenizer, "Once more, please.", "And from", n_sink=2)
    said = [tokenizer.decode(x) for x in (policy.repeat_ids, policy.part_ids, policy.answer_ids)]
    assert said[0] == "<|im_start|>user\nOnce more, please." and said[1] == "<|im_start|>user\nAnd from"
    assert said[2] == "<|im_end|>\n<|im_start|>assistant\n" and policy.n_sink == 2
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    policy = kvp.KVzip.for_tokenizer(plain, "Once more, please.")
    assert (
        tokenizer.decode(policy.repeat_ids) == "\n\nOnce more, please." and tokenizer.decode(policy.answer_ids) == "\n"
    )
    plain.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match=r"^the chat template does not put 'Once more' after the messages before"):
        kvp.KVzip.for_tokenizer(plain, "Once more")
