"""Standing between a model and its attention functions.

Every attention class looks its function up under one of two module-level names, so those are replaced by stand-ins in
the modeling file's globals for as long as a model is wrapped. Config, weights and registries stay untouched; calls of
models that are not wrapped, or that carry no cache of ours, go straight through.

One forward of a wrapped decoder goes through :func:`_armed`, which sees to the cache and arms this thread;
``forward.py`` has what follows.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..errors import NotInterceptedError, UnsupportedModelError
from . import stand_ins
from .again import plan
from .arguments import CACHE_NAMES, cache_name, given_cache, inputs_of, under_one_name, uses_cache
from .around import Around, take_away_all
from .cache import KeptCache
from .choices import check_choices
from .coming import Coming, coming_to
from .coverage import check_cache, check_model, check_not_compiled, check_not_random
from .fixed import FixedCache
from .forward import Forward, attention_around
from .generating import arguments_of, check_generate, chunks_of
from .masks import check_padding, columns_of, real_newest, valid_ranges
from .outer import give_deltas, taken_deltas
from .parts import attention_calls, decoder_of, generators_of, outer_of
from .projections import projections_of
from .rotations import rotaries_of
from .rows import check_newest
from .stepping import Steps, settle
from .threads import local

_attached: "weakref.WeakKeyDictionary[torch.nn.Module, _Attachment]" = weakref.WeakKeyDictionary()


class _Attachment:
    """What a decoder is wrapped with, shared by everyone who needs it. It must not refer to the model, or that would
    never be freed."""

    def __init__(self, model):
        check_model(model)
        decoder = decoder_of(model)
        self.decoder = weakref.ref(decoder)
        self.count = 0
        self.running: weakref.WeakSet[_Running] = weakref.WeakSet()
        self.wrap: Any = None  # the handle's, while there is one: makes its caches
        self.others: list[Around] = []
        self.own = weakref.WeakKeyDictionary({module: index for index, module in attention_calls(decoder)})
        self.cache_name, self.signature = cache_name(decoder), inspect.signature(decoder.forward)
        self.rest = next((x.name for x in self.signature.parameters.values() if x.kind is x.VAR_KEYWORD), None)
        self.namespaces = stand_ins.globals_of(self.own)
        self.around = Around(decoder, "forward", _armed)
        stand_ins.put(self.namespaces, attention_around)
        self.finalizer = weakref.finalize(decoder, stand_ins.abandon, self.namespaces)
        self.finalizer.atexit = False

    def close(self) -> None:
        for around in (self.around, *self.others):
            around.take_away()
        if self.finalizer.detach() is not None:
            stand_ins.take(self.namespaces)

    def override(self, model) -> None:
        """Stand before this model's ways to generate, if nobody does yet."""
        for module in generators_of(model):
            for name, function in (("generate", _generate), ("init_continuous_batching", _refuse_batching)):
                self._stand_before(module, name, function)
        if (outer := outer_of(model)) is not None:
            self._stand_before(outer, "forward", _outer)

    def _stand_before(self, module, name: str, function) -> None:
        if hasattr(module, name) and not isinstance(vars(module).get(name), Around):
            self.others.append(Around(module, name, function))

    def bind(self, args, kwargs) -> dict:
        """The arguments of the decoder's forward by name."""
        if not args and self.rest is not None:
            return dict(kwargs)
        arguments = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        if self.rest is not None:
            arguments.update(arguments.pop(self.rest, {}))
        return arguments

    def with_cache(self, args: tuple, kwargs: dict, cache) -> tuple[tuple, dict]:
        """The same arguments, but with this cache."""
        place = (
            list(self.signature.parameters).index(self.cache_name)
            if self.cache_name in self.signature.parameters
            else len(args)
        )
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        others = {
            name: value for name, value in kwargs.items() if name not in CACHE_NAMES
        }  # a None under an older name
        return args, {**others, self.cache_name: cache}


class _Running:
    """A call of a wrapped decoder, or of ``generate``, while it runs; its frame alone holds it, so no interrupt can
    leave one behind."""

    def __init__(self, decoder=None, wrap=None):
        self.decoder, self.wrap = decoder, wrap  # of generate
        self.came_by = False  # whether a forward of the decoder did
        self.cache: KeptCache | None = None  # the newest that it filled
        self.steps: Steps | None = None  # of generate


def attach(model) -> _Attachment:
    """Intercept this model's attention from now on; each attach needs a :func:`detach`."""
    with stand_ins.lock:
        attachment = _attachment_for(model)
        attachment.count += 1
        return attachment


def _attachment_for(model) -> _Attachment:
    """The one that there is, or a new one; the caller holds the lock, and says what it is for."""
    stand_ins.clear_abandoned()
    decoder = decoder_of(model)
    if (left := _attached.get(decoder)) is not None:
        _close_if_idle(left)  # an interrupt came while it was closed
    attachment = _attached.get(decoder)
    if attachment is None:
        take_away_all(model, but=[x for other in list(_attached.values()) for x in (other.around, *other.others)])
        attachment = _attached[decoder] = _Attachment(model)
    attachment.override(model)
    return attachment


def detach(model) -> None:
    """Undo one :func:`attach`. The last one restores everything: at once, or when the last forward that runs on any
    thread has ended."""
    with stand_ins.lock:
        stand_ins.clear_abandoned()
        attachment = _attached[decoder_of(model)]
        attachment.count -= 1
        _close_if_idle(attachment)


def put_wrap(model, wrap) -> _Attachment:
    """Attach a handle's maker of caches; there may be one at a time."""
    with stand_ins.lock:
        attachment = _attachment_for(model)
        if attachment.wrap is None:
            attachment.wrap = wrap
            return attachment
    raise ValueError("the model is wrapped already; expected handle.remove() or kvpitfalls.unwrap(model) first")


def take_wrap(attachment: _Attachment | None, wrap=None) -> None:
    """Take this maker of caches away, if it is there; without one, whatever is. Once more, after an interrupt."""
    with stand_ins.lock:
        if attachment is not None and (wrap is None or attachment.wrap in (None, wrap)):
            attachment.wrap = None
            _close_if_idle(attachment)


def release(model) -> None:
    """Take away whatever wraps a model."""
    attachment = attachment_of(model)
    take_wrap(attachment)
    if attachment is None:  # or what is left of it, where its decoder was replaced and freed
        take_away_all(model)


def attachment_of(model) -> _Attachment | None:
    """What a model is wrapped with; also where its decoder was replaced since."""
    decoder, modules = decoder_of(model), list(model.modules())
    if (attachment := _attached.get(decoder)) is not None:
        return attachment
    return next(
        (a for a in list(_attached.values()) if any(x.stands_before(m) for x in a.others for m in modules)), None
    )


@contextlib.contextmanager
def paused(model) -> Iterator[None]:
    """Let this thread run a wrapped model as if it were not."""
    before = local.paused
    local.paused = (*before, decoder_of(model))
    try:
        yield
    finally:
        local.paused = before


def _is_paused(decoder) -> bool:
    return any(other is decoder for other in local.paused)


def _close_if_idle(attachment: _Attachment) -> None:
    """Close it if nobody needs it; known until then, so that whoever comes next ends what an interrupt broke off."""
    if attachment.count == 0 and attachment.wrap is None and not attachment.running:
        attachment.close()
        decoder = attachment.decoder()
        if decoder is not None and _attached.get(decoder) is attachment:
            del _attached[decoder]


def _armed(decoder, forward, args, kwargs):
    """In place of a wrapped decoder's forward: this thread is armed for exactly this call, however it ends."""
    attachment = _attached.get(decoder)
    if attachment is None:
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage] # torch documents it
        raise UnsupportedModelError(
            "the model is being exported or traced (torch.export, torch.jit.trace); expected neither inside a wrap, "
            "since a compressed cache changes shape"
        )
    running, outer = _Running(), local.forward
    try:
        with stand_ins.lock:
            attachment.running.add(running)
        args, kwargs, record = _enter(decoder, attachment, args, kwargs)
        local.forward = record
        return forward(*args, **kwargs) if record is None else record.run(decoder, forward, args, kwargs)
    finally:
        local.forward = outer
        with stand_ins.lock:
            attachment.running.discard(running)
            _close_if_idle(attachment)


def _generate(model, generate, args, kwargs):
    """In place of a wrapped model's ``generate``: refused, or as it is, and the model stays wrapped until it has
    ended."""
    decoder = decoder_of(model)
    attachment = _attached.get(decoder)
    if _is_paused(decoder):
        return generate(*args, **kwargs)
    if attachment is None:
        raise NotInterceptedError(
            f"the {type(decoder).__name__} of {type(model).__name__} was replaced inside the wrap, so that nothing "
            "would be compressed; expected that before kvpitfalls.wrap"
        )
    kwargs = under_one_name(cache_name(model), kwargs)
    arguments = arguments_of(model, generate, args, kwargs)
    action = None if attachment.wrap is None else attachment.wrap.action
    check_generate(model, arguments, action)
    coming = chunks_of(model, arguments, action)
    if isinstance(cache := given_cache(arguments)[1], KeptCache):
        cache.check_decoder(decoder)
        if cache.n_seen and (module := outer_of(model)) is not None:
            tokens = next(
                x for name in ("inputs", "input_ids", "inputs_embeds") if (x := arguments.get(name)) is not None
            )
            give_deltas(module, cache, len(tokens))
    running, outer = _Running(decoder, attachment.wrap), local.generating
    running.steps = Steps(arguments, attachment.wrap)
    try:
        with stand_ins.lock:
            attachment.running.add(running)
        local.generating = (*outer, running)
        with running.steps, contextlib.nullcontext() if coming is None else coming.here():
            output = generate(*args, **kwargs)
        if not running.came_by and running.wrap is not None and running.wrap.action.acts:
            raise NotInterceptedError(
                f"generate ran no forward of {type(decoder).__name__} that was intercepted, so that nothing was "
                "compressed: it was replaced inside the wrap; expected that before kvpitfalls.wrap"
            )
        if running.cache is not None and running.wrap is not None:
            running.wrap.remember(running.cache)
        return output
    finally:
        local.generating = outer
        with stand_ins.lock:
            attachment.running.discard(running)
            _close_if_idle(attachment)


def _outer(module, forward, args, kwargs):
    """In place of the forward that calls a multimodal model's decoder: what stands for a cache's prompt only is not
    left from another."""
    decoder = next((child for child in module.children() if child in _attached), None)
    if decoder is None:
        return forward(*args, **kwargs)
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    bound = {**bound, **bound.get("kwargs", {})}
    cache, before = given_cache(bound)[1], local.outer
    if (
        isinstance(cache, KeptCache) and cache.n_seen and _generating(decoder) is None
    ):  # else generate has made the positions
        give_deltas(module, cache, len(inputs_of(bound)))
    local.outer = (module, bound.get("input_ids"))
    try:
        return forward(*args, **kwargs)
    finally:
        local.outer = before


def _note_outer(cache: KeptCache, record: Forward, n_row: int) -> None:
    """What the forward around this decoder's knows of its prompt: ids, where the decoder gets their embeddings, and
    positions."""
    module, ids = local.outer
    cache.origin = replace(cache.origin, deltas=taken_deltas(module, n_row))
    record.ids = ids if record.ids is None else record.ids


def _wrap_for(decoder, attachment: _Attachment):
    """The wrap that a forward is under; inside ``generate``, the one that was there when it began."""
    call = _generating(decoder)
    if call is None:
        return attachment.wrap
    call.came_by = True
    return call.wrap


def _generating(decoder) -> _Running | None:
    """The innermost call of ``generate`` on this thread that runs a decoder."""
    return next((call for call in reversed(local.generating) if call.decoder is decoder), None)


def _refuse_batching(model, start, args, kwargs):
    attachment = _attached.get(decoder_of(model))
    if (
        attachment is None
        or attachment.wrap is None
        or not attachment.wrap.action.acts
        or _is_paused(decoder_of(model))
    ):
        return start(*args, **kwargs)
    raise UnsupportedModelError(
        "continuous batching (generate_batch) keeps a paged cache of its own, which cannot be compressed; expected "
        "generate, or a call inside `with handle.paused()`"
    )


def check_heads(attachment: _Attachment, model, action) -> None:
    """Raise if a layer of an attached model has fewer heads to choose for than an action's allocation expects."""
    compressed = {layer.index for layer in KeptCache(model.config, action).kept_layers}
    check_choices(
        decoder_of(model), {module: i for module, i in attachment.own.items() if i in compressed}, action.least_heads
    )


def _enter(decoder, attachment: _Attachment, args: tuple, kwargs: dict) -> tuple[tuple, dict, Forward | None]:
    """The arguments, with our cache among them, and the forward's record; None if it is none of ours."""
    kwargs = under_one_name(attachment.cache_name, kwargs)
    bound = attachment.bind(args, kwargs)
    wrap = _wrap_for(decoder, attachment)
    if (cache := _ours(decoder, wrap, bound)) is None:
        return args, kwargs, None
    if given_cache(bound)[1] is None:
        args, kwargs = attachment.with_cache(args, kwargs, cache)
    if decoder.training and torch.is_grad_enabled():
        raise UnsupportedModelError("the model is in training mode with gradients on; expected model.eval()")
    if isinstance(cache, FixedCache) and _records_gradients(decoder, bound):
        raise ValueError(
            "a fixed cache, which is written in place, was given to a forward with gradients on; expected "
            "torch.no_grad(), or the cache it "
            "was made from"
        )
    n_seen = cache.n_seen
    _check_origin(decoder, wrap, cache, n_seen)
    settle(None if (call := _generating(decoder)) is None else call.steps, decoder, cache, bound)
    if inputs_of(bound).shape[1] > 1:  # not at each step: each takes a look at every module
        cache.check_decoder(decoder)
        check_not_compiled(decoder)
        check_not_random(decoder)
    coming = coming_to(cache, decoder)
    if coming is None:
        record = _begin(attachment, cache, bound, n_seen)
    else:
        record = _begin_chunk(attachment, cache, bound, n_seen, coming)
    if record.prefill:
        _ask_layers(decoder, record, bound)
        if not n_seen:
            cache.origin = cache.origin.filled_by(decoder)
        if call is not None:
            call.cache = cache
    if local.outer is not None and decoder in local.outer[0].children():
        _note_outer(cache, record, len(inputs_of(bound)))
    return args, kwargs, record


def _ours(decoder, wrap, bound: dict) -> KeptCache | None:
    """The cache of a forward: the given one, made ours if it is not, or a new one; None if the forward is none of
    ours."""
    name, cache = given_cache(bound)
    if isinstance(cache, KeptCache):
        if cache.action is None and cache.n_seen == 0:
            if wrap is None:
                raise NotInterceptedError(
                    "the cache is empty and belongs to no wrap, so that nothing would be compressed; expected one of "
                    "handle.new_cache()"
                )
            wrap.make(cache)
        return cache
    if wrap is None or _is_paused(decoder) or (decoder.training and not wrap.action.acts):
        return None
    if cache is not None:
        check_cache(cache, name)
        cache.__class__ = KeptCache
        return wrap.make(cache)
    if uses_cache(decoder, bound):
        return wrap.make()
    if wrap.action.acts:
        raise NotInterceptedError(
            "use_cache is False (an argument, or left in the model's config by training), so that nothing would be "
            "compressed; expected use_cache=True, or a call inside `with handle.paused()`"
        )
    return None


def _ask_layers(decoder, record: Forward, bound: dict) -> None:
    """Note what a cache's action wants to know of each compressed layer; refused before any layer is touched."""
    action, modules = record.cache.action, {module: i for module, i in record.own.items() if i in record.compressed}
    check_choices(decoder, modules, 1 if action is None else action.least_heads)
    if action is not None and action.reads_rotary:
        tokens, positions = inputs_of(bound), bound.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        record.rotaries = rotaries_of(decoder, modules, positions)
    if action is not None and action.reads_output:
        record.projections = projections_of(decoder, modules)
    if action is not None and (policies := action.asks(record.valid or [])):
        record.afterwards = plan(decoder, record, policies, bound)


def _records_gradients(decoder, bound: dict) -> bool:
    return torch.is_grad_enabled() and (
        inputs_of(bound).requires_grad or any(x.requires_grad for x in decoder.parameters())
    )


def _check_origin(decoder, wrap, cache: KeptCache, n_seen: int) -> None:
    """Raise if the cache is another model's or another wrap's, or was left half filled."""
    if cache.is_half_filled or len({layer.seen for layer in cache.kept_layers}) > 1:
        raise ValueError(
            "an earlier forward on this cache was broken off, or runs on another thread, so that its layers differ; "
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
    if n_seen:
        origin.check_length(n_seen)
        cache.origin = origin.met(decoder)


def _begin(attachment: _Attachment, cache: KeptCache, bound: dict, n_seen: int) -> Forward:
    """The forward's record; on a prefill, what is padding."""
    n_row, n_new = inputs_of(bound).shape[:2]
    ids, mask = bound.get("input_ids"), bound.get("attention_mask")
    if n_seen:
        cache.check_rows(n_row)
        mask = columns_of(mask, n_seen, n_new)
        if n_new > 1:  # not at each step: it waits for the mask
            check_padding(mask, cache.valid, cache.n_prompt)
            check_newest(attachment.decoder(), cache.layers, mask, n_new)
        if isinstance(cache, FixedCache):
            return Forward(cache, attachment.own, False, n_seen, ids, None, cache.newest_of(mask, n_new), bound)
        newest = real_newest(mask, n_new) if cache.is_held else None
        return Forward(cache, attachment.own, False, n_seen, ids, None, newest)
    if n_new < 2 and cache.action is not None and cache.action.evicts:
        raise ValueError(f"the prompt has {n_new} token; expected at least 2, since there is nothing to evict from")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise UnsupportedModelError(
            "attention_mask is not a padding mask (B, T); expected one, since policies recompute plain causal attention"
        )
    _note_prompt(cache, n_new, valid_ranges(mask, n_row, n_new))
    return Forward(cache, attachment.own, True, 0, ids, cache.valid)


def _begin_chunk(attachment: _Attachment, cache: KeptCache, bound: dict, n_seen: int, coming: Coming) -> Forward:
    """The record of a forward over a chunk of a prompt; with the first chunk the cache learns what is coming."""
    n_row, n_new = inputs_of(bound).shape[:2]
    coming.check_chunk(n_row, n_seen, n_new, bound.get("position_ids"))
    if not n_seen:
        _note_prompt(cache, coming.n_token, coming.valid)
    return Forward(cache, attachment.own, True, n_seen, bound.get("input_ids"), cache.valid, coming=coming)


def _note_prompt(cache: KeptCache, n_token: int, valid: list[tuple[int, int]]) -> None:
    cache.valid = valid
    if cache.action is not None:
        cache.spans = cache.action.spans_of(n_token, valid, len(cache.kept_layers))
