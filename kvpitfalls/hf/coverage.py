"""Which models and caches can be compressed exactly; all others are refused by name and reason, before anything
runs."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedModelError
from .arguments import CACHE_NAMES
from .hybrid import is_full_attention
from .parts import attention_modules, decoder_of, forwards_of

RANDOM = (
    "the model is in training mode with dropout, so that its cache would be another each time; expected model.eval()"
)
# What no look at the class or its cache would tell. docs/models.md lists every type, and tests/test_models.py checks
# each.
_CODEBOOKS = "each row of its cache is that of several rows of ids, one of each codebook"
_REFUSED_TYPES = {
    "blt": "it reads bytes, and patches of them, by layers and caches of several models in it",
    "hrm_text": "it runs some of its layers several times over, each time on cache layers of their own",
    "minimax_m3_vl": "it picks blocks of cached rows by an index of its own, which would break when rows go",
    "minimax_m3_vl_text": "it picks blocks of cached rows by an index of its own, which would break when rows go",
    "musicgen_decoder": _CODEBOOKS,
    "musicgen_melody_decoder": _CODEBOOKS,
    "paligemma": "its prompts attend both ways, so that what stands before a token depends on what follows it",
    "doge": "it masks attention by values it computes from the cached rows, so every row counts for the others",
}


def check_model(model) -> None:
    """Raise unless every layer that would be compressed can be intercepted.

    Raises
    ------
    TypeError
        If ``model`` is not a transformers model.
    UnsupportedModelError
        Naming the model and the reason.
    """
    if isinstance(model, torch.nn.Module):
        check_not_compiled(model)
    config: Any = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "model_type"):
        inside = ", the one that is in it" if isinstance(getattr(model, "module", None), PreTrainedModel) else ""
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers model{inside}")
    decoder = decoder_of(model)
    if not hasattr(model, "get_input_embeddings") or _generates_inside(decoder):
        raise TypeError(
            f"model is a {type(model).__name__} without the methods of a transformers model, such as "
            "get_input_embeddings and get_decoder; expected the model that is in it, or a wrapper that has them all, "
            "as PEFT's"
        )
    name = f"{type(model).__name__} (model type {config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; expected a decoder-only model")
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has cross-attention; expected a decoder-only model")
    if (reason := _REFUSED_TYPES.get(config.model_type)) is not None:
        raise UnsupportedModelError(f"{name} cannot be compressed: {reason}")
    if getattr(config, "recurrent_kv_cache_mode", None) == "last_loop":  # Dory's
        raise UnsupportedModelError(
            f"{name} has recurrent_kv_cache_mode='last_loop', by which its earlier loops attend to what the last one "
            "left past the cache; expected 'per_loop'"
        )
    check_adapters(model)
    if own := _own_caches(decoder):
        raise UnsupportedModelError(
            f"{name} cannot be compressed: it has a cache class of its own, {own[0]}, and its layers rely on it"
        )
    _check_layers(model, name)


def check_adapters(model) -> None:
    """Raise if a model has adapters of PEFT that are more than other weights."""
    adapters: Any = getattr(model, "peft_config", None)
    for name, about in adapters.items() if isinstance(adapters, dict) else ():
        if getattr(about, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} has the adapter {name!r} of prompt or prefix learning, whose tokens would not "
                "be in the cache; expected a model without, or with an adapter of its weights such as LoRA"
            )
        if getattr(about, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"{type(model).__name__} has the activated LoRA {name!r}, which is on from a prompt's invocation "
                "tokens only, as no forward of the decoder alone can tell; expected a model without, or a plain LoRA"
            )


def _generates_inside(decoder: torch.nn.Module) -> bool:
    """Whether a model that has a ``generate`` of its own stands in what seems to be the decoder, and passes it by."""
    return any(isinstance(module, GenerationMixin) for module in decoder.modules() if module is not decoder)


def check_not_compiled(model: torch.nn.Module) -> None:
    """Raise if torch.compile was given a module of this model, or all of it."""
    if (compiled := _compiled(model)) is not None:
        raise UnsupportedModelError(
            f"the model is compiled by torch.compile ({compiled}); expected the plain one: a compressed cache changes "
            "shape"
        )


def _compiled(model: torch.nn.Module) -> str | None:
    """The module of a model that torch.compile was given, if attention is in it; other parts may be compiled."""
    for name, module in model.named_modules():
        is_compiled = (
            isinstance(module, torch._dynamo.OptimizedModule)
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        )
        if is_compiled and any(isinstance(getattr(part, "layer_idx", None), int) for part in module.modules()):
            return name or type(module).__name__
    return None


def _own_caches(decoder: torch.nn.Module) -> list[str]:
    """Names of the cache classes that the decoder's modeling file defines: hybrid models had them before transformers
    5.5."""
    namespaces = (function.__globals__ for function in forwards_of(decoder))
    return [
        name
        for namespace in namespaces
        for name, known in namespace.items()
        if isinstance(known, type)
        and known.__module__ == namespace["__name__"]
        and name.endswith("Cache")
        and hasattr(known, "get_seq_length")  # convolution states have none
        and not issubclass(known, CacheLayerMixin)
    ]


def _check_layers(model, name: str) -> None:
    attention = attention_modules(model)
    layers = DynamicCache(config=model.config).layers
    plain = [i for i, layer in enumerate(layers) if is_full_attention(layer)]
    kinds = sorted({type(layer).__name__ for layer in layers})
    if indexed := [kind for kind in kinds if "Index" in kind]:
        raise UnsupportedModelError(
            f"{name} has {', '.join(indexed)} cache layers, whose index of cached rows would break when rows go"
        )
    if layers and not plain:
        raise UnsupportedModelError(
            f"{name} has no full-attention layer to compress; its cache layers are: {', '.join(kinds)}"
        )
    if not attention:
        raise UnsupportedModelError(
            f"{name} computes attention in code of its own, not through transformers' attention interface, so its "
            "cache would stay as it is"
        )
    if not plain:
        raise UnsupportedModelError(f"{name} has no full-attention layer to compress; its cache layers are: none")
    text = model.config.get_text_config(decoder=True)
    n_own = getattr(text, "decoder_layers", len(layers))
    if n_own != len(layers):  # and caches are made for the encoder's
        raise UnsupportedModelError(
            f"{name} is the decoder of an encoder-decoder: it has {n_own} layers, but num_hidden_layers of its config "
            f"counts its encoder's, {len(layers)}; expected model.config.num_hidden_layers = {n_own}"
        )
    if missing := [i for i in plain if i not in attention]:
        raise UnsupportedModelError(
            f"{name}: layers {missing} have a full-attention cache but do not go through the attention interface"
        )
    if getattr(text, "reorder_and_upcast_attn", False) and text._attn_implementation == "eager":
        raise UnsupportedModelError(
            f"{name} has reorder_and_upcast_attn=True, which bypasses the attention interface; expected False, or sdpa"
        )
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise UnsupportedModelError(
            f"{name} lets tokens attend to later ones; expected a decoder (use_bidirectional_attention=False in its "
            "config)"
        )
    if getattr(text, "is_decoder", None) is False and getattr(attention[plain[0]], "is_causal", None) is False:
        raise UnsupportedModelError(
            f"{name} lets tokens attend to later ones; expected a decoder (is_decoder=True in its config)"
        )


def check_cache(cache, name: str | None = CACHE_NAMES[-1]) -> None:
    """Raise unless a forward's ``cache`` is an empty plain :class:`transformers.DynamicCache`, which can be turned into
    a compressed one.

    ``name`` is the argument that it was given as.
    """
    if type(cache) is not DynamicCache:
        kind = type(cache).__name__
        if not isinstance(cache, Cache):
            raise TypeError(f"{name} is a {kind}; expected a cache made by handle.compress or handle.new_cache")
        raise UnsupportedModelError(
            f"{name} is a {kind}; static, quantized and other special caches cannot be compressed. Expected a cache "
            "made by "
            "handle.compress or handle.new_cache, or none (leave out cache_implementation)"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedModelError(f"{name} is an offloaded DynamicCache; expected one that stays on its device")
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"{name} already holds {cache.get_seq_length()} tokens that were never compressed; expected an empty "
            "cache, "
            "or one made by handle.compress"
        )


def check_not_random(decoder: torch.nn.Module) -> None:
    """Raise if dropout is on, by which a cache would be another each time; :func:`.forward.check_call` sees that of
    attention."""
    if decoder.training and any(isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in decoder.modules()):
        raise UnsupportedModelError(RANDOM)
