"""Every way of generating inside a wrap: what comes out is what one prompt at a time, by hand, gives; or it is refused
by name."""

import copy
import ctypes
import functools
import gc
import io
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from model_sweep import build as build_any
from model_sweep import not_refused, release
from tiny_models import build, feed, ids, tiny_prompt
from tiny_policies import EQUAL as POLICIES
from tiny_policies import EVERY, HELD
from tqdm.auto import tqdm
from transformers import TextStreamer, pipeline

import kvpitfalls as kvp
from kvpitfalls.hf import layer as kept_layer
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.threads import local

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def pad_rows(rows, side):
    """Prompts in one batch: its tokens, its mask, and where each begins."""
    width = max(row.shape[1] for row in rows)
    tokens, begins = torch.zeros(len(rows), width, dtype=torch.long), []
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        begins.append(width - row.shape[1] if side == "left" else 0)
        tokens[i, begins[i] : begins[i] + row.shape[1]], mask[i, begins[i] : begins[i] + row.shape[1]] = row[0], 1
    return tokens, mask, begins


@pytest.mark.parametrize("fair", [False, True])
def test_32_prompts_in_one_padded_batch_equal_32_runs(llama, fair):
    """On whichever side the padding is."""
    rows = [ids(1, int(n), seed=i) for i, n in enumerate(np.random.default_rng(0).integers(9, 30, 32))]
    spans = [{"a": (1, 2 + i % 5), "b": (2 + i % 5, row.shape[1] - 1)} for i, row in enumerate(rows)]
    question = ids(1, 3, seed=99)
    for policy in POLICIES:
        with kvp.wrap(
            llama, policy, compression_ratio=0.5, fair=fair, protect="sinks" if fair is False else None
        ) as handle:
            kept, answers = [], []
            for row, of_row in zip(rows, spans, strict=True):
                cache, one = handle.compress(row, spans=of_row), torch.cat([row, question], 1)
                kept.append({layer.index: cache.positions(layer.index)[0] for layer in cache.kept_layers})
                answers.append(
                    llama.generate(one, attention_mask=torch.ones_like(one), past_key_values=cache, **GREEDY)[0, -6:]
                )
            for side in ("left", "right"):
                tokens, mask, begins = pad_rows(rows, side)
                shifted = [{k: (x + n, y + n) for k, (x, y) in s.items()} for s, n in zip(spans, begins, strict=True)]
                cache = handle.compress(tokens, mask, shifted)
                asked = torch.cat([tokens, question.expand(32, -1)], 1)
                longer = torch.nn.functional.pad(mask, (0, 3), value=1)
                together = llama.generate(asked, attention_mask=longer, past_key_values=cache, **GREEDY)
                for i, begin in enumerate(begins):
                    for layer in cache.kept_layers:
                        of_row = cache.positions(layer.index)[i]
                        moved = of_row[of_row >= 0].reshape(of_row.shape[0], -1) - begin
                        assert np.array_equal(moved, kept[i][layer.index]), (side, i)
                    assert torch.equal(together[i, -6:], answers[i]), (side, i)


def answered(model, tokens, **given):
    """New tokens by ``generate``, from ids or from their embeddings."""
    ours = given.pop("embeddings", None)
    first = {"input_ids": tokens} if ours is None else {"inputs_embeds": ours(tokens)}
    out = model.generate(**first, attention_mask=torch.ones_like(tokens), **{**GREEDY, **given})
    return out[:, -GREEDY["max_new_tokens"] :]


@pytest.mark.parametrize("when", ["prefill", "always"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "knorm"])
def test_embeddings_are_answered_as_their_ids(llama, policy, when):
    tokens, embed = ids(1), llama.get_input_embeddings()
    with kvp.wrap(llama, policy, compression_ratio=0.5, when=when) as handle:
        cache = handle.compress(tokens[:, :20])
        for given in ({}, {"past_key_values": cache}):
            copies = [{name: x.copy() for name, x in given.items()} for _ in range(2)]
            assert torch.equal(
                answered(llama, tokens, embeddings=embed, **copies[0]), answered(llama, tokens, **copies[1])
            )


@pytest.mark.parametrize(
    ("policy", "when"), [(p, w) for p in EVERY for w in ("prefill", "always", "decode") if p.holds or w == "prefill"]
)
def test_dtypes_around_a_model_change_nothing(llama, policy, when):
    """Torch's default dtype leaks into no cache; under autocast keys and values are compressed, of whatever types."""
    tokens = ids(1)
    with kvp.wrap(llama, policy, compression_ratio=0.5, when=when) as handle:
        wanted = answered(llama, tokens)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                assert torch.equal(answered(llama, tokens), wanted)
            finally:
                torch.set_default_dtype(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert answered(llama, tokens).shape == wanted.shape and handle.report()["kept_share"] <= 0.5


@pytest.mark.parametrize("policy", EVERY)
def test_a_float64_model_is_refused_by_its_dtype(policy):
    """Also where a policy asks first how its layers turn their queries, which is told to float32."""
    with (
        kvp.wrap(build("llama").double(), policy, compression_ratio=0.5) as handle,
        pytest.raises(TypeError, match="has dtype float64"),
    ):
        handle.compress(ids(1))


def test_eager_attention_tells_the_weights_of_what_is_kept():
    model, tokens = build("llama", attention="eager"), ids(1)
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        given = {
            "past_key_values": handle.compress(tokens[:, :20]),
            "output_attentions": True,
            "return_dict_in_generate": True,
        }
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY, **given)
    assert [step[0].shape for step in out.attentions] == [(1, 4, 10, 20), *((1, 4, 1, 20 + i) for i in range(1, 6))]
    for layer in (layer for step in out.attentions for layer in step):
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))


def test_a_cache_is_the_same_however_it_was_made_and_carried(llama):
    tokens, file = ids(1), io.BytesIO()
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :20])
        wanted = answered(llama, tokens, past_key_values=cache.copy())
        torch.save(cache, file)
        file.seek(0)
        with torch.inference_mode():
            inferred = handle.compress(tokens[:, :20])
        recorded = handle.new_cache()
        llama(tokens[:, :20], **cache_argument(llama, recorded))  # with gradients on
        for same in (torch.load(file, weights_only=False), inferred, inferred.copy(), recorded.copy()):
            assert torch.equal(answered(llama, tokens, past_key_values=same), wanted)


def test_sampling_and_num_return_sequences(llama):
    tokens = ids(1, 20).expand(3, -1)
    sample = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": True,
        "num_return_sequences": 3,
        "temperature": 0.7,
        "top_k": 0,
    }
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        torch.manual_seed(0)
        answers = llama.generate(tokens[:1], attention_mask=torch.ones(1, 20, dtype=torch.long), **sample)
        torch.manual_seed(0)
        cache, by_hand = handle.new_cache(), tokens
        logits = feed(llama, by_hand, [20], cache)[:, -1]
        for _ in range(6):
            by_hand = torch.cat([by_hand, torch.multinomial(torch.softmax(logits / 0.7, -1), 1)], 1)
            logits = feed(llama, by_hand, [1], cache, start=by_hand.shape[1] - 1)[:, -1]
    assert torch.equal(answers, by_hand) and len({tuple(row) for row in answers.tolist()}) == 3


def test_a_pipeline_and_a_streamer(smollm2, capsys):
    model, tokenizer = smollm2
    text = "The capital of France is Paris. The capital of Italy is"
    greedy = {"max_new_tokens": 8, "do_sample": False}
    ids = tokenizer(text, return_tensors="pt")
    with kvp.wrap(model, "snapkv", compression_ratio=0.3) as handle:
        cache = handle.new_cache()
        answer = model.generate(
            **ids, past_key_values=cache, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **greedy
        )
        printed = capsys.readouterr().out
        piped = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **greedy)[0]["generated_text"]
    assert cache.report()["kept_share"] < 0.75
    wanted = tokenizer.decode(answer[0], skip_special_tokens=True)
    assert piped == wanted and printed.strip() == wanted.strip()


def gives_whole_masks():
    """Whether this transformers, prefilling in chunks, masks what a filled cache holds: 5.17 does not, 5.23 does."""
    return release(transformers.__version__) > release("5.17")


def test_modes_that_hide_where_the_prompt_ends_are_refused(llama):
    tokens, mask = ids(1, 20), torch.ones(1, 20, dtype=torch.long)
    ends = {"eos_token_id": 2, **GREEDY}  # transformers 4 looks up prompts only where there is an end token
    plain = llama.generate(tokens, attention_mask=mask, **ends)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        for given in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": build("llama")}):
            with pytest.raises(
                kvp.UnsupportedModelError, match=r"assisted generation .* puts drafts behind the prompt"
            ):
                llama.generate(tokens, attention_mask=mask, **given, **GREEDY)
        cache = handle.compress(tokens[:, :13])
        wanted = llama.generate(tokens, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
        chunks = {"attention_mask": mask, "past_key_values": copy.deepcopy(cache), "prefill_chunk_size": 2, **GREEDY}
        if gives_whole_masks():
            assert torch.equal(llama.generate(tokens, **chunks), wanted)
        else:
            with pytest.raises(
                ValueError, match=r"attention_mask has 2 columns; expected 15, .*prefill_chunk_size of transformers 4"
            ):
                llama.generate(tokens, **chunks)
        with pytest.raises(
            kvp.UnsupportedModelError, match="assisted generation"
        ):  # transformers 5.23 feeds the cached tokens again
            llama.generate(
                tokens, attention_mask=mask, past_key_values=copy.deepcopy(cache), prompt_lookup_num_tokens=3, **GREEDY
            )
    with kvp.wrap(llama, "knorm", compression_ratio=0):
        assert torch.equal(llama.generate(tokens, attention_mask=mask, prompt_lookup_num_tokens=3, **ends), plain)


@pytest.mark.parametrize("when", ["prefill", "always"])
def test_a_wrapped_model_drafts_for_no_other_one(llama, when):
    """It was met by a crop, in the middle of the other one's answer; a wrap that evicts nothing may draft."""
    draft, tokens = build("llama"), ids(1, 20)
    given = {"attention_mask": torch.ones(1, 20, dtype=torch.long), "assistant_model": draft, **GREEDY}
    plain = llama.generate(tokens, **given)
    with (
        kvp.wrap(draft, "knorm", compression_ratio=0.5, when=when),
        pytest.raises(kvp.UnsupportedModelError, match="the wrapped model is the assistant_model of another one's"),
    ):
        llama.generate(tokens, **given)
    with kvp.wrap(draft, "knorm", compression_ratio=0):
        assert torch.equal(llama.generate(tokens, **given), plain)
    assert torch.equal(llama.generate(tokens, **given), plain)


@pytest.mark.parametrize("family", not_refused("llama", "gpt2", "opt", "bart", "roberta", "whisper"))
def test_a_padded_prompt_stands_where_generate_puts_it(family):
    """Also where ``generate`` tells a decoder no positions that it would take: Whisper's counts padding then."""
    model, tokens = build_any(family), ids(2, 19)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    given = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    given |= {"attention_mask": mask, "eos_token_id": None}
    plain = torch.stack(model.generate(tokens, **given).logits)
    with kvp.wrap(model, "knorm", compression_ratio=0) as handle:
        cache = handle.compress(tokens[:, :16], mask[:, :16])
        after = torch.stack(model.generate(tokens, **given, **cache_argument(model, cache)).logits)
    assert (after - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_right_padding_is_refused_where_a_budget_is_held(llama):
    mask = torch.tensor([[1] * 20 + [0] * 10])
    for when in ("decode", "always"):
        with (
            kvp.wrap(llama, "knorm", budget=5, when=when) as handle,
            pytest.raises(ValueError, match="padded on the right; when="),
        ):
            handle.compress(ids(1), attention_mask=mask)


def test_what_follows_right_padding_is_as_if_there_was_none(llama):
    tokens, n_pad = ids(1, 24), 6
    padded = torch.cat([tokens[:, :14], torch.zeros(1, n_pad, dtype=torch.long), tokens[:, 14:]], 1)
    mask = torch.ones_like(padded)
    mask[:, 14 : 14 + n_pad] = 0
    for policy in POLICIES:
        with kvp.wrap(llama, policy, compression_ratio=0.5) as handle:
            cache = handle.compress(padded[:, : 14 + n_pad], attention_mask=mask[:, : 14 + n_pad])
            after = feed(llama, padded, [1, 5, 4], cache, mask, start=14 + n_pad)
            wanted = feed(llama, tokens, [1, 5, 4], handle.compress(tokens[:, :14]), start=14)
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("when", ["prefill", "always"])
def test_8_threads_give_what_one_gives(llama, when):
    batches = [ids(seed=seed) for seed in range(16)]
    with kvp.wrap(llama, "h2o", compression_ratio=0.5, when=when) as handle:

        def run(tokens):
            cache = handle.compress(tokens[:, :20])
            return llama.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **GREEDY)

        alone = [run(tokens) for tokens in batches]
        with ThreadPoolExecutor(8) as pool:
            assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(run, batches), strict=True))


def test_a_wrap_that_is_removed_under_a_running_forward_lasts_until_it_has_ended(llama):
    tokens, removed_under_it = ids(1, 20), []
    plain = llama(tokens).logits
    handle = kvp.wrap(llama, "knorm", compression_ratio=0.5)

    def remove(*_):
        handle.remove()
        removed_under_it.append("forward" in vars(llama.model))

    hook = llama.model.layers[1].register_forward_hook(remove)
    try:
        assert handle.compress(tokens).report()["kept_share"] == 0.5
    finally:
        hook.remove()
    assert removed_under_it == [True] and "forward" not in vars(llama.model)
    assert torch.equal(llama(tokens).logits, plain)


def test_a_wrap_that_is_removed_while_a_thread_generates_lasts_until_it_has_ended(llama):
    tokens, removed, handle = ids(1, 20), [], kvp.wrap(llama, "knorm", compression_ratio=0.5)
    wanted = llama.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)

    class Leaves(TextStreamer):
        """Between two forwards."""

        def __init__(self):
            pass

        def put(self, value):
            handle.remove()
            removed.append("forward" in vars(llama.model))

        def end(self):
            pass

    answer = llama.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=Leaves(), **GREEDY)
    assert torch.equal(answer, wanted) and removed[-1] and handle.is_removed
    assert "forward" not in vars(llama.model) and "generate" not in vars(llama)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_forward_that_is_broken_off_leaves_nothing_behind_on_its_thread(llama, error):
    """Neither a model of the same family that was never wrapped nor this one, once it is unwrapped, may see the broken
    forward."""
    other = build("llama", num_hidden_layers=2)
    tokens = ids(1, 24)
    lengths = range(8, 21)
    wanted = [other(tokens[:, :n]).logits for n in lengths]

    def break_off(*_):
        raise error("broken off")

    with kvp.wrap(llama, "h2o", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :20])
        for module in (llama.model.layers[1].mlp, llama.model.layers[0].self_attn.o_proj):
            hook = module.register_forward_pre_hook(break_off)
            with pytest.raises(error, match="broken off"):
                llama(tokens[:, 20:21], past_key_values=copy.deepcopy(cache))
            hook.remove()
            assert local.forward is None
            assert all(
                torch.equal(other(tokens[:, :n]).logits, before) for n, before in zip(lengths, wanted, strict=True)
            )
    assert "forward" not in vars(llama.model)
    for n_new in (1, 2):
        with pytest.raises(kvp.NotInterceptedError, match="not wrapped"):
            llama(tokens[:, 20 : 20 + n_new], past_key_values=copy.deepcopy(cache))


def test_another_model_inside_a_wrapped_forward_is_not_compressed(llama):
    """It runs on the same thread, has as many layers and sees as many keys; only whose attention it is tells them
    apart."""
    other, tokens, seen = build("llama"), ids(1, 20), []
    with torch.no_grad():
        plain = other(tokens).logits
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        wanted = handle.compress(tokens)
        hook = llama.model.layers[1].self_attn.q_proj.register_forward_hook(
            lambda *_: seen.append(other(tokens).logits)
        )
        try:
            cache = handle.compress(tokens)
        finally:
            hook.remove()
    assert len(seen) == 1 and torch.equal(seen[0], plain)
    assert all((cache.positions(i) == wanted.positions(i)).all() for i in range(3))


# Python swallows an interrupt that strikes where it closes a generator, with a word on stderr.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_random_moments_change_no_other_threads_answer():
    """Two models of one family, one wrapped: in one thread a KeyboardInterrupt strikes anywhere, also inside this
    package's own code."""
    wrapped, plain, tokens = build("llama"), build("llama", num_hidden_layers=2), ids(1, 20)
    draw = random.Random(0)
    handle = kvp.wrap(wrapped, "snapkv", compression_ratio=0.5)

    def of_wrapped():
        return feed(wrapped, ids(1, 24), [1, 3], handle.compress(tokens), start=20)

    def of_plain():
        with torch.no_grad():
            return plain(tokens).logits

    expected = [of_wrapped(), of_plain()]
    starts = [time.perf_counter() for _ in range(5) if of_wrapped() is not None]
    span = min(after - before for before, after in pairwise(starts))  # of one alone; here seven share the processor

    def strike():
        """Run with an interrupt at a random moment, raised by the interpreter where it raises those of Ctrl-C."""
        thread = ctypes.c_ulong(threading.get_ident())
        interrupt = functools.partial(
            ctypes.pythonapi.PyThreadState_SetAsyncExc, thread, ctypes.py_object(KeyboardInterrupt)
        )
        timer = threading.Timer(draw.uniform(0, 4 * span), interrupt)
        try:
            timer.start()
            of_wrapped()
            timer.cancel()
            timer.join()
            for _ in range(1000):
                pass  # one that is on its way strikes here
        except KeyboardInterrupt:
            return True
        return False

    with ThreadPoolExecutor(7) as pool:
        n_struck, tries = 0, iter(range(2000))
        while n_struck < 40:  # of how many depends on what else the machine does
            assert next(tries, None) is not None, f"{n_struck} interrupts of 2000 struck"
            others = [pool.submit(work) for work in (of_wrapped, of_plain) * 3]
            struck = pool.submit(strike)
            assert all(torch.equal(job.result(), expected[i % 2]) for i, job in enumerate(others))
            n_struck += struck.result()
        assert torch.equal(pool.submit(of_plain).result(), expected[1])
    handle.remove()
    gc.collect()
    with torch.no_grad():
        assert torch.equal(of_plain(), expected[1]) and "forward" not in vars(wrapped.model)


def test_a_prefill_that_nobody_watches_waits_for_no_bar(llama):
    """Bars share a lock, which an interrupt that strikes inside tqdm leaves locked for all other threads."""
    done = []
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle, tqdm.get_lock():
        thread = threading.Thread(target=lambda: done.append(handle.compress(ids(1, 20))), daemon=True)
        thread.start()
        thread.join(60)
        assert len(done) == 1


def test_an_audit_ends_while_another_thread_runs_the_wrapped_model(llama):
    """It takes nothing away that the wrap still needs, so it need not wait."""
    prompt, tokens, found = tiny_prompt(), ids(1, 20), []

    def audit_meanwhile(*_):
        if not found:
            found.append(None)
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(kvp.audit, llama, prompt, compression_ratios=[0.5]).result().rows)

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        hook = llama.model.layers[1].register_forward_hook(audit_meanwhile)
        try:
            assert handle.compress(tokens).report()["kept_share"] == 0.5
        finally:
            hook.remove()
    assert found[1] == kvp.audit(llama, prompt, compression_ratios=[0.5]).rows
    assert "forward" not in vars(llama.model)


def test_a_prefill_holds_one_full_layer_at_a_time(monkeypatch):
    """Unless the policy has the model read on after a prompt that is whole; what that takes is in test_again.py."""
    at_once = [policy for policy in POLICIES if not policy.needs_again]
    model, full, alive = build("llama", num_hidden_layers=6), [], []
    update = kept_layer.KeptLayer.update

    def watched(layer, *args, **kwargs):
        out = update(layer, *args, **kwargs)
        full.extend(map(weakref.ref, out))
        alive.append(sum(ref() is not None for ref in full))
        return out

    monkeypatch.setattr(kept_layer.KeptLayer, "update", watched)
    for policy, when in [*((policy, "prefill") for policy in at_once), *((policy, "always") for policy in HELD)]:
        full.clear()
        with kvp.wrap(model, policy, compression_ratio=0.5, when=when) as handle:
            cache = handle.compress(ids(1, 20))
        gc.collect()
        assert not any(ref() is not None for ref in full) and len(full) == 12 and cache.get_seq_length() == 20
    assert set(alive) == {2}, "keys and values of one layer"
