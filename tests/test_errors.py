"""Bad input: one sentence that says what was given and what was expected, and nothing changed."""

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_tokenizers import byte_level
from tiny_models import build, chunks_of_generate, feed, ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Cache, DynamicCache, StaticCache

import kvpitfalls as kvp
from kvpitfalls.hf.forward import check_call
from kvpitfalls.hf.masks import physical_mask

REFUSED = {
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128},
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128},
}


@pytest.mark.parametrize("way", ["its block", "remove", "unwrap", "a block inside"])
def test_no_block_of_a_handle_runs_the_model_unwrapped(way):
    """Another thread's block is one inside, too: the first to end would leave the other one a plain model."""
    model = build("llama")
    handle = kvp.wrap(model, "knorm", compression_ratio=0.5)
    if way == "a block inside":
        with handle:
            with (
                pytest.raises(ValueError, match=r"the handle is entered already, .*; expected a handle of its"),
                handle,
            ):
                raise AssertionError("entered")
            assert not handle.is_removed
    elif way == "its block":
        with handle:
            assert handle.compress(ids(1)).report()["kept_share"] == 0.5
    else:
        handle.remove() if way == "remove" else kvp.unwrap(model)
    with pytest.raises(ValueError, match="the handle was removed; expected a handle of its own for each"), handle:
        raise AssertionError("entered")
    with kvp.wrap(model, "knorm", compression_ratio=0.5):
        pass


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(take):
    """What it wraps is one model, in one process; that one can be copied, and the copy is not wrapped."""
    model = build("llama")
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(TypeError, match="a handle stays with the model that it wraps and cannot be copied or"):
            take(handle)
        taken = copy.deepcopy(model)
    kvp.wrap(taken, "knorm", compression_ratio=0.5).remove()


@pytest.mark.parametrize("family", REFUSED)
def test_models_without_the_attention_interface_are_refused(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **REFUSED[family]))
    with pytest.raises(
        kvp.UnsupportedModelError, match=rf"\(model type '{family}'\) computes attention in code of its own"
    ):
        kvp.wrap(model, "knorm", compression_ratio=0.5)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_other_models_are_refused():
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    )
    with pytest.raises(kvp.UnsupportedModelError, match="is an encoder-decoder; expected a decoder-only model"):
        kvp.wrap(t5, "knorm", compression_ratio=0.5)
    with pytest.raises(
        kvp.UnsupportedModelError,
        match=r"no full-attention layer to compress; its cache layers are: DynamicSlidingWindowLayer",
    ):
        kvp.wrap(build("mistral", sliding_window=8), "knorm", compression_ratio=0.5)
    with pytest.raises(kvp.UnsupportedModelError, match=r"compiled by torch\.compile"):
        kvp.wrap(torch.compile(build("llama")), "knorm", compression_ratio=0.5)
    with pytest.raises(kvp.UnsupportedModelError, match="reorder_and_upcast_attn"):
        kvp.wrap(build("gpt2", "eager", reorder_and_upcast_attn=True), "knorm", compression_ratio=0.5)
    with pytest.raises(TypeError, match="model is a Linear; expected a transformers model"):
        kvp.wrap(torch.nn.Linear(2, 2), "knorm", compression_ratio=0.5)


def test_a_module_around_a_model_is_refused_unless_it_has_its_methods():
    """As PEFT's has; of others some calls would go through, and some fail from the inside."""

    class Around(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    class Delegates(Around):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = build("llama")
    with pytest.raises(TypeError, match=r"model is a Around without the methods .*; expected the model that is in it"):
        kvp.wrap(Around(model), "knorm", budget=3)
    with kvp.wrap(Delegates(model), "knorm", budget=3) as handle:
        assert handle.compress(torch.arange(3, 20)[None]).report()["layers"][0]["kept"] == [[3, 3]]


def test_models_whose_tokens_see_later_ones_are_refused():
    full = {"layer_types": ["full_attention"] * 3, "sliding_window": 64}
    for family, changes in (("gemma", {}), ("gemma3_text", full)):
        model = build(family, use_bidirectional_attention=True, **changes)
        if torch.equal(model(ids(1)).logits[:, :5], model(ids(1)[:, :20]).logits[:, :5]):
            continue  # this transformers knows no such option
        with pytest.raises(kvp.UnsupportedModelError, match="lets tokens attend to later ones; expected a decoder"):
            kvp.wrap(model, "knorm", compression_ratio=0.5)
    with kvp.wrap(build("gemma"), "knorm", compression_ratio=0.5) as handle:
        assert handle.compress(ids()).report()["kept_share"] == 0.5


def test_learned_prompts_are_refused():
    model = build("llama")
    model.peft_config = {
        "tuned": SimpleNamespace(is_prompt_learning=False),
        "soft": SimpleNamespace(is_prompt_learning=True),
    }
    with pytest.raises(
        kvp.UnsupportedModelError, match=r"has the adapter 'soft' of prompt or prefix learning, .* such as LoRA"
    ):
        kvp.wrap(model, "knorm", compression_ratio=0.5)
    del model.peft_config["soft"]
    kvp.wrap(model, "knorm", compression_ratio=0.5).remove()


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def unchanged(model):
    tokens = ids()
    return feed(model, tokens, [20, 1], DynamicCache(config=model.config))


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="without a GPU this torch makes no such cache",
)
def test_an_offloaded_cache_is_refused(llama):
    with kvp.wrap(llama, "knorm", compression_ratio=0.5), pytest.raises(kvp.UnsupportedModelError, match="offloaded"):
        llama(ids(), past_key_values=DynamicCache(config=llama.config, offloading=True))


@pytest.mark.parametrize("when", ["prefill", "decode", "always"])
def test_an_instruction_without_a_token_is_refused(llama, when):
    """No share of it could be told: a report divided by zero."""
    refused = pytest.raises(ValueError, match=r"span 'a' is \[5, 5\); expected at least one token")
    with kvp.wrap(llama, "knorm", compression_ratio=0.5, when=when) as handle, refused:
        handle.compress(ids(), spans={"a": (5, 5), "b": (5, 9)})


def test_caches_and_modes_are_refused(llama):
    plain = unchanged(llama)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(
            kvp.UnsupportedModelError, match=r"(past_key_values|cache) is a StaticCache; static, quantized"
        ):
            llama(ids(), past_key_values=StaticCache(config=llama.config, max_cache_len=40))
        with pytest.raises(kvp.UnsupportedModelError, match="StaticCache"):
            llama.generate(ids(), max_new_tokens=2, cache_implementation="static")
        used = DynamicCache(config=llama.config)
        used.layers[0].update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
        with pytest.raises(ValueError, match="already holds 3 tokens that were never compressed"):
            llama(ids(1), past_key_values=used)
        with pytest.raises(ValueError, match="the model is wrapped already"):
            kvp.wrap(llama, "h2o", budget=3)
        with pytest.raises(kvp.UnsupportedModelError, match="training mode"):
            llama.train()(ids())
        llama.eval()
        with pytest.raises(kvp.UnsupportedModelError, match="not a padding mask"):
            llama(ids(), attention_mask=torch.zeros(2, 1, 30, 30))
        with pytest.raises(ValueError, match="padding between real tokens; expected padding on the left or right only"):
            handle.compress(ids(), attention_mask=torch.tensor([[1] * 20 + [0] * 5 + [1] * 5, [1] * 30]))
        with pytest.raises(ValueError, match="hides every token"):
            handle.compress(ids(), attention_mask=torch.tensor([[0] * 30, [1] * 30]))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 29\); expected \(2, 30\)"):
            handle.compress(ids(), attention_mask=torch.ones(2, 29))
        for n_token in (0, 1):
            with pytest.raises(ValueError, match=rf"the prompt has {n_token} tokens?; expected at least 2"):
                handle.compress(ids(1, n_token))
        with pytest.raises(ValueError, match="a prompt has 1 token"):
            handle.compress(ids(2, 5), attention_mask=torch.tensor([[0, 0, 0, 0, 1], [1] * 5]))
        with pytest.raises(ValueError, match="the prompt has 1 token"):
            llama.generate(ids(1, 1), max_new_tokens=2)
        # transformers 4 has an error of its own for this
        with pytest.raises((ValueError, IndexError), match=r"generate was given 30 tokens, all of which|out of bounds"):
            llama.generate(ids(), past_key_values=handle.compress(ids()), max_new_tokens=2)
        with pytest.raises(
            ValueError, match="attention_mask has 5 columns; expected 35, for 30 tokens in the cache and 5 new ones"
        ):
            llama(ids(2, 5), attention_mask=torch.ones(2, 5), past_key_values=handle.compress(ids()))
        with pytest.raises(ValueError, match="no cache was compressed yet"):
            kvp.wrap(build("llama"), "knorm", budget=3).report()
        with pytest.raises(ValueError, match="prompt has shape"):
            handle.compress(torch.rand(1, 5))
    assert torch.equal(unchanged(llama), plain)


def test_attention_that_a_compressed_cache_does_not_fit_is_refused(llama):
    """Paged, indexed and flex attention, at the places where they would be met: this machine need not have them."""
    attention = llama.model.layers[0].self_attn
    with pytest.raises(
        kvp.UnsupportedModelError, match=r"LlamaAttention \(layer 0\) runs under continuous batching \(paged\|sdpa\)"
    ):
        check_call(attention, "paged|sdpa", {})
    with pytest.raises(kvp.UnsupportedModelError, match="passes 'indices' to its attention"):
        check_call(attention, "sdpa", {"indices": torch.zeros(1)})
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        slots = handle.compress(ids()).kept_layers[0].slots
    with pytest.raises(
        kvp.UnsupportedModelError,
        match=r"'flex_attention' .* not supported on a compressed cache, .*; expected .*'sdpa'",
    ):
        physical_mask(slots, None, torch.zeros(2, 4, 1, 16), "flex_attention")

    class QuantizedCache(Cache):
        def __init__(self):
            super().__init__(layers=[])

    with (
        kvp.wrap(llama, "knorm", compression_ratio=0.5),
        pytest.raises(kvp.UnsupportedModelError, match=r"(past_key_values|cache) is a QuantizedCa"),
    ):
        llama(ids(), past_key_values=QuantizedCache())


def test_protection_that_does_not_fit_leaves_the_model_usable(llama):
    message = "the budget of row 0 is 2 tokens, but 4 are protected"
    with kvp.wrap(llama, "knorm", budget=2, protect="sinks") as handle, pytest.raises(ValueError, match=message):
        handle.compress(ids())
    with kvp.wrap(llama, "knorm", budget=5, protect="sinks") as handle:
        assert handle.compress(ids(1)).positions(0)[0, 0, :4].tolist() == [0, 1, 2, 3]


def test_wrap_arguments(llama):
    for given, message in [
        ({}, "exactly one of"),
        ({"compression_ratio": 1}, "compression_ratio is 1"),
        ({"budget": 3, "when": "later"}, "when is 'later'; expected 'prefill', 'decode' or 'always'"),
        ({"budget": 3, "fair": 2}, r"strength is 2\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            kvp.wrap(llama, "knorm", **given)
    assert "forward" not in vars(llama.model)


def test_kept_layers_know_their_limits(llama):
    with kvp.wrap(build("gemma3_text"), "knorm", budget=5) as handle:
        cache = handle.compress(ids(), spans={"a": (0, 5)})
        with pytest.raises(ValueError, match="layer 0 is a DynamicSlidingWindowLayer, which is not compressed"):
            cache.positions(0)
        with pytest.raises(ValueError, match="span is 'b'; expected one of a"):
            cache.kept("b")
        with pytest.raises(ValueError, match="the cache is empty"):
            handle.new_cache().positions(1)


@pytest.mark.parametrize("scores", [None, [[0.5]], np.zeros((1, 2, 8), np.float32), torch.zeros(1, 2, 8)], ids=str)
def test_scores_of_a_users_policy_are_of_the_library_of_its_keys(registry, scores):
    class Returns(kvp.Policy):
        name = "returns"

        def score(self, inputs):
            return scores

    keys = torch.zeros(1, 2, 8, 4)
    keys = keys.numpy() if isinstance(scores, torch.Tensor) else keys
    wanted = f"policy 'returns' returned scores as a {type(scores).__name__}; expected a {type(keys).__name__}"
    with pytest.raises(ValueError, match=wanted):
        kvp.keep(Returns(), keys, budget=3)


def nowhere(scores_of):
    """A policy of somebody else's; ``scores_of``: what it makes of K-norm's scores."""

    @dataclass(frozen=True)
    class Nowhere(kvp.Policy):
        name = "nowhere"

        def score(self, inputs):
            return scores_of(inputs.score("norm") + 0)

    return Nowhere()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "way", ["keep", "chunks of another", "audit", "prefill", "decode", pytest.param("chunks", marks=chunks_of_generate)]
)
def test_scores_of_a_users_policy_that_are_no_numbers_are_refused(llama, way):
    """Of all of them NaN the first tokens would be kept without a word."""
    policy = nowhere(lambda scores: scores * float("nan"))
    with pytest.raises(ValueError, match=r"policy 'nowhere' returned NaN for (\d+) of \1 scores of layer 0, and was"):
        if way in ("keep", "chunks of another"):
            keys = np.ones((1, 2, 8, 4), np.float32)
            kvp.keep(policy if way == "keep" else kvp.ChunkKV(policy=policy), keys, budget=3)
        elif way == "audit":
            prompt = kvp.Prompt.from_text(byte_level(), "Say abc. Say it twice.", "sentences")
            kvp.audit(build("llama", vocab_size=300), prompt, policies=[policy])
        else:
            with kvp.wrap(llama, policy, budget=9, when="decode" if way == "decode" else "prefill"):
                more = {"prefill_chunk_size": 8} if way == "chunks" else {}
                llama.generate(ids(), max_new_tokens=4, do_sample=False, **more)


@pytest.mark.usefixtures("registry")
def test_what_a_users_policy_says_of_padding_and_makes_of_no_numbers_is_as_with_ours():
    """Padding is not judged; NaN of a key that is none is seen in the scores, and kept last."""
    keys = np.random.default_rng(0).standard_normal((1, 2, 8, 4), np.float32)
    keys[0, 1, 3], keys[0, 0, 2] = np.nan, np.inf
    kept = kvp.keep(nowhere(lambda scores: scores), keys, budget=7)
    assert np.array_equal(kept.positions, kvp.keep("knorm", keys, budget=7).positions)
    assert np.isnan(kept.scores).nonzero()[2].tolist() == [3] and 3 not in kept.positions[0, 1]
    padded = nowhere(lambda scores: np.where(np.arange(8) < 3, np.nan, scores))
    keys[0, 1, 3] = keys[0, 0, 2] = 0
    assert np.array_equal(
        kvp.keep(padded, keys, budget=2, valid=[(3, 8)]).positions,
        kvp.keep("knorm", keys, budget=2, valid=[(3, 8)]).positions,
    )
