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
from .model import attach, detach
from .prefill import prefill


class Fork(Action):
    """A cache's action: evict nothing here, but let other caches evict, each in its own way, from the same prefill."""

    def __init__(self, caches: Sequence[KeptCache]) -> None:
        self.caches = caches

    @property
    def _actions(self) -> list[Action]:
        return [cache.action for cache in self.caches if cache.action is not None]

    @property
    def least_heads(self) -> int:  # type: ignore[override] # read only, as whoever asks takes it
        """The most that one of them expects."""
        return max(action.least_heads for action in self._actions)

    @property
    def reads_rotary(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether one of them does."""
        return any(action.reads_rotary for action in self._actions)

    @property
    def reads_output(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether one of them does."""
        return any(action.reads_output for action in self._actions)

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Give every cache this layer and its own eviction."""
        for cache in self.caches:
            twin = cache.layers[layer.index] = copy.copy(layer)
            cache.valid = call.valid
            action = cache.action or Action()
            cache.spans = action.spans_of(call.keys.shape[2], call.valid, call.n_layer)
            cache.note_peak()
            action.after_prefill(twin, call)

    def asks(self, valid: Sequence[tuple[int, int]]) -> list[Policy]:
        """What any of the caches has the model read, each policy once."""
        return each_once(policy for action in self._actions for policy in action.asks(valid))

    def after_turn(self, layer: KeptLayer, call: AttentionCall, policy: Policy) -> None:
        """Let every cache judge."""
        for cache, action in self._asking(call.valid):
            action.after_turn(cast(KeptLayer, cache.layers[layer.index]), call, policy)

    def after_turns(self, layer: KeptLayer, valid: Sequence[tuple[int, int]]) -> None:
        """Let every cache evict."""
        for cache, action in self._asking(valid):
            action.after_turns(cast(KeptLayer, cache.layers[layer.index]), valid)

    def _asking(self, valid: Sequence[tuple[int, int]]) -> list[tuple[KeptCache, Action]]:
        both = [(cache, cache.action) for cache in self.caches if cache.action is not None]
        return [(cache, action) for cache, action in both if action.asks(valid)]


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
    attach(model)
    try:
        trunk = KeptCache(model.config, Fork(caches))
        prefill(model, trunk, batch.ids, batch.mask)
    finally:
        detach(model)
    for cache in caches:
        cache.origin = trunk.origin
        for i, layer in enumerate(trunk.layers):
            if not isinstance(layer, KeptLayer):
                cache.layers[i] = copy.deepcopy(layer)
    return caches
