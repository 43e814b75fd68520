"""Steps of ``generate`` as a CUDA graph, by themselves: a growing cache has a fixed size while they run.

The cache stays the object that it is, for whoever holds it: its layers are exchanged one after the other, and come back
with what was written when the call ends, however it does.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicSlidingWindowLayer

from .cache import KeptCache
from .fixed import FixedCache, FixedLayer, free_slots, real_slots
from .held_fixed import GrowingTwin, HeldLayer, held_layers, why_not_held
from .hold import Hold
from .layer import SPARE, KeptLayer
from .rows import holds_nothing, is_kept_alone
from .step_graph import NotCapturedError, has_own_forwards, why_not, why_not_arguments
from .window import WindowLayer, is_window

DEVICES = ("cuda",)  # where it pays: a step there is Python launching kernels
LEAST = 4  # tokens still to come for which it pays
ROOM = 512  # tokens at a time: more would be memory that a short answer never uses
_OF_STEPS = ("n_room", "n_before", "use_graph", "rooms", "graph", "is_warm", "barrier", "obstacle", "is_refused")


class SteppingLayer(FixedLayer):
    """A :class:`.FixedLayer` in the place of a growing one, ``home``, which it keeps."""

    def __init__(self, layer: KeptLayer, n_free: int, n_prompt: int) -> None:
        super().__init__(layer, n_free)
        self.home, self.home_after = layer, layer.n_after
        self.prompt_shape = layer.prompt_shape or (*layer.keys.shape[:2], n_prompt)

    def grown(self, copies: bool) -> KeptLayer:
        """The growing layer, with what came since; ``copies``: without much room behind it, which would go along
        wherever it is copied or pickled."""
        n_new = self.seen - self.seen_before
        keys, values = (x[:, :, : self.n_slot + n_new] for x in (self.keys, self.values))
        if copies and self.keys.shape[2] - keys.shape[2] > SPARE:
            keys, values = keys.clone(), values.clone()
        vars(self.home).update(keys=keys, values=values, seen=self.seen, n_after=self.home_after + n_new)
        return self.home


class SteppingHeldLayer(HeldLayer):
    """A :class:`.HeldLayer` in the place of a growing one, ``home``, which it keeps."""

    def __init__(self, layer: KeptLayer, n_slot: int) -> None:
        super().__init__(layer, n_slot)
        self.home = layer

    def grown(self, copies: bool) -> KeptLayer:
        """The growing layer, with what is held now, in memory of its own, oldest first."""
        now, before = vars(GrowingTwin(self)), self.home
        if before.held.absent is None and not bool(now["held"].absent.any()):
            now["held"] = replace(now["held"], absent=None)
        if not before.is_evicted and now["keys"].shape[2] == self.seen:  # nor is it now
            now.update(pos_before=None, live_before=None)
        vars(before).update({name: now[name] for name in vars(before).keys() & now.keys()} | {"spare": None})
        return before


class SteppingCache(FixedCache):
    """A :class:`.KeptCache` while ``generate`` runs its steps; see :class:`Steps`."""

    is_refused = False  # a step cannot be captured

    @classmethod
    def take(cls, cache: KeptCache, n_room: int, mask: torch.Tensor | None) -> None:
        """Make a growing cache one of these. ``mask``: the model's over what it has seen, (B, n_seen), or None."""
        vars(cache).update(n_room=n_room, n_before=cache.n_seen, use_graph=True, rooms=[])
        cache.__class__ = cls
        assert isinstance(cache, cls)
        held = iter(held_layers(cache, cache.kept_layers, n_room, SteppingHeldLayer) if cache.is_held else ())
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, KeptLayer) and cache.is_held:
                fixed: Any = next(held)
            elif isinstance(layer, KeptLayer):
                n_free = free_slots(layer.keys.shape[2], n_room)
                fixed = SteppingLayer(layer, n_free, cache.n_prompt)
                fixed.room = cache._room_for(fixed, real_slots(layer, mask, n_free), fixed.n_slot)
            elif isinstance(layer, DynamicSlidingWindowLayer):
                fixed = WindowLayer(layer, index, n_room)
                fixed.room = cache._room_for(fixed, fixed.real_slots(mask), fixed.n_slot)
            else:
                continue  # its states stay where they are, or it has none
            cache.layers[index] = fixed
            vars(layer).update(dict.fromkeys({"keys", "values", "spare"} & vars(layer).keys()))  # until it is back

    def give_back(self, copies: bool = True) -> None:
        """Be a growing cache again; also one that was left half taken by an interrupt. ``copies``: see
        :meth:`SteppingLayer.grown`."""
        if self.graph is not None:
            self.graph.finish()
        for layer in self.layers:
            if isinstance(layer, SteppingLayer | SteppingHeldLayer | WindowLayer):
                self.layers[layer.index] = layer.grown(copies)  # type: ignore[call-overload] # transformers' list of layers
        for name in _OF_STEPS:
            vars(self).pop(name, None)
        self.__class__ = KeptCache  # type: ignore[assignment] # what it was

    def newest_of(self, mask, n_new: int) -> torch.Tensor | None:
        """Which of the new tokens are real; there is room, and the mask is that of one ``generate``."""
        return None if mask is None else mask[:, mask.shape[1] - n_new :].bool()

    def run(self, decoder, forward: Callable, args: tuple, kwargs: dict, record):
        """As of a :class:`.FixedCache`; a step that cannot be captured is run by Python: nobody asked for more."""
        try:
            return super().run(decoder, forward, args, kwargs, record)
        except NotCapturedError as error:
            self.barrier, self.is_refused = error.what, True
            warnings.warn(f"{error.what}; Python runs each step instead", stacklevel=2)
            return forward(*args, **kwargs)


def _grown_first(name: str) -> Callable:
    def method(self, *args, **kwargs):
        self.give_back()
        return getattr(self, name)(*args, **kwargs)

    method.__doc__ = "As of the growing cache, which this one then is."
    return method


# What whoever watches an answer may do to its cache between two steps.
for _name in ("crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "save", "fixed"):
    setattr(SteppingCache, _name, _grown_first(_name))


class Foresight(StoppingCriteria):
    """Begins each step as soon as its tokens are chosen, before ``generate`` waits for them; stops nothing."""

    def __init__(self, steps: "Steps") -> None:
        self._steps, self._n_new = steps, 0

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        """Called when a token has joined each row of ``input_ids``."""
        self._n_new += 1
        is_last = _n_left(self._steps.config, self._n_new, input_ids.shape[1]) < 1
        if isinstance(cache := self._steps.cache, FixedCache) and not is_last:
            cache.begin_next(input_ids[:, -1:])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _n_left(config: GenerationConfig, n_new: int, length: int) -> int:
    """How many tokens may come after ``n_new``, with which rows are of ``length``; where that is not said, enough."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens - n_new
    return ROOM if config.max_length is None else config.max_length - length


class Steps:
    """The steps of one call of ``generate``: a context within which its cache may have a fixed size.

    Parameters
    ----------
    arguments : dict
        Of :func:`.generating.arguments_of`.
    wrap : object, or None
        Its ``uses_graph`` says whether to try; False after a step could not be captured.
    """

    def __init__(self, arguments: dict, wrap: Any) -> None:
        self._wrap, self.config = wrap, arguments["generation_config"]
        mode = self.config.get_generation_mode(arguments.get("assistant_model"))
        self._is_plain = mode in ("greedy_search", "sample") and arguments.get("custom_generate") is None
        self._may = self._is_plain and wrap is not None and wrap.uses_graph
        self.cache: KeptCache | None = None  # whose steps these are
        self._is_taken = False
        self._n_step = 0

    def watched(self, generate: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the call, with one more stopping criterion, a :class:`Foresight`."""
        signature = inspect.signature(generate)
        if not self._is_plain or "stopping_criteria" not in signature.parameters:
            return args, kwargs
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments.get("stopping_criteria") or ()
        bound.arguments["stopping_criteria"] = StoppingCriteriaList([*given, Foresight(self)])
        return bound.args, bound.kwargs

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(self.cache, SteppingCache):
            if self.cache.is_refused:
                self._wrap.uses_graph = False
            self.cache.give_back()
        elif isinstance(self.cache, FixedCache):
            self.cache.take_back()

    def before(self, decoder: torch.nn.Module, cache: KeptCache, bound: dict) -> None:
        """Called before each forward of the decoder on a cache of ours, however many tokens it brings.

        The first step is the growing cache's: what it joins tells in which type rows are kept.
        """
        self.cache = cache if self.cache is None else self.cache
        ids = bound.get("input_ids")
        if cache is not self.cache or not self._may or ids is None or ids.shape[1] > 1:
            _give_back(cache)
            return
        self._n_step += 1
        if isinstance(cache, SteppingCache) and cache.n_free:
            return
        is_lost = self._is_taken and not isinstance(cache, SteppingCache)  # whoever watches has changed it
        _give_back(cache)
        n_left, mask = _n_left(self.config, self._n_step, cache.n_seen), bound.get("attention_mask")
        if self._n_step < 2 or n_left < LEAST:
            return
        self._may = self._is_taken = not is_lost and _can_be_taken(decoder, cache, bound, mask)
        if self._may:
            self._take(cache, min(n_left, ROOM), mask)

    def _take(self, cache: KeptCache, n_room: int, mask: torch.Tensor | None) -> None:
        seen = None if mask is None or bool(mask.all()) else mask[:, : cache.n_seen].bool()
        try:
            SteppingCache.take(cache, n_room, seen)
        except torch.OutOfMemoryError as error:
            self._may = False
            if isinstance(cache, SteppingCache):
                cache.give_back(copies=False)
            warnings.warn(f"no room for steps as a CUDA graph ({error}); Python runs each step instead", stacklevel=2)


def _give_back(cache: KeptCache) -> None:
    if isinstance(cache, SteppingCache):
        cache.give_back()


def _can_be_taken(decoder, cache: KeptCache, bound: dict, mask) -> bool:
    """Whether a captured step would do what the decoder does."""
    return (
        type(cache) is KeptCache
        and (not cache.is_held or _can_be_held(decoder, cache))
        and _keep_their_places(decoder, cache)
        and bound["input_ids"].device.type in DEVICES
        and not torch.is_grad_enabled()
        and decoder.config._attn_implementation in ("sdpa", "eager")
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2))
        and why_not_arguments(bound) is None
        and why_not(decoder) is None
        and not has_own_forwards(decoder)
    )


def _can_be_held(decoder, cache: KeptCache) -> bool:
    """SDPA knows no softcap and no sinks, by which nobody judges at a fixed size."""
    is_plain = decoder.config._attn_implementation == "sdpa"
    return is_plain and why_not_held(cast(Hold, cache.action), cache.kept_layers) is None


def _keep_their_places(decoder, cache: KeptCache) -> bool:
    """Whether each layer can have a size that is fixed, or has it already."""
    types = [*(getattr(decoder.config, "layer_types", None) or ()), *[None] * len(cache.layers)]
    return cache.is_in_order and all(
        is_kept_alone(layer)
        or is_window(layer, types[index])
        or type(layer).__name__ == "LinearAttentionLayer"  # of transformers 5
        or holds_nothing(layer)
        for index, layer in enumerate(cache.layers)
    )
