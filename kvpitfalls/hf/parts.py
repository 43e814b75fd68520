"""The parts of a model that matter here: its decoder, what is around that, what it attends by, and where its weights
are."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationMixin

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_PLACE = re.compile(r"\.(\d+)\.")
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def decoder_of(model) -> torch.nn.Module:
    """The module whose forward takes ``past_key_values``: the decoder without its language-model head."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers model")
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    return (
        decoder
        if isinstance(decoder, torch.nn.Module) and decoder is not model
        else getattr(model, "base_model", model)
    )


def generators_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules whose ``generate`` runs this model's decoder: the model, or, in a wrapper such as PEFT's, the one
    inside."""
    decoder = decoder_of(model)
    for module in model.modules():
        if isinstance(module, GenerationMixin) and decoder_of(module) is decoder:
            yield module


def tells_positions(model) -> bool:
    """Whether ``generate`` gives the decoder its positions; where it does not, the decoder counts for itself, padding
    included (Whisper's)."""
    asked = [decoder_of(model), *generators_of(model)]
    return all("position_ids" in inspect.signature(module.forward).parameters for module in asked)


def takes(model, name: str) -> bool:
    """Whether a model may be called with this argument; a wrapper such as PEFT's hands on what it does not name."""
    known = inspect.signature(model.forward).parameters
    inside = [module for module in generators_of(model) if module is not model]
    hands_on = any(x.kind is x.VAR_KEYWORD for x in known.values()) and bool(inside)
    return name in known or (hands_on and all(name in inspect.signature(x.forward).parameters for x in inside))


def reads_for_itself(model) -> bool:
    """Whether more than transformers' own code stands between a call of a model and its decoder: code of another file,
    a function put before a forward, hooks. What a prompt says to the decoder then only the model's call can tell."""
    decoder = decoder_of(model)
    around = [module for module in model.modules() if module is not decoder and decoder in module.modules()]
    return any(
        not inspect.unwrap(type(module).forward).__module__.startswith("transformers.")
        or "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        for module in around
    )


def is_multimodal(model) -> bool:
    """Whether prompts are to go through the model's own ``generate``: it sees to more than its decoder does."""
    return hasattr(model, "generate") and model.config.get_text_config(decoder=True) is not model.config


def placeholders(model) -> set[int]:
    """The tokens in whose place embeddings of images, videos and sounds are put."""
    ids = (value for name, value in vars(model.config).items() if _PLACEHOLDER.fullmatch(name))
    return {value for value in ids if isinstance(value, int)} if is_multimodal(model) else set()


def n_known_of(model) -> int | None:
    """How many token ids a model's embeddings know, also those that an adapter has put a module around; None if that
    cannot be told."""
    embeddings = model.get_input_embeddings()
    parts = embeddings.modules() if isinstance(embeddings, torch.nn.Module) else ()
    return next((n for part in parts if isinstance(n := getattr(part, "num_embeddings", None), int)), None)


def outer_of(model) -> torch.nn.Module | None:
    """The module that calls a multimodal model's decoder; None for other models."""
    decoder = decoder_of(model)
    return (
        next((module for module in model.modules() if decoder in module.children()), None)
        if is_multimodal(model)
        else None
    )


def attention_calls(decoder: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """Layer index and module of everything in a decoder that calls transformers' attention interface on its cache."""
    for name, module in decoder.named_modules():
        is_cross = getattr(module, "is_cross_attention", False)
        if hasattr(module, "layer_idx") and _REGISTRY in names_in_forward(module) and not is_cross:
            index: Any = module.layer_idx
            place = _PLACE.search(name)
            if place and (index is None or index < 0):  # Zamba's are told it with each call
                index = int(place[1])
            if isinstance(index, int):
                yield index, module


def attention_modules(model) -> dict[int, torch.nn.Module]:
    """Layer index -> attention module that calls transformers' attention interface."""
    modules: dict[int, torch.nn.Module] = {}
    for index, module in attention_calls(decoder_of(model)):
        modules.setdefault(index, module)  # self-attention stands before cross-attention
    return modules


def forwards_of(module: torch.nn.Module) -> Iterator[Any]:
    """Its class's forward and, where that calls the forward of a base class, that one, too."""
    for base in type(module).__mro__:
        if base is torch.nn.Module:
            return
        if "forward" in vars(base):
            yield (function := inspect.unwrap(vars(base)["forward"]))
            if "forward" not in _names_in(function):
                return


def names_in_forward(module: torch.nn.Module) -> set[str]:
    """The global names that the code of its forward reads."""
    return {name for function in forwards_of(module) for name in _names_in(function)}


def _names_in(function) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_names


def registries_of(module: torch.nn.Module) -> Iterator[dict]:
    """The globals by which its forward finds transformers' attention functions."""
    return (function.__globals__ for function in forwards_of(module) if _REGISTRY in _names_in(function))


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module takes its input: on its first weight's device or, where accelerate keeps weights on the CPU or on
    disk (until their module is called they are on the device 'meta', without values), on the one where it is run.

    Raises
    ------
    ValueError
        If its weights have no values, or are elsewhere.
    """
    weight = next(module.parameters(), None)
    if weight is None:
        raise ValueError(
            f"{type(module).__name__} has no weights of its own, as where torch's FullyShardedDataParallel has made "
            "them one with others'; expected a model that keeps them (use_orig_params=True, fully_shard)"
        )
    if weight.device.type != "meta":
        return weight.device
    places = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    place = next((place for place in places if place is not None), None)
    if place is None:
        raise ValueError(
            "the model is on the device 'meta', without values; expected one whose weights are loaded, or offloaded "
            "by accelerate"
        )
    return torch.device(place)


def stored(module: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A module's own weight of this name; if it is offloaded, from where it waits."""
    if weight.device.type != "meta":
        return weight
    waiting = (getattr(hook, "weights_map", None) for hook in _hooks(module))
    return next((weights[name] for weights in waiting if weights is not None and name in weights), weight)


def _hooks(module: torch.nn.Module) -> list:
    """accelerate's hooks of a module; several stand in one."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
