"""What runs on a wrapped model is compressed or refused by name, and nothing else of the model changes."""

import copy
import functools
import gc
import inspect
import io
import linecache
import pathlib
import pickle
import re
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from tiny_models import build, feed, ids, tiny_prompt
from transformers import BatchEncoding, DynamicCache, GenerationConfig

import kvpitfalls as kvp
from kvpitfalls.eviction.layout import Layout
from kvpitfalls.hf import stand_ins
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.given_prompts import pad_left
from kvpitfalls.hf.masks import valid_ranges

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
N_PROMPT = 20


@pytest.fixture
def llama():
    return build("llama")


def generate(model, tokens, **given):
    return model.generate(tokens, **{"attention_mask": torch.ones_like(tokens), **GREEDY, **given})


def in_config(model):
    model.config.use_cache = False
    return model(ids())


def in_generation_config(model):
    model.generation_config.use_cache = False
    return generate(model, ids())


def with_config(model):
    return model.generate(ids(), generation_config=GenerationConfig(use_cache=False, max_new_tokens=2))


WITHOUT_CACHE = {
    "forward": lambda model: model(ids(), use_cache=False),
    "config": in_config,
    "generate": lambda model: generate(model, ids(), use_cache=False),
    "generation_config": in_generation_config,
    "given config": with_config,
}


def test_a_forward_without_ids_and_embeddings_is_refused_by_a_sentence(llama):
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(ids(1, N_PROMPT))
        with pytest.raises(ValueError, match="LlamaModel was given neither input_ids nor inputs_embeds; expected one"):
            llama.model(**cache_argument(llama, cache))


@pytest.mark.parametrize("way", WITHOUT_CACHE)
def test_a_call_without_a_cache_is_refused_unless_paused_or_nothing_is_compressed(llama, way):
    plain = WITHOUT_CACHE[way](copy.deepcopy(llama))
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(
            kvp.NotInterceptedError, match=r"^use_cache is False .* config .* nothing would be compressed; expected"
        ):
            WITHOUT_CACHE[way](llama)
        with handle.paused():
            again = WITHOUT_CACHE[way](llama)
    with kvp.wrap(llama, "knorm", compression_ratio=0):
        whole = WITHOUT_CACHE[way](llama)
    for given in (again, whole):
        assert torch.equal(getattr(given, "logits", given), getattr(plain, "logits", plain))


@pytest.mark.parametrize("ask", [generate, lambda model, tokens: model.init_continuous_batching()])
def test_a_call_asks_once_for_its_wrap_which_another_thread_may_take_away(llama, ask, monkeypatch):
    handle = kvp.wrap(llama, "knorm", compression_ratio=0.5)
    caches, looks = handle._caches, [handle._caches]
    with monkeypatch.context() as patched:
        look = property(lambda _: looks.pop() if looks else None, lambda *_: None)
        patched.setattr(type(handle._attachment), "wrap", look, raising=False)
        if ask is generate:
            ask(llama, ids(1))
            assert caches.last().report()["kept_share"] == 0.5
        else:
            with pytest.raises(kvp.UnsupportedModelError, match="continuous batching"):
                ask(llama, None)
    handle.remove()
    assert "generate" not in vars(llama)


def test_what_a_tokenizer_returns_is_a_prompt(llama):
    mask = torch.ones(2, N_PROMPT, dtype=torch.long)
    mask[0, :3] = 0
    given = BatchEncoding({"input_ids": ids(2, N_PROMPT), "attention_mask": mask})
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache, wanted = handle.compress(given), handle.compress(ids(2, N_PROMPT), attention_mask=mask)
        by_name = handle.compress(**given)
        assert (
            all((cache.positions(i) == wanted.positions(i)).all() for i in range(3))
            and cache.valid == wanted.valid == by_name.valid
        )
        assert all((by_name.positions(i) == wanted.positions(i)).all() for i in range(3))
        with pytest.raises(ValueError, match="attention_mask was given twice"):
            handle.compress(given, attention_mask=mask)
        with pytest.raises(
            ValueError,
            match="prompt is a BatchEncoding with pixel_values; expected input_ids and at most an attention_mask",
        ):
            handle.compress(BatchEncoding({**given, "pixel_values": torch.zeros(1)}))


def test_guidance_is_refused(llama):
    tokens = ids(1)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        for given in ({"guidance_scale": 1.5}, {"guidance_scale": 2, "negative_prompt_ids": ids(1, 8)}):
            for cache in (handle.new_cache(), handle.compress(tokens[:, :N_PROMPT])):
                with pytest.raises(
                    kvp.UnsupportedModelError,
                    match=r"guidance \(guidance_scale, negative_prompt_ids\), whose second prompt",
                ):
                    generate(llama, tokens, past_key_values=cache, **given)


def test_an_early_exit_is_refused_before_it_changes_the_model(llama):
    tokens = ids(1)
    before = generate(llama, tokens)
    with (
        kvp.wrap(llama, "knorm", compression_ratio=0.5),
        pytest.raises(kvp.UnsupportedModelError, match="assisted generation"),
    ):
        generate(llama, tokens, assistant_early_exit=1)
    assert llama.config.num_hidden_layers == 3 and torch.equal(generate(llama, tokens), before)


COMPILED = {
    "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "model": lambda model: model.compile(backend="eager"),
    "decoder": lambda model: model.model.compile(backend="eager"),
    "swapped": lambda model: setattr(model, "model", torch.compile(model.model, backend="eager")),
    "layer": lambda model: model.model.layers[1].compile(backend="eager"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_models_are_refused_however_they_were_compiled(llama, how):
    COMPILED[how](llama)
    with pytest.raises(kvp.UnsupportedModelError, match=r"the model is compiled by torch\.compile"):
        kvp.wrap(llama, "knorm", compression_ratio=0.5)


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_that_is_compiled_inside_a_wrap_is_compressed_or_refused(llama, how):
    """Around the decoder a compiler leaves our code to Python; in it, shapes that change would be compiled."""
    tokens = ids(1)
    torch._dynamo.reset()
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        wanted = generate(llama, tokens)
        COMPILED[how](llama)
        if how in ("decoder", "layer"):
            with pytest.raises(kvp.UnsupportedModelError, match=r"the model is compiled by torch\.compile"):
                generate(llama, tokens)
        else:
            out = generate(llama, tokens, return_dict_in_generate=True)
            assert torch.equal(out.sequences, wanted) and handle.report()["kept_share"] == 0.5


def test_a_wrapped_model_is_neither_traced_nor_exported(llama):
    with kvp.wrap(llama, "knorm", compression_ratio=0.5):
        with pytest.raises(kvp.UnsupportedModelError, match="being exported or traced"):
            torch.jit.trace(lambda tokens: llama(tokens).logits, (ids(1),), check_trace=False)
        with pytest.raises(kvp.UnsupportedModelError, match="being exported or traced"):
            torch.export.export(llama, (ids(1),), strict=False)


def test_generate_tells_that_a_forward_was_replaced_inside_the_wrap(llama):
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        llama.model.forward = types.MethodType(type(llama.model).forward, llama.model)
        with pytest.raises(kvp.NotInterceptedError, match="generate ran no forward of LlamaModel that was intercepted"):
            generate(llama, ids(1))
        with handle.paused():
            generate(llama, ids(1))


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize(
    "end", [lambda handle: handle.remove(), lambda handle: kvp.unwrap(handle.model)], ids=["remove", "unwrap"]
)
def test_generate_tells_that_the_decoder_was_replaced_inside_the_wrap(llama, is_kept, end):
    handle = kvp.wrap(llama, "knorm", compression_ratio=0.5)
    before, llama.model = llama.model, copy.deepcopy(llama.model)
    if not is_kept:
        del before
        gc.collect()
    with pytest.raises(
        kvp.NotInterceptedError, match="the LlamaModel of LlamaForCausalLM was replaced inside the wrap"
    ):
        generate(llama, ids(1))
    with pytest.raises(kvp.NotInterceptedError, match="not wrapped"):
        handle.compress(ids(1))
    with handle.paused():
        alone = generate(llama, ids(1))
    end(handle)
    assert "generate" not in vars(llama) and torch.equal(generate(llama, ids(1)), alone)
    kvp.wrap(llama, "knorm", compression_ratio=0.5).remove()


@pytest.mark.parametrize(
    ("family", "dropout"), [("llama", {"attention_dropout": 0.5}), ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0})]
)
def test_dropout_is_refused_also_without_gradients(family, dropout):
    model = build(family, **dropout).train()
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        for way in (handle.compress, lambda tokens: kvp.audit(model, tiny_prompt())):
            with pytest.raises(
                kvp.UnsupportedModelError, match=r"training mode with dropout, .*; expected model\.eval"
            ):
                way(ids(1))
    steady = build(family, attention_dropout=0, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0).train()
    with kvp.wrap(steady, "knorm", compression_ratio=0.5) as handle:
        one, two = handle.compress(ids(1)), handle.compress(ids(1))
        assert torch.equal(one.layers[1].keys, two.layers[1].keys), "training mode alone makes nothing random"


def test_a_wrap_of_ratio_0_lets_a_model_be_trained(llama):
    def gradient():
        llama.zero_grad()
        llama(ids(), labels=ids()).loss.backward()
        return llama.model.layers[1].mlp.up_proj.weight.grad.clone()

    llama.train()
    alone = gradient()
    with kvp.wrap(llama, "knorm", compression_ratio=0):
        assert torch.equal(gradient(), alone)
    llama.gradient_checkpointing_enable()
    alone = gradient()
    with kvp.wrap(llama, "knorm", compression_ratio=0):
        assert torch.equal(gradient(), alone)
    with (
        kvp.wrap(llama, "knorm", compression_ratio=0.5),
        pytest.raises(kvp.NotInterceptedError, match="use_cache is False"),
    ):
        llama(ids(), use_cache=False)


def holds_what_turns_queries(model):
    """Whether its layers have the function itself among their attributes, as from transformers 5.0 to 5.13."""
    attributes = [vars(module) | vars(module).get("_hidden_kernels", {}) for module in model.modules()]
    return any(getattr(x, "__name__", "") == "apply_rotary_pos_emb" for of_one in attributes for x in of_one.values())


def test_a_wrap_changes_neither_signature_nor_copies_of_the_model(llama):
    tokens, signature = ids(1), inspect.signature(llama.generate)
    plain = llama.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5):
        assert inspect.signature(llama.generate) == signature and llama.generate.__doc__ == type(llama).generate.__doc__
        twins = [copy.deepcopy(llama)]
        if holds_what_turns_queries(llama):  # another function stands in the place where a pickle names it
            with pytest.raises(pickle.PicklingError, match="apply_rotary_pos_emb"):
                pickle.dumps(llama)
        else:
            file = io.BytesIO()
            torch.save(llama, file)
            file.seek(0)
            twins += [pickle.loads(pickle.dumps(llama)), torch.load(file, weights_only=False)]
    for twin in (*twins, llama):
        assert torch.equal(generate(twin, tokens), plain)
        generate(twin, tokens, past_key_values=DynamicCache(config=twin.config), use_cache=False)


def test_nothing_in_hf_looks_at_frames_or_puts_hooks_on_modules():
    sources = (pathlib.Path(kvp.__file__).parent / "hf").glob("*.py")
    forbidden = re.compile(r"currentframe|_getframe|f_back|register_\w*hook")
    assert [path.name for path in sources if forbidden.search(path.read_text())] == []


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_attention_is_the_models_own_where_nothing_was_evicted_and_nothing_is_done(llama, ratio, monkeypatch):
    """A prompt's is always seen, a later step's only if a layer has lost something."""
    seen, tokens = [], ids(1, N_PROMPT)
    own = kvp.hf.forward.attention
    monkeypatch.setattr(kvp.hf.forward, "attention", lambda *args, **given: seen.append(args) or own(*args, **given))
    n_layer = llama.config.num_hidden_layers
    with kvp.wrap(llama, "knorm", compression_ratio=ratio) as handle:
        cache = handle.compress(tokens)
        assert len(seen) == n_layer
        for step in range(1, 3):
            llama(tokens[:, -1:], use_cache=True, **cache_argument(llama, cache))
            assert len(seen) == n_layer * (1 + (step if ratio else 0))


def test_what_can_be_read_once_holds_for_every_prompt_row_and_ratio(llama):
    """An iterator of what is protected, or of spans, is no other setting than its list."""
    prompt, tokens, ways = tiny_prompt(), ids(), (list, iter)
    for way in ways:
        with kvp.wrap(llama, "knorm", budget=15, protect=way(["a"])) as handle:
            assert [handle.compress(prompt).report()["spans"]["a"] for _ in range(2)] == [1.0, 1.0]
        with kvp.wrap(llama, "knorm", budget=9, protect=way([3, 4])) as handle:
            caches = [handle.compress(tokens, spans=way([(5, 20)])).copy() for _ in range(2)]
        assert all({3, 4} <= set(head) for c in caches for row in c.positions(1).tolist() for head in row)
    settings = {"policies": ["knorm"], "compression_ratios": [0.2, 0.5], "fair": [False, True]}
    first, second = (kvp.audit(llama, prompt, protect=way(["a"]), **settings).rows for way in ways)
    assert first == second


def test_prompts_hand_on_the_layout_that_a_look_at_their_batch_gives(llama, monkeypatch):
    """What they say of themselves is not looked at a second time; that it is right, this says."""
    long, short = tiny_prompt(), kvp.Prompt.from_text(tiny_prompt().tokenizer, "w3 w4 w5 w6 w7 w8", {"b": "w5 w6"})
    with kvp.wrap(llama, "knorm", budget=5, protect=["sinks", 5]) as handle:
        for prompts in ([long], [short], [long, short], [short, long, short]):
            batch = pad_left(prompts, handle.action)
            n_row, width = batch.ids.shape
            where = {
                "valid": batch.layout.valid,
                "spans": batch.layout.spans,
                "protect": batch.layout.mask.astype(bool),
            }
            assert batch.layout == Layout.of(n_row, width, **where)
            assert batch.layout.valid == valid_ranges(batch.mask, n_row, width)
            assert [set(row) for row in batch.layout.spans] == [set(prompt.spans) for prompt in prompts]
        monkeypatch.setattr(Layout, "of", None)
        assert [sum(len(row) for row in handle.compress(p).action.layout.protected) for p in (long, [short] * 2)] == [
            5,
            10,
        ]


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_wraps_that_protect_other_tokens_have_other_settings(llama, library):
    """However long the mask is; their caches are not mixed."""
    settings = []
    for position in (1500, 1501, 1500):
        mask = np.zeros(3000, bool)
        mask[position] = True
        with kvp.wrap(llama, "knorm", budget=6, protect=library(mask)) as handle:
            settings.append(handle.new_cache().origin.settings)
    assert settings[0] == settings[2] != settings[1]


class Interrupt:
    """Ctrl-C at the n-th line that the package runs, or at the next where a ``with`` is just left: a tracer can strike
    there before the lock is given back, a signal cannot."""

    def __init__(self, n):
        self.left, self.lines, self.is_over = n, {}, False

    def __call__(self, frame, event, argument):
        if "kvpitfalls" not in frame.f_code.co_filename or self.is_over:
            return None
        if event == "line":
            self.left -= 1
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            leaves = self.lines.get(id(frame), 0) > frame.f_lineno and line.lstrip().startswith("with ")
            self.lines[id(frame)] = frame.f_lineno
            if self.left < 0 and not leaves:
                self.is_over = True
                raise KeyboardInterrupt
        return self


@pytest.fixture
def without_traces():
    """What an interrupt leaves at most, a stand-in that lets all calls through, is taken out for later tests; so is who
    would take it out when the model is freed, which may be during any of them."""
    yield
    stand_ins.settle()
    for finalizer in list(weakref.finalize._registry):
        if (known := finalizer.peek()) is not None and known[1] is stand_ins.abandon:
            finalizer.detach()
    for entry in list(stand_ins._replaced.values()):
        entry[1] = 1
        stand_ins.take([entry[0]])


@pytest.mark.usefixtures("without_traces")
@pytest.mark.parametrize("start", [0, 11, 23])
def test_an_interrupt_while_a_wrap_is_put_on_leaves_a_model_that_answers_and_can_be_wrapped(llama, start):
    """At whatever line: the answers are the plain model's, and the next wrap compresses as one of a new model."""
    tokens, n, n_struck = ids(1, N_PROMPT), start, 0
    plain = llama(tokens).logits
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        kept = [layer.pos for layer in handle.compress(tokens).kept_layers]
    while True:
        sys.settrace(Interrupt(n))
        try:
            handle = kvp.wrap(llama, "knorm", compression_ratio=0.5)
        except KeyboardInterrupt:
            n_struck += 1
        else:
            break
        finally:
            sys.settrace(None)
        assert torch.equal(llama(tokens).logits, plain), n
        with kvp.wrap(llama, "knorm", compression_ratio=0.5) as again:
            held = again.compress(tokens).kept_layers
            assert all(torch.equal(layer.pos, of_layer) for layer, of_layer in zip(held, kept, strict=True)), n
        n += 37
    handle.remove()
    assert n_struck > 20


@pytest.mark.usefixtures("without_traces")
def test_an_interrupt_while_a_wrap_is_taken_off_leaves_a_model_that_answers_and_can_be_freed_of_it(llama):
    """At whatever line: it answers as a plain one, unless it is wrapped still; removing once more leaves no trace."""
    tokens, n = ids(1, N_PROMPT), 0
    answer = functools.partial(llama.generate, max_new_tokens=3, do_sample=False)
    plain, traces = answer(tokens), [set(vars(module)) for module in llama.modules()]
    while True:
        handle = kvp.wrap(llama, "knorm", budget=4)
        sys.settrace(Interrupt(n))
        try:
            handle.remove()
        except KeyboardInterrupt:
            assert torch.equal(answer(tokens), plain) or not handle.is_removed, n
        else:
            break
        finally:
            sys.settrace(None)
        handle.remove()
        assert [set(vars(module)) for module in llama.modules()] == traces, n
        assert torch.equal(answer(tokens), plain), n
        n += 1
    assert n > 15


def later_caches(llama, tokens, mask):
    """A cache of each kind over these prompts, inside its wrap: cut once or held, growing or of fixed size."""
    for policy, options in (("knorm", {}), ("streaming_llm", {"when": "always"}), ("h2o", {"when": "always"})):
        with kvp.wrap(llama, policy, budget=6, **options) as handle:
            cache = handle.compress(tokens, mask)
            yield from (cache.fixed(9), cache)


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("further", [0, 1])
def test_columns_of_a_mask_for_tokens_yet_to_come_mean_nothing(llama, n_new, further):
    """As to the model itself, whose mask may be made for a whole answer at once; the newest tokens are padded here."""
    tokens, mask = ids(2, N_PROMPT + 4), torch.ones(2, N_PROMPT + 4, dtype=torch.long)
    mask[0, :3] = mask[1, N_PROMPT] = 0
    start, end = N_PROMPT, N_PROMPT + n_new
    longer = torch.cat([mask[:, :end], torch.full((2, 5), further)], 1)
    with torch.no_grad():
        for cache in later_caches(llama, tokens[:, :N_PROMPT], mask[:, :N_PROMPT]):
            logits = []
            for each, first in ((cache.copy(), mask[:, :end]), (cache, longer)):
                call = {"position_ids": (mask.cumsum(-1) - 1)[:, start:end], "attention_mask": first}
                out = llama(tokens[:, start:end], past_key_values=each, **call).logits
                logits.append((out, feed(llama, tokens, [1], each, mask, start=end)))
            for exact, other in zip(*logits, strict=True):
                assert torch.equal(exact, other), cache


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("n_held, n_row", [(1, 4), (2, 4), (2, 1)])
def test_a_forward_of_other_rows_than_the_caches_is_refused_before_anything_is_written(llama, n_held, n_row, n_new):
    tokens, new = ids(n_held, N_PROMPT), ids(n_row, n_new, seed=5)
    message = f"a forward brings {n_row} rows, but the cache holds {n_held}; expected as many"
    with torch.no_grad():
        for cache in later_caches(llama, tokens, None):
            wanted = llama(new[:1].expand(n_held, -1), past_key_values=cache.copy()).logits
            with pytest.raises(ValueError, match=message):
                llama(new, past_key_values=cache)
            assert torch.equal(llama(new[:1].expand(n_held, -1), past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("policy, when", [("knorm", "prefill"), ("tova", "always"), ("h2o", "always")])
def test_a_cache_of_fixed_size_that_inference_mode_made_is_refused_outside_of_it(llama, policy, when):
    """Before anything is written: inside, it goes on. One that was made outside serves both."""
    tokens = ids(2, N_PROMPT + 4)
    with kvp.wrap(llama, policy, budget=6, when=when) as handle, torch.no_grad():
        growing = handle.compress(tokens[:, :N_PROMPT])
        both = growing.fixed(4)
        with torch.inference_mode():
            inside = growing.fixed(4)
        wanted = feed(llama, tokens, [1, 1, 1, 1], growing, start=N_PROMPT)
        with pytest.raises(ValueError, match=r"was made inside torch\.inference_mode and given to a forward outside"):
            feed(llama, tokens, [1], inside, start=N_PROMPT)
        with torch.inference_mode():
            logits = [feed(llama, tokens, [1, 1], each, start=N_PROMPT) for each in (inside, both)]
        later = feed(llama, tokens, [1, 1], both, start=N_PROMPT + 2)
        for each, part in zip((*logits, later), (wanted[:, :2], wanted[:, :2], wanted[:, 2:]), strict=True):
            torch.testing.assert_close(each, part, rtol=0, atol=1e-5)
