"""What is seen to when a forward of a wrapped decoder begins: whose cache it fills or goes on with, whether it may, and
what is to be known before any layer is touched."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from ..errors import NotInterceptedError, UnsupportedModelError
from .again import plan
from .arguments import NO_CACHE, Given, Signature, uses_cache
from .cache import KeptCache
from .choices import check_choices
from .coming import Coming
from .coverage import check_cache, check_not_compiled, check_not_random
from .evict import Action
from .fixed import FixedCache
from .forward import Forward
from .masks import check_padding, columns_of, is_causal, real_newest, valid_ranges
from .projections import projections_of
from .rotations import rotaries_of
from .rows import check_end, check_newest
from .stepping import SteppingCache
from .threads import Outer, is_paused, local


def enter(
    decoder: Any, own: Mapping[torch.nn.Module, int], signature: Signature, wrap: Any, call: Any, given: Given
) -> Forward | None:
    """The forward's record, with our cache among what is ``given``; None if the forward is none of ours.

    Parameters
    ----------
    decoder : torch.nn.Module
    own : mapping
        Its attention modules and their layers.
    signature : Signature
        Of its forward.
    wrap : object, or None
        That the forward is under: makes its caches.
    call : object, or None
        The call of ``generate`` that it is part of.
    given : Given
    """
    if isinstance(given.cache, KeptCache) and given.cache.n_seen:
        return _entered(decoder, own, signature, wrap, call, given)
    newest = None if wrap is None else (wrap.newest, wrap.outline)
    is_plain = isinstance(given.cache, DynamicCache)  # as an empty one of ours is, too
    before = (type(given.cache), dict(vars(given.cache))) if is_plain else None
    try:
        return _entered(decoder, own, signature, wrap, call, given)
    except BaseException:  # what was refused is as it was, and so is the handle's newest cache
        if wrap is not None and newest is not None:
            wrap.newest, wrap.outline = newest
        if before is not None:
            given.cache.__class__ = before[0]
            vars(given.cache).clear()
            vars(given.cache).update(before[1])
        raise


def _entered(
    decoder: Any, own: Mapping[torch.nn.Module, int], signature: Signature, wrap: Any, call: Any, given: Given
) -> Forward | None:
    """As :func:`enter`; what it was given may be left half changed where it raises."""
    if (cache := _ours(decoder, wrap, call, given)) is None:
        return None
    if given.cache is None:
        signature.put(given, cache)
    if given.inputs is None:
        raise ValueError(
            f"{type(decoder).__name__} was given neither input_ids nor inputs_embeds; expected one of them"
        )
    if decoder.training and torch.is_grad_enabled():
        raise UnsupportedModelError("the model is in training mode with gradients on; expected model.eval()")
    if isinstance(cache, FixedCache) and _records_gradients(decoder, given):
        raise ValueError(
            "a fixed cache, which is written in place, was given to a forward with gradients on; expected "
            "torch.no_grad(), or the cache it "
            "was made from"
        )
    seen = {layer.seen for layer in cache.kept_layers}
    n_seen = max(seen, default=0)
    _check_origin(decoder, wrap, cache, seen)
    if call is not None:
        call.steps.before(decoder, cache, given.bound)
    elif isinstance(cache, SteppingCache):
        cache.give_back()
    if given.inputs.shape[1] > 1:  # not at each step: each takes a look at every module
        if n_seen:
            cache.check_decoder(decoder)
        check_not_compiled(decoder)
        check_not_random(decoder)
    coming = _coming_to(cache, decoder)
    if coming is None:
        record = _begin(decoder, own, cache, given, n_seen)
    else:
        record = _begin_chunk(own, cache, given, n_seen, coming)
    if record.prefill:
        n_token = given.inputs.shape[1] if coming is None else coming.n_token
        spans = [] if n_seen else record.spans_of(n_token)
        if cache.action is not None:
            _ask_layers(decoder, record, cache.action, given)
        if not n_seen:
            record.note_prompt(n_token, spans)
            cache.origin = cache.origin.filled_by(decoder, given.bound.get("token_type_ids") is not None)
        if call is not None and cache.origin.settings is not None:  # not of an audit that runs meanwhile
            call.cache = cache
    if (outer := _outer_of(decoder)) is not None:
        _note_outer(cache, record, outer, len(given.inputs))
    return record


def _outer_of(decoder) -> Outer | None:
    """The forward around this decoder's, where there is one."""
    outer = local.outer
    return outer if outer is not None and decoder in outer.module.children() else None


def _note_outer(cache: KeptCache, record: Forward, outer: Outer, n_row: int) -> None:
    """What the forward around this decoder's knows of its prompt: ids, where the decoder gets their embeddings, and
    positions."""
    cache.origin = cache.origin.with_deltas(outer.module, n_row)
    record.ids = outer.ids if record.ids is None else record.ids


def _padding_of(decoder, given: Given, n_seen: int) -> Any:
    """The padding mask of a forward, which the one around it may have made causal masks of; raises if they are others.
    Anything else that stands for a mask, as it is."""
    mask, outer = given.bound.get("attention_mask"), _outer_of(decoder)
    if not isinstance(mask, Mapping) or outer is None:
        return mask
    n_new = given.inputs.shape[1]
    if n_new > 1 and not is_causal(mask.get("full_attention"), outer.mask, n_seen, n_new):
        raise UnsupportedModelError(
            f"{type(outer.module).__name__} lets tokens attend to later ones, such as those of an image, which the "
            "policies could not follow; expected a prompt of text alone"
        )
    return outer.mask


def _ours(decoder, wrap, call: Any, given: Given) -> KeptCache | None:
    """The cache of a forward: the given one, made ours if it is not, or a new one; None if the forward is none of
    ours."""
    name, cache = given.name, given.cache
    if isinstance(cache, KeptCache):
        if cache.action is None and cache.n_seen == 0:
            if wrap is None:
                raise NotInterceptedError(
                    "the cache is empty and belongs to no wrap, so that nothing would be compressed; expected one of "
                    "handle.new_cache()"
                )
            wrap.make(cache)
        return cache
    if is_paused(decoder):
        return None
    if cache is None and call is not None and call.cache is not None:
        _check_not_dropped(decoder, call.cache, given)
    if wrap is None or (decoder.training and not wrap.action.acts):
        return None
    if cache is not None:
        check_cache(cache, name)
        cache.__class__ = KeptCache
        return wrap.make(cache)
    if uses_cache(decoder, given.bound):
        return wrap.make()
    if wrap.action.acts:
        raise NotInterceptedError(NO_CACHE)
    return None


def _check_not_dropped(decoder, cache: KeptCache, given: Given) -> None:
    """Raise if ``generate`` dropped the cache that it was given or has filled, and has the model read all again or, as
    before transformers 5.23, what came last alone."""
    acts = any(layer.is_evicted for layer in cache.kept_layers) or (cache.action is not None and cache.action.acts)
    if not acts or not cache.n_seen or given.inputs is None:
        return
    n_seen, n_new, mask, known = cache.n_seen, given.inputs.shape[1], given.bound.get("attention_mask"), cache.tokens
    n_token = mask.shape[-1] if isinstance(mask, torch.Tensor) else n_new
    if n_token <= n_seen:
        return
    is_same = known is None or given.inputs.ndim == 3 or torch.equal(given.inputs[:, :n_seen], known.to(given.inputs))
    if n_new < n_token or is_same:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} is to read {n_token} tokens without the cache of the first {n_seen}, so that "
            "all would be compressed as one prompt, or forgotten: where a text grows beyond "
            "original_max_position_embeddings some models drop their cache; expected one that ends before, or a "
            "prompt that is longer"
        )


def _ask_layers(decoder, record: Forward, action: Action, given: Given) -> None:
    """Note what a cache's action wants to know of each compressed layer; refused before any layer is touched."""
    modules = {module: i for module, i in record.own.items() if i in record.compressed}
    if action.least_heads > 1:
        check_choices(decoder, modules, action.least_heads)
    if action.reads_rotary:
        tokens, positions = given.inputs, given.bound.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        record.rotaries = rotaries_of(decoder, modules, positions)
    if action.reads_output:
        record.projections = projections_of(decoder, modules)
    if policies := action.asks(record.valid or []):
        record.afterwards = plan(decoder, record, policies, given.bound)


def _records_gradients(decoder, given: Given) -> bool:
    return torch.is_grad_enabled() and (
        given.inputs.requires_grad or any(x.requires_grad for x in decoder.parameters())
    )


def _check_origin(decoder, wrap, cache: KeptCache, seen: set[int]) -> None:
    """Raise if the cache is another model's or another wrap's, or was left half filled. ``seen``: by its layers."""
    if cache.is_half_filled or len(seen) > 1:
        raise ValueError(
            "an earlier forward on this cache was broken off, or a move of its rows, or one runs on another thread, so "
            "that its layers differ; "
            "expected a new cache, or a copy of its own (cache.copy())"
        )
    origin = cache.origin
    if wrap is not None and cache.action is None and wrap.action.holds:
        raise ValueError(
            f"the cache comes from a file, but the wrap holds a budget while generating ({wrap.settings}); expected "
            "when='prefill'"
        )
    if wrap is not None and origin.settings not in (None, wrap.settings):
        raise ValueError(
            f"the cache was made by a wrap with other settings ({origin.settings}); expected one of this wrap "
            f"({wrap.settings})"
        )
    if n_seen := max(seen, default=0):
        origin.check_length(n_seen)
        cache.origin = origin.met(decoder)


def _begin(decoder, own: Mapping, cache: KeptCache, given: Given, n_seen: int) -> Forward:
    """The forward's record; on a prefill, what is padding."""
    n_row, n_new = given.inputs.shape[:2]
    ids, mask = given.bound.get("input_ids"), _padding_of(decoder, given, n_seen)
    if n_seen:
        cache.check_rows(n_row)
        check_end(decoder, cache)
        mask = columns_of(mask, n_seen, n_new)
        if n_new > 1:  # not at each step: it waits for the mask
            check_padding(mask, cache.valid, cache.n_prompt)
            check_newest(decoder, cache.layers, mask, n_new)
        if isinstance(cache, FixedCache):
            return Forward(cache, own, False, n_seen, ids, None, cache.newest_of(mask, n_new), given.bound)
        newest = real_newest(mask, n_new) if cache.is_held else None
        return Forward(cache, own, False, n_seen, ids, None, newest)
    if n_new < 2 and cache.action is not None and cache.action.evicts:
        raise ValueError(f"the prompt has {n_new} token; expected at least 2, since there is nothing to evict from")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise UnsupportedModelError(
            "attention_mask is not a padding mask (B, T); expected one, since policies recompute plain causal attention"
        )
    return Forward(cache, own, True, 0, ids, valid_ranges(mask, n_row, n_new))


def _begin_chunk(own: Mapping, cache: KeptCache, given: Given, n_seen: int, coming: Coming) -> Forward:
    """The record of a forward over a chunk of a prompt; with the first chunk the cache learns what is coming."""
    n_row, n_new = given.inputs.shape[:2]
    coming.check_chunk(n_row, n_seen, n_new, given.bound.get("position_ids"))
    valid = cache.valid if n_seen else coming.valid
    return Forward(cache, own, True, n_seen, given.bound.get("input_ids"), valid, coming=coming)


def _coming_to(cache: KeptCache, decoder: torch.nn.Module) -> Coming | None:
    """The prompt that this thread brings to a cache in chunks; raises if a prompt came to it in part and was broken
    off."""
    here = local.coming
    is_free = here is not None and not here.is_taken and here.decoder() is decoder
    if here is not None and is_free and cache.coming is None and not cache.n_seen:
        here.is_taken, cache.coming = True, here
    if cache.coming is not None and cache.coming is not here:
        raise ValueError(
            f"the cache holds {cache.n_seen} of the {cache.coming.n_token} tokens of a prompt whose prefill in chunks "
            "was broken off; expected a new cache"
        )
    return cache.coming
