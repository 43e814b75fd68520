"""How many choices of tokens a layer has: one for each key head, or one for all, as where heads are mixed."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from .alone import COMPLAINTS, called, turned_arguments_for
from .arguments import CACHE_NAMES

_known: "weakref.WeakKeyDictionary[torch.nn.Module, int | None]" = weakref.WeakKeyDictionary()


def check_choices(decoder, layers: Mapping[torch.nn.Module, int], least: int) -> None:
    """Raise ValueError if one of these attention modules has fewer choices than a budget is to be shared over.

    A module that cannot be called alone, or does not take its cache by a known name, is judged by its first prompt
    instead.
    """
    for module, index in layers.items():
        if module not in _known:
            try:
                _known[module] = _asked(decoder, module, index)
            except COMPLAINTS:  # it was not made to be called alone; its first prompt tells
                _known[module] = None
        if (n_choice := _known[module]) is not None and n_choice < least:
            raise ValueError(
                f"one choice serves all heads of layer {index} of {type(decoder).__name__}; an allocation that "
                f"shares over heads expects at least {least}"
            )


def _asked(decoder: Any, module: Any, index: int) -> int | None:
    arguments, cache = turned_arguments_for(decoder, module, index), DynamicCache()
    watch = called(module, {**arguments, **dict.fromkeys((*CACHE_NAMES, "layer_past"), cache)})
    if index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    return watch.key.shape[1] if watch.key is layer.keys and watch.value is layer.values else 1
