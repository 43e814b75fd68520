"""One prefill for many settings: each evicts from a cache of its own."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch

from ..policies import Policy
from ..prompts.prompt import Prompt
from .again import each_once
from .cache import KeptCache
from .evict import Action, Evict
from .forward import AttentionCall
from .given_prompts import batch_of
from .layer import KeptLayer
from .model import attached
from .prefill import prefill


class Fork(Action):
    """A cache's action: evict nothing here, but let other caches evict, each in its own way, from the same prefill."""

    def __init__(self, caches: Sequence[KeptCache]) -> None:
        self.caches, self.actions = caches, [cast(Action, cache.action) for cache in caches]
        self.least_heads = max(action.least_heads for action in self.actions)
        self.reads_rotary = any(action.reads_rotary for action in self.actions)
        self.reads_output = any(action.reads_output for action in self.actions)

    def spans_of(self, n_token: int, valid: Sequence[tuple[int, int]], n_layer: int) -> list:
        """None here; tell every cache of its prompt."""
        for cache, action in zip(self.caches, self.actions, strict=True):
            cache.valid, cache.spans = valid, action.spans_of(n_token, valid, n_layer)
        return []

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Give every cache this layer and its own eviction."""
        for cache, action in zip(self.caches, self.actions, strict=True):
            twin = cache.layers[layer.index] = copy.copy(layer)
            cache.peak_bytes = max(cache.peak_bytes, cache.held_bytes)
            action.after_prefill(twin, call)

    def asks(self, valid: Sequence[tuple[int, int]]) -> list[Policy]:
        """What any of the caches has the model read, each policy once."""
        return each_once(policy for action in self.actions for policy in action.asks(valid))

    def after_turn(self, layer: KeptLayer, call: AttentionCall, policy: Policy) -> None:
        """Let every cache judge."""
        for cache, action in self._asking(call.valid):
            action.after_turn(cast(KeptLayer, cache.layers[layer.index]), call, policy)

    def after_turns(self, layer: KeptLayer, valid: Sequence[tuple[int, int]]) -> None:
        """Let every cache evict."""
        for cache, action in self._asking(valid):
            action.after_turns(cast(KeptLayer, cache.layers[layer.index]), valid)

    def _asking(self, valid: Sequence[tuple[int, int]]) -> list[tuple[KeptCache, Action]]:
        return [(cache, action) for cache, action in zip(self.caches, self.actions, strict=True) if action.asks(valid)]


@torch.no_grad()
def compress_each(model: Any, prompts: Sequence[Prompt], settings: Sequence[Evict]) -> list[KeptCache]:
    """One prefill, one cache per setting: what ``wrap(...).compress(prompts)`` gives for each, without running the
    model again.

    Parameters
    ----------
    model : transformers model
    prompts : list of Prompt
        Padded on the left.
    settings : list of Evict

    Returns
    -------
    list of KeptCache
        They can be used while the model is wrapped.
    """
    caches = []
    for setting in settings:
        batch = batch_of(model, list(prompts), None, None, setting)
        caches.append(KeptCache(model.config, setting.of_prompts(layout=batch.layout)))
    with attached(model):
        trunk = KeptCache(model.config, Fork(caches))
        prefill(model, trunk, batch.ids, batch.mask)
    for cache in caches:
        cache.origin = trunk.origin
        for i, layer in enumerate(trunk.layers):
            if isinstance(layer, KeptLayer):
                cast(KeptLayer, cache.layers[i]).take_states(layer)
            else:
                cache.layers[i] = copy.deepcopy(layer)
    return caches
