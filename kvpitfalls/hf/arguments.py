"""What a model's forward is called with, and what it calls its cache: ``past_key_values`` up to transformers 5.23,
``cache`` from 5.24 on."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .parts import decoder_of

# The newest first. A forward that has one of them by name takes its cache under that name; it may still take an older
# one, with a warning.
CACHE_NAMES = ("cache", "past_key_values")
NO_CACHE = (
    "use_cache is False (an argument, or left in the model's config by training), so that nothing would be compressed; "
    "expected use_cache=True, or a call inside `with handle.paused()`"
)


def cache_name(module: torch.nn.Module) -> str:
    """The name under which this module's forward takes its cache; asked of its signature, since it depends on the
    release, and of its decoder's where it hands on what it does not name."""
    for each in (module, decoder_of(module)):
        known = inspect.signature(each.forward).parameters
        if (name := next((name for name in CACHE_NAMES if name in known), None)) is not None:
            return name
    return CACHE_NAMES[-1]


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


def inputs_of(bound: dict) -> torch.Tensor | None:
    """What a forward brings, ids (B, n) or embeddings (B, n, E); ``bound``: its arguments by name."""
    ids = bound.get("input_ids")
    return bound.get("inputs_embeds") if ids is None else ids


@dataclass
class Given:
    """The arguments of one forward.

    Attributes
    ----------
    args, kwargs : tuple, dict
        As it is to be called; a cache is among them under its newest name.
    bound : dict
        All of them by name.
    inputs : tensor, or None
        Of :func:`inputs_of`.
    name, cache : str and Any, or None
        Of :func:`given_cache`.
    """

    args: tuple
    kwargs: dict
    bound: dict
    inputs: Any
    name: str | None
    cache: Any


class Signature:
    """How a decoder's forward takes its arguments."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self._cache_name, self._signature = cache_name(decoder), inspect.signature(decoder.forward)
        self._rest = next((x.name for x in self._signature.parameters.values() if x.kind is x.VAR_KEYWORD), None)

    def given(self, args: tuple, kwargs: dict) -> Given:
        """What a call of the decoder was given."""
        kwargs = under_one_name(self._cache_name, kwargs)
        if not args and self._rest is not None:
            bound = dict(kwargs)
        else:
            bound = dict(self._signature.bind_partial(*args, **kwargs).arguments)
            if self._rest is not None:
                bound.update(bound.pop(self._rest, {}))
        return Given(args, kwargs, bound, inputs_of(bound), *given_cache(bound))

    def put(self, given: Given, cache: Any) -> None:
        """Let the decoder be called with this cache."""
        names = list(self._signature.parameters)
        place = names.index(self._cache_name) if self._cache_name in names else len(given.args)
        if place < len(given.args):
            given.args = (*given.args[:place], cache, *given.args[place + 1 :])
        else:  # a None may be there under an older name
            others = {name: value for name, value in given.kwargs.items() if name not in CACHE_NAMES}
            given.kwargs = {**others, self._cache_name: cache}


def uses_cache(decoder: torch.nn.Module, bound: dict) -> bool:
    """Whether a forward is to fill a cache."""
    wanted = bound.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", True) if wanted is None else wanted)
