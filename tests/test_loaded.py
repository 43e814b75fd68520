"""Models as they are when somebody wraps them: steered, adapted, quantized, with attention of their own, or inside
something else. Each keeps what the plain one keeps, or is refused by name."""

import re
from itertools import permutations
from types import MethodType, SimpleNamespace

import pytest
import torch
from tiny_models import build, feed, ids, tiny_prompt
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument

N_PROMPT = 20
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
POLICIES = ["knorm", "h2o", kvp.ExpectedAttention(n_sink=1), kvp.DefensiveKV(2), kvp.KVzip()]


@pytest.fixture(scope="module")
def plain():
    return build("llama")


def generate(model, tokens, **given):
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **{**GREEDY, **given})


def kept(model, policy="knorm", tokens=None):
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        cache = handle.compress(ids()[:, :N_PROMPT] if tokens is None else tokens)
    return [cache.positions(layer.index).tolist() for layer in cache.kept_layers]


# What stands around a model


class Around(torch.nn.Module):
    """Someone's module that has a model, and hands on what it does not know itself: as much as ``names``."""

    names = ("config", "get_input_embeddings", "generate")

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        return getattr(self.inner, name) if name in self.names else super().__getattr__(name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class WithDecoder(Around):
    names = (*Around.names, "get_decoder")


class Outer(PreTrainedModel):
    """As code that comes with a model does it: a transformers model that has another one generate."""

    _supports_sdpa = True
    config_class = LlamaForCausalLM.config_class

    def __init__(self, model):
        super().__init__(model.config)
        self.inner = model

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


@pytest.mark.parametrize("around", [Around, Outer])
def test_what_has_a_model_generate_past_itself_is_refused(around):
    """Its own forward is not called then, so nothing would be compressed, in silence."""
    with pytest.raises(TypeError, match=r"without the methods of a transformers model, such as .* get_decoder; expec"):
        kvp.wrap(around(build("llama")), "knorm", budget=4)


def test_what_names_its_models_decoder_is_compressed(plain):
    model, tokens = WithDecoder(build("llama")), ids()[:, :N_PROMPT]
    answers = []
    for each in (plain, model):
        with kvp.wrap(each, "knorm", budget=4) as handle:
            answers.append(generate(each, tokens))
            assert handle.report()["layers"][0]["kept"] == [[4, 4], [4, 4]]
    assert torch.equal(*answers)


def test_a_model_that_is_spread_over_devices_is_told_apart():
    with pytest.raises(TypeError, match="is a DataParallel; expected a transformers model, the one that is in it"):
        kvp.wrap(torch.nn.DataParallel(build("llama")), "knorm", budget=4)


def flattened(model):
    """As FullyShardedDataParallel leaves layers: their weights are views of one parameter of the layer."""
    for layer in model.model.layers:
        named = [(part, name, weight) for part in layer.modules() for name, weight in part._parameters.items()]
        named = [(part, name, weight) for part, name, weight in named if weight is not None]
        whole = torch.nn.Parameter(torch.cat([weight.detach().flatten() for _, _, weight in named]))
        layer.register_parameter("flat_param", whole)
        for (part, name, weight), piece in zip(named, whole.split([w.numel() for _, _, w in named]), strict=True):
            del part._parameters[name]
            setattr(part, name, piece.view_as(weight).detach())
    return model


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_layers_whose_weights_are_made_one_are_as_before_or_refused_where_one_is_asked_alone(plain, policy):
    model = flattened(build("llama"))
    try:
        assert kept(model, policy) == kept(plain, policy)
    except kvp.UnsupportedModelError as error:
        assert re.search(
            "LlamaAttention has no weights of its own, as where torch's FullyShardedDataParallel", str(error)
        )
        assert policy not in ("knorm", "h2o")


@pytest.mark.parametrize("soft, activated", [(True, None), (False, [5])])
def test_adapters_that_put_tokens_before_a_prompt_or_begin_within_it_are_refused(soft, activated):
    """Also if the model inside is what was wrapped: PEFT puts its own method before the model's while it generates."""
    model = build("llama")
    about = SimpleNamespace(is_prompt_learning=soft, alora_invocation_tokens=activated)
    adapted = WithDecoder(model)
    adapted.peft_config = {"soft": about}

    def prepare(self, *args, **kwargs):
        return type(model).prepare_inputs_for_generation(model, *args, **kwargs)

    with pytest.raises(kvp.UnsupportedModelError, match=r"has the .*'soft'"):
        kvp.wrap(adapted, "knorm", budget=4)
    tokens = ids()
    with kvp.wrap(model, "knorm", budget=4) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        model.prepare_inputs_for_generation = MethodType(prepare, adapted)
        for given in ({}, cache_argument(model, cache)):
            with pytest.raises(kvp.UnsupportedModelError, match=r"WithDecoder has the .*'soft'"):
                generate(model, tokens, **given)
        with handle.paused():
            generate(model, tokens)


class Shifted(LlamaForCausalLM):
    """Adds something to what its decoder is given."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=embeds + torch.arange(64.0) / 64, **kwargs)


class Prefixed(LlamaForCausalLM):
    """Puts something before each prompt."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=torch.cat([embeds[:, :2], embeds], 1), **kwargs)


def shifted(model):
    model.__class__ = Shifted


def hooked_around(model):
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].flip(0)}), with_kwargs=True
    )


def put_before(model):
    own = model.forward
    model.forward = lambda input_ids=None, **kwargs: own(input_ids=(input_ids + 1) % 128, **kwargs)


@pytest.mark.parametrize("sizes", [None, 7])
@pytest.mark.parametrize("n_padding", [0, 3])
@pytest.mark.parametrize("change", [shifted, hooked_around, put_before], ids=lambda change: change.__name__)
def test_a_prompt_is_read_as_the_models_own_call_reads_it(change, n_padding, sizes):
    """Also by what stands around its decoder: compress fills the cache that a forward fills, and audits see that."""
    model, tokens = build("llama"), ids()[:, :N_PROMPT]
    mask = torch.ones_like(tokens)
    mask[:, :n_padding] = 0
    change(model)
    with kvp.wrap(model, "knorm", compression_ratio=0) as handle, torch.no_grad():
        wanted, positions = handle.new_cache(), (mask.cumsum(-1) - 1).clamp(min=0)
        told = {"position_ids": positions} if change is hooked_around else {}  # as generate: who takes them by name
        model(input_ids=tokens, attention_mask=mask, **cache_argument(model, wanted), **told)
        got = handle.compress(tokens, mask, prefill_chunk_size=sizes)
        for layer, other in zip(got.kept_layers, wanted.kept_layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=1e-5)
    prompt = tiny_prompt()
    audit = kvp.audit(model, prompt, policies=["knorm"], compression_ratios=[0.5], fair=False)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(input_ids=prompt.input_ids, **cache_argument(model, cache))
        kept_mask = audit.kept_mask("knorm", 0.5)
        assert all(kept_mask[i, 0].nonzero()[0].tolist() == cache.positions(i)[0, 0].tolist() for i in range(3))


def test_a_model_that_gives_its_decoder_other_tokens_than_the_prompts_is_refused():
    model = build("llama")
    model.__class__ = Prefixed
    message = "Prefixed gave its decoder 22 tokens of a prompt of 20, so that nobody knows which is which"
    with kvp.wrap(model, "knorm", budget=4) as handle, pytest.raises(kvp.UnsupportedModelError, match=message):
        handle.compress(ids()[:, :N_PROMPT])


def test_rows_of_other_lengths_are_measured_alike_inside_a_wrapper(plain):
    """It does not name the positions that padded rows need, and hands them on."""
    settings = {"said": [" w3", " w5 w9 w4"], "max_new_tokens": 3}
    outer = WithDecoder(build("llama"))
    outer.names = (*outer.names, "generation_config")
    rows = [kvp.effects(model, tiny_prompt(), "knorm", **settings).rows for model in (plain, outer)]
    assert rows[0] == rows[1]


# Attention of one's own


def additive(module, query, key, value, attention_mask=None, scaling=None, **options):
    """Adds its mask to the logits, as eager attention does."""
    n_group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(n_group, 1) for x in (key, value))
    logits = query @ keys.mT * scaling
    logits = logits if attention_mask is None else logits + attention_mask
    return (logits.softmax(-1) @ values).transpose(1, 2), None


def causal(module, query, key, value, attention_mask=None, scaling=None, **options):
    """Takes no mask: each token sees all older slots."""
    n_new, n_slot = query.shape[2], key.shape[2]
    hidden = torch.ones(n_new, n_slot).triu(n_slot - n_new + 1) * torch.finfo(torch.float32).min
    return additive(module, query, key, value, hidden, scaling)


AttentionInterface.register("test_additive", additive)
AttentionMaskInterface.register("test_additive", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
AttentionInterface.register("test_boolean", sdpa_attention_forward)
AttentionMaskInterface.register("test_boolean", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionInterface.register("test_causal", causal)
AttentionInterface.register("test_kernel", causal)
AttentionMaskInterface.register("test_kernel", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def logits_of(attention, is_padded, is_fixed, chunks, allocation):
    """What a compressed prompt's rest says."""
    model, tokens, mask = build("llama", attention), ids(2, 26), torch.ones(2, 26, dtype=torch.long)
    mask[0, : 3 if is_padded else 0] = 0
    with kvp.wrap(model, "knorm", compression_ratio=0.5, allocation=allocation) as handle, torch.no_grad():
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT])
        cache = cache.fixed(8) if is_fixed else cache
        return feed(model, tokens, chunks, cache, mask, start=N_PROMPT)


@pytest.mark.parametrize("allocation", ["uniform", "ada"])
@pytest.mark.parametrize("chunks", [[1, 1], [3, 1]])
@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("attention", ["test_additive", "test_boolean", "test_causal", "test_kernel", "eager"])
def test_attention_functions_of_ones_own_are_given_masks_of_their_kind_or_refused(
    attention, is_padded, is_fixed, chunks, allocation
):
    """They say the same as SDPA. The model makes no masks for two of them, so they serve where none is needed."""
    where = (is_padded, is_fixed, chunks, allocation)
    wanted = logits_of("sdpa", *where)
    if attention in ("test_causal", "test_kernel"):
        needs_none = not (is_padded or is_fixed or allocation == "ada")
        if not needs_none or (attention == "test_causal" and chunks[0] > 1):
            with pytest.raises(kvp.UnsupportedModelError, match=f"'{attention}'.* not supported on a compressed cache"):
                logits_of(attention, *where)
            return
    torch.testing.assert_close(logits_of(attention, *where), wanted, rtol=0, atol=1e-4)


class Subclassed(LlamaAttention):
    """Looks at what it is given, and leaves the rest to the class that it comes from."""

    def forward(self, *args, **kwargs):
        self.seen = kwargs
        return super().forward(*args, **kwargs)


def subclassed(model):
    for layer in model.model.layers:
        layer.self_attn.__class__ = Subclassed


def replaced(model):
    """By functions that do not say what they take."""
    for layer in model.model.layers:
        layer.self_attn.forward = lambda *args, own=layer.self_attn.forward, **kwargs: own(*args, **kwargs)


def hooked(model):
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs), with_kwargs=True
    )


class Packed(torch.nn.Parameter):
    """A weight of another kind, as quantized ones are: it can be multiplied with, and not much else. One of its parts
    is no tensor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is linear:
            given, weight, *rest = args
            return linear(given, weight.as_subclass(torch.Tensor), *rest, **(kwargs or {}))
        if function is torch.Tensor.T.__get__:
            raise NotImplementedError("a packed weight has no rows")
        return super().__torch_function__(function, types, args, kwargs or {})

    def __tensor_flatten__(self):
        self.whole, self.mesh = self.as_subclass(torch.Tensor), "of devices"
        return ["whole", "mesh"], None


def packed(model):
    for layer in model.model.layers:
        for linear_layer in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            linear_layer.weight = Packed(linear_layer.weight.detach(), requires_grad=False)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("change", [subclassed, replaced, hooked, packed], ids=lambda change: change.__name__)
def test_what_stands_before_a_models_modules_changes_nothing_of_what_is_kept(plain, change, policy, tmp_path):
    model = build("llama")
    change(model)
    before = [set(vars(module)) - {"seen"} for module in model.modules()]
    assert kept(model, policy) == kept(plain, policy)
    prompt, settings = tiny_prompt(), {"policies": [policy], "compression_ratios": [0.5]}
    assert kvp.audit(model, prompt, **settings).rows == kvp.audit(plain, prompt, **settings).rows
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        cache = handle.compress(ids()[:, :N_PROMPT])
        cache.save(tmp_path / "prompt.safetensors")
        wanted, got = (
            generate(model, ids(), **cache_argument(model, x))
            for x in (cache.copy(), kvp.load_cache(tmp_path / "prompt.safetensors", model))
        )
        assert torch.equal(wanted, got)
    assert [set(vars(module)) - {"seen"} for module in model.modules()] == before


# What a checkpoint sets, and what is changed while a model is wrapped


@pytest.mark.parametrize(
    "fields",
    [
        {"return_dict_in_generate": True, "output_attentions": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"max_length": 40},
    ],
)
def test_measurements_answer_alike_whatever_a_checkpoints_generation_config_says(plain, fields):
    model = build("llama")
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    settings = {"said": " w3 w4", "max_new_tokens": 3}
    rows = [kvp.effects(each, tiny_prompt(), "knorm", **settings).rows for each in (plain, model)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", ["static", "dynamic", "hybrid"])
def test_a_cache_that_is_given_is_used_whatever_kind_a_checkpoint_sets(plain, kind):
    model, answers = build("llama"), []
    model.generation_config.cache_implementation = kind
    for each in (plain, model):
        with kvp.wrap(each, "knorm", compression_ratio=0.5) as handle:
            cache = handle.compress(ids()[:, :N_PROMPT])
            answers.append(generate(each, ids(), **cache_argument(each, cache)))
    assert torch.equal(*answers)


class Adapted(torch.nn.Module):
    """As PEFT puts a module around a model's embeddings."""

    def __init__(self, embeddings):
        super().__init__()
        self.base_layer = embeddings

    def forward(self, tokens):
        return self.base_layer(tokens)


def test_embeddings_inside_an_adapter_are_known(plain):
    model = build("llama")
    model.set_input_embeddings(Adapted(model.get_input_embeddings()))
    assert kept(model) == kept(plain)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        assert handle.verify() <= 1e-4
        with pytest.raises(ValueError, match=r"prompt holds token 128; expected ids in \[0, 128\)"):
            handle.compress(torch.tensor([[3, 4, 128]]))


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize(
    ("held", "now"),
    [(a, b) for a, b in permutations((torch.float32, torch.bfloat16, torch.float16), 2) if b != torch.float32],
    ids=str,
)
def test_a_cache_of_numbers_that_the_model_would_round_now_is_refused_and_left(held, now, n_new):
    model, tokens = build("llama").to(held), ids()
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle, torch.no_grad():
        cache = handle.compress(tokens[:, :N_PROMPT])
        before = [(layer.keys, layer.values) for layer in cache.kept_layers]
        model.to(now)
        with pytest.raises(ValueError, match=rf"gives keys of {now}, but its cache holds {held}"):
            feed(model, tokens, [n_new], cache, start=N_PROMPT)
        for layer, (keys, values) in zip(cache.kept_layers, before, strict=True):
            assert layer.keys is keys and layer.values is values
        assert handle.compress(tokens[:, :N_PROMPT]).kept_layers[0].keys.dtype == now


def test_a_model_that_is_changed_while_it_is_wrapped_keeps_what_it_would_keep_if_it_was_wrapped_then():
    changes = (
        lambda model: model.to(torch.bfloat16),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.resize_token_embeddings(140),
        lambda model: model.model.layers[0].register_forward_hook(
            lambda module, args, out: (out[0] + 0.1, *out[1:]) if isinstance(out, tuple) else out + 0.1
        ),
    )
    tokens = ids()[:, :N_PROMPT]
    for change in changes:
        found = []
        for first in (True, False):
            torch.manual_seed(0)
            model = build("llama")
            if first:
                change(model)
            with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
                if not first:
                    change(model)
                cache = handle.compress(tokens)
                found.append(([cache.positions(i).tolist() for i in range(3)], generate(model, tokens).tolist()))
        assert found[0] == found[1]
