"""What a model's forward calls its cache: ``past_key_values`` up to transformers 5.23, ``cache`` from 5.24 on."""

import inspect
from typing import Any

import torch

# The newest first. A forward that has one of them by name takes its cache under that name; it may still take an older
# one, with a warning.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(module: torch.nn.Module) -> str:
    """The name under which this module's forward takes its cache; asked of its signature, since it depends on the
    release."""
    known = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])


def cache_argument(module: torch.nn.Module, cache) -> dict:
    """``cache`` as a keyword argument for this model's forward or ``generate``."""
    return {cache_name(module): cache}


def under_one_name(name: str, kwargs: dict) -> dict:
    """The same keyword arguments, with a cache that was given under another of its names under this one.

    A release that renames the argument still takes the old name, and blames whoever calls it: that would be this
    package.
    """
    others = [other for other in CACHE_NAMES if other != name and kwargs.get(other) is not None]
    if not others or kwargs.get(name) is not None:
        return kwargs
    return {**{key: value for key, value in kwargs.items() if key not in CACHE_NAMES}, name: kwargs[others[0]]}


def given_cache(arguments: dict) -> tuple[str | None, Any]:
    """The name and the cache among a forward's arguments, under whatever name it was given; (None, None) if there is
    none."""
    caches = [(name, cache) for name in CACHE_NAMES if (cache := arguments.get(name)) is not None]
    return caches[0] if caches else (None, None)


def inputs_of(bound: dict) -> torch.Tensor:
    """What a forward brings, ids (B, n) or embeddings (B, n, E); ``bound``: its arguments by name."""
    return bound["input_ids"] if bound.get("input_ids") is not None else bound["inputs_embeds"]


def uses_cache(decoder: torch.nn.Module, bound: dict) -> bool:
    """Whether a forward is to fill a cache."""
    wanted = bound.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", True) if wanted is None else wanted)
