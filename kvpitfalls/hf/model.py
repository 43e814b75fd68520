"""Standing between a model and its attention functions.

Every attention class looks its function up under one of two module-level names, so those are replaced by stand-ins in
the modeling file's globals for as long as a model is wrapped, and so is the function that turns queries. Config,
weights and registries stay untouched; calls of models that are not wrapped, or that carry no cache of ours, go straight
through.

One forward of a wrapped decoder goes through :func:`_armed`, which arms this thread; ``entering.py`` sees to its cache,
``forward.py`` has what follows.
"""

import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import NotInterceptedError, UnsupportedModelError
from . import stand_ins
from .arguments import Signature, cache_name, given_cache, inputs_of, under_one_name
from .around import Around, take_away_all
from .cache import KeptCache
from .choices import check_choices
from .coverage import check_model
from .entering import enter
from .forward import attention_around, noting_angles
from .generating import PAGED, arguments_of, check_generate, chunks_of
from .parts import attention_calls, decoder_of, generators_of, outer_of
from .stepping import Steps
from .threads import Outer, Pause, is_paused, local

_attached: "weakref.WeakKeyDictionary[torch.nn.Module, _Attachment]" = weakref.WeakKeyDictionary()


class _Attachment:
    """What a decoder is wrapped with, shared by everyone who needs it. It must not refer to the model, or that would
    never be freed."""

    def __init__(self, model):
        check_model(model)
        decoder = decoder_of(model)
        self.decoder = weakref.ref(decoder)
        self.needed_by: weakref.WeakSet[Any] = weakref.WeakSet()  # who else than a wrap: a block, a call, a harness
        self.wrap: Any = None  # the handle's, while there is one: makes its caches
        self.others: list[Around] = []
        self.own = weakref.WeakKeyDictionary({module: index for index, module in attention_calls(decoder)})
        self.signature = Signature(decoder)
        self.namespaces = stand_ins.globals_of(self.own)
        self.around = Around(decoder, "forward", _armed)
        stand_ins.put(self.namespaces, attention_around, noting_angles)
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


class _OfThread:
    """What needs an attachment while a thread is in a block or a call. Its frame alone holds it, so no interrupt can
    leave one behind."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class _Running(_OfThread):
    """A call of a wrapped decoder, or of ``generate``, while it runs."""

    def __init__(self, decoder=None, wrap=None, steps: Any = None):
        super().__init__()
        self.decoder, self.wrap, self.steps = decoder, wrap, steps  # of generate
        self.came_by = False  # whether a forward of the decoder did
        self.cache: KeptCache | None = None  # the newest that it filled, or was given


class attached(_OfThread):
    """A block in which a model's attention is intercepted; the last one restores everything: at once, or when the last
    forward that runs on any thread has ended."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __enter__(self) -> None:
        try:
            attach(self._model, self)
        except BaseException:  # an interrupt may come once it is attached
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        stand_ins.soon(_detach, self._model, self)


def attach(model, needed_by) -> None:
    """Intercept this model's attention for as long as somebody, who is held weakly, is there."""
    stand_ins.alone(_attach, model, needed_by)


def _attach(model, needed_by) -> None:
    _attachment_for(model).needed_by.add(needed_by)


def _detach(model, needed_by) -> None:
    if (attachment := attachment_of(model)) is not None:
        _ended(attachment, needed_by)


def _attachment_for(model) -> _Attachment:
    """The one that there is, or a new one; the caller holds the lock, and says what it is for."""
    decoder = decoder_of(model)
    if (left := _attached.get(decoder)) is not None:
        _close_if_idle(left)  # an interrupt came while it was closed
    attachment = _attached.get(decoder)
    if attachment is None:
        take_away_all(model, but=[x for other in list(_attached.values()) for x in (other.around, *other.others)])
        attachment = _attached[decoder] = _Attachment(model)
    attachment.override(model)
    return attachment


def put_wrap(model, wrap) -> _Attachment:
    """Attach a handle's maker of caches; there may be one at a time."""
    attachment: _Attachment = stand_ins.alone(_put_wrap, model, wrap)
    return attachment


def _put_wrap(model, wrap) -> _Attachment:
    attachment = _attachment_for(model)
    if attachment.wrap is not None:
        raise ValueError("the model is wrapped already; expected handle.remove() or kvpitfalls.unwrap(model) first")
    attachment.wrap = wrap
    return attachment


def take_wrap(attachment: _Attachment | None, wrap=None) -> None:
    """Take this maker of caches away, if it is there; without one, whatever is. Once more, after an interrupt."""
    if attachment is not None:
        stand_ins.soon(_take_wrap, attachment, wrap)


def _take_wrap(attachment: _Attachment, wrap) -> None:
    if wrap is None or attachment.wrap in (None, wrap):
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
    """Let this thread, or task of asyncio, run a wrapped model as if it were not."""
    pause = Pause(decoder_of(model))
    try:
        pause.begin()
        yield
    finally:
        pause.end()


def _close_if_idle(attachment: _Attachment) -> None:
    """Close it if nobody needs it; known until then, so that whoever comes next ends what an interrupt broke off."""
    if attachment.wrap is None and not attachment.needed_by:
        attachment.close()
        decoder = attachment.decoder()
        if decoder is not None and _attached.get(decoder) is attachment:
            del _attached[decoder]


def _ended(attachment: _Attachment, needed_by) -> None:
    attachment.needed_by.discard(needed_by)
    _close_if_idle(attachment)


def _forget_other_threads() -> None:
    """In a child that was forked: calls and blocks of other threads are not there to end."""
    own = threading.get_ident()
    for attachment in list(_attached.values()):
        for other in [x for x in attachment.needed_by if isinstance(x, _OfThread) and x.thread != own]:
            attachment.needed_by.discard(other)
        _close_if_idle(attachment)


os.register_at_fork(after_in_child=_forget_other_threads)


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
            attachment.needed_by.add(running)
        call, wrap = _generating(decoder), attachment.wrap
        if call is not None:
            call.came_by, wrap = True, call.wrap  # the wrap that was there when it began
        given = attachment.signature.given(args, kwargs)
        local.forward = record = enter(decoder, attachment.own, attachment.signature, wrap, call, given)
        if record is None:
            return forward(*given.args, **given.kwargs)
        return record.run(decoder, forward, given.args, given.kwargs)
    finally:
        local.forward = outer
        stand_ins.soon(_ended, attachment, running)


def _generate(model, generate, args, kwargs):
    """In place of a wrapped model's ``generate``: refused, or as it is, and the model stays wrapped until it has
    ended."""
    decoder = decoder_of(model)
    attachment = _attached.get(decoder)
    kwargs = under_one_name(cache_name(model), kwargs)
    cache = given_cache(kwargs)[1]
    if is_paused(decoder) and not isinstance(cache, KeptCache):
        return generate(*args, **kwargs)
    if attachment is None:
        raise NotInterceptedError(
            f"the {type(decoder).__name__} of {type(model).__name__} was replaced inside the wrap, so that nothing "
            "would be compressed; expected that before kvpitfalls.wrap"
        )
    wrap = attachment.wrap  # asked for once: another thread may take it away
    arguments = arguments_of(model, generate, args, kwargs)
    action = None if wrap is None else wrap.action
    check_generate(model, arguments, action)
    coming = chunks_of(model, arguments, action)
    if isinstance(cache, KeptCache):
        cache.check_decoder(decoder)
        if vars(model.generation_config).get("cache_implementation") and kwargs.get("generation_config") is None:
            kwargs = {"cache_implementation": None, **kwargs}  # a checkpoint's is for calls that are given no cache
        if cache.n_seen and (module := outer_of(model)) is not None:
            tokens = next(
                x for name in ("inputs", "input_ids", "inputs_embeds") if (x := arguments.get(name)) is not None
            )
            cache.origin.give_deltas(module, len(cache.valid or ()), len(tokens))
    running, outer = _Running(decoder, wrap, Steps(arguments, wrap)), local.generating
    running.cache = cache if isinstance(cache, KeptCache) else None
    try:
        with stand_ins.lock:
            attachment.needed_by.add(running)
        local.generating = (*outer, running)
        with running.steps, contextlib.nullcontext() if coming is None else coming.here():
            args, kwargs = running.steps.watched(generate, args, kwargs)
            output = generate(*args, **kwargs)
        if not running.came_by and wrap is not None and wrap.action.acts:
            raise NotInterceptedError(
                f"generate ran no forward of {type(decoder).__name__} that was intercepted, so that nothing was "
                "compressed: it was replaced inside the wrap; expected that before kvpitfalls.wrap"
            )
        if running.cache is not None and wrap is not None:
            wrap.remember(running.cache)
        return output
    finally:
        local.generating = outer
        stand_ins.soon(_ended, attachment, running)


def _outer(module, forward, args, kwargs):
    """In place of the forward that calls a multimodal model's decoder: what stands for a cache's prompt only is not
    left from another."""
    decoder = next((child for child in module.children() if child in _attached), None)
    if decoder is None:
        return forward(*args, **kwargs)
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    bound = {**bound, **bound.get("kwargs", {})}
    cache, tokens, before = given_cache(bound)[1], inputs_of(bound), local.outer
    is_filled = isinstance(cache, KeptCache) and cache.n_seen > 0
    if is_filled and tokens is not None and _generating(decoder) is None:  # else generate has made the positions
        cache.origin.give_deltas(module, len(cache.valid or ()), len(tokens))
    try:
        local.outer = Outer(module, bound.get("input_ids"), bound.get("attention_mask"))
        return forward(*args, **kwargs)
    finally:
        local.outer = before


def _generating(decoder) -> _Running | None:
    """The innermost call of ``generate`` on this thread that runs a decoder."""
    return next((call for call in reversed(local.generating) if call.decoder is decoder), None)


def _refuse_batching(model, start, args, kwargs):
    attachment = _attached.get(decoder_of(model))
    if attachment is None or attachment.wrap is None:
        return start(*args, **kwargs)
    raise UnsupportedModelError(PAGED)


def check_heads(attachment: _Attachment, model, action) -> None:
    """Raise if a layer of an attached model has fewer heads to choose for than an action's allocation expects."""
    if action.least_heads > 1:
        compressed = {layer.index for layer in KeptCache(model.config, action).kept_layers}
        modules = {module: i for module, i in attachment.own.items() if i in compressed}
        check_choices(decoder_of(model), modules, action.least_heads)
