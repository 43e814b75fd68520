"""One step of a decoder over a cache of fixed size, captured as a CUDA graph: the GPU's work without Python between its
kernels."""

import contextlib
import functools
import gc
import inspect
import threading
from collections.abc import Callable, Iterator

import torch
from torch.nn.modules import module as of_all

from .arguments import CACHE_NAMES, cache_argument
from .around import Around

# What a captured step reads; a call with anything else is run as it is, by Python.
_INPUTS = {"input_ids", "position_ids", "attention_mask", "use_cache", "cache_position", "return_dict", *CACHE_NAMES}

_lock = threading.RLock()  # plain, a signal's handler that captures while its thread does would wait for itself
_CAPTURING = "transformers.utils.output_capturing"
# Hooks of every module; torch 2.6 has no function that asks for them.
_OF_ALL = [getattr(of_all, f"_global_{when}_hooks") for when in ("forward_pre", "forward", "backward_pre", "backward")]
# What CUDA says of a step that cannot be captured (torch's errors are RuntimeErrors), and a model of one that misses
# arguments. A cache of fixed size that was asked for says so; inside generate Python runs the step.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


class NotCapturedError(RuntimeError):
    """A step cannot be captured; ``what``: without what to do about a cache of :meth:`KeptCache.fixed`."""

    def __init__(self, what: str):
        super().__init__(f"{what}; expected cache.fixed(..., use_graph=False)")
        self.what = what


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps on a GPU are captured; one for all, since cuBLAS keeps memory for each that it saw."""
    return torch.cuda.Stream(device)


@functools.cache
def _stream_of_steps(device: torch.device) -> torch.cuda.Stream:
    """Where captured steps run; one for all, since they share the memory of cuBLAS. It is none that anything else runs
    on, so that a step may begin while ``generate`` still waits for its token."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """What runs inside is a step: it comes after all that the GPU was asked for, and nobody waits for it."""
    steps = _stream_of_steps(device)
    steps.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(steps):
        yield


def _wait_for_steps(device: torch.device) -> None:
    """What the GPU is asked for from now on comes after the steps."""
    torch.cuda.current_stream(device).wait_stream(_stream_of_steps(device))


def _finish_steps(device: torch.device) -> None:
    """Wait until the steps are done."""
    _stream_of_steps(device).synchronize()


@contextlib.contextmanager
def _captured(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """What runs inside is captured, on a stream of the model's GPU, be it the current one or not.

    One capture at a time, since each begins with a wait for the device, which breaks another off; and no garbage is
    collected meanwhile, since what it holds may call CUDA when it goes.
    """
    with _lock, torch.cuda.device(device):
        collects = gc.isenabled()
        try:
            gc.disable()
            with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
                yield
        finally:
            if collects:
                gc.enable()


def why_not_this(bound: dict) -> str | None:
    """Why a call is run by Python and not captured; None if it can be. ``bound``: its arguments by name."""
    ids = bound.get("input_ids")
    return "it has no token ids on a GPU" if ids is None or not ids.is_cuda else why_not_arguments(bound)


def why_not_arguments(bound: dict) -> str | None:
    """Why a call with token ids is run by Python wherever they are; None if it need not be."""
    ids = bound["input_ids"]
    if others := [name for name, value in bound.items() if not _is_left_out(name, value)]:
        return f"it was given {', '.join(others)}"
    positions = bound.get("position_ids")
    if positions is None or positions.ndim != 2 or positions.shape[1] != 1 or ids.shape[1] != 1:
        return "it was not given one token and its position_ids (B, 1)"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast is on, and its copies of weights go where it ends"
    return "it returns a tuple" if bound.get("return_dict") is False else None


def _is_left_out(name: str, value: object) -> bool:
    """Whether a captured step, of one token, is the same without this argument, or reads it."""
    is_all = name == "logits_to_keep" and isinstance(value, int)  # Gemma 4 tells its decoder, too
    return name in _INPUTS or value is None or value is False or is_all


def why_not(decoder: torch.nn.Module) -> str | None:
    """Why no step of a decoder is captured; None if they can be."""
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"{type(decoder).__name__} counts positions itself"
    if len({parameter.device for parameter in decoder.parameters()}) > 1:
        return "the model is on several devices"
    if any(getattr(decoder.config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return "the model's config asks for hidden states or attentions"
    if any(map(len, _OF_ALL)) or any(map(_has_hooks, decoder.modules())):
        return "modules have hooks, which a replay would not call"
    return None


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether a forward of it calls more than itself. What transformers leaves there after it was once asked for hidden
    states does nothing as long as nobody asks."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return hasattr(module, "_hf_hook") or any(getattr(x, "__module__", None) != _CAPTURING for x in hooks)


def has_own_forwards(decoder: torch.nn.Module) -> bool:
    """Whether somebody has put a function before a module's forward: what it does besides, a replay would not do."""
    return any(not _is_its_own(module) for module in decoder.modules())


def _is_its_own(module: torch.nn.Module) -> bool:
    """Also where transformers 4 left a module's own method in its dictionary, once asked for hidden states."""
    forward = vars(module).get("forward")
    if isinstance(forward, Around):
        return not forward.is_before_another
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _memory_of(decoder: torch.nn.Module) -> list[int]:
    """Where its weights and buffers are."""
    return [x.data_ptr() for tensors in (decoder.parameters(), decoder.buffers()) for x in tensors]


def _fields(layer) -> dict:
    """What a layer of states holds, to be compared and put back: its states are written in place."""
    return {name: dict(x) if isinstance(x, dict) else x for name, x in vars(layer).items()}


def _put_back(layer, before: dict) -> bool:
    """Whether a capture, which computes nothing, changed a layer's fields; they are then those of before."""
    now = _fields(layer)
    same = now.keys() == before.keys() and all(_is_same(now[name], before[name]) for name in before)
    if not same:
        vars(layer).clear()
        vars(layer).update(before)
    return not same


def _is_same(one, other) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return one is other or (not isinstance(one, torch.Tensor) and bool(one == other))


class StepGraph:
    """A captured step. It holds the memory of its inputs and outputs, and relies on that of the cache and the weights.

    Attributes
    ----------
    is_ahead : bool
        A step has begun that nobody has asked for yet.
    foresees : bool
        Nobody has asked for another step than the one that had begun.

    Parameters
    ----------
    decoder : torch.nn.Module
    forward : callable
        The decoder's own forward.
    cache : FixedCache
        Whose Python side is left as it was; the capture computes nothing.
    record : Forward
        Of the call in which it is captured, one that :func:`why_not_this` has nothing against.
    """

    is_ahead = False
    foresees = True

    def __init__(self, decoder, forward: Callable, cache, record):
        if _lock._is_owned():  # type: ignore[attr-defined] # as in stand_ins.py
            raise RuntimeError(
                "a signal's handler or a finalizer came while its thread captured a CUDA graph, and is to capture "
                "another; expected that outside of it"
            )
        self.implementation, ids = decoder.config._attn_implementation, record.ids
        self.ids, self.positions = torch.zeros_like(ids), torch.zeros_like(ids)
        self.newest = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)
        newest, record.newest = record.newest, self.newest
        self._graph = torch.cuda.CUDAGraph()
        seen, of_states = cache.n_seen, [x for x in cache.layers if not getattr(x, "is_fixed", False)]
        before = [_fields(layer) for layer in of_states]
        # Nothing reads the model's own mask; some kinds are made of constants, which a capture cannot send to the GPU.
        needs_none = self.implementation == "sdpa" and not any(getattr(x, "is_sliding", False) for x in cache.layers)
        mask = None if needs_none else torch.zeros(len(ids), 1, 1, 1, device=ids.device)
        try:
            self.memory = _memory_of(decoder)
            with _captured(self._graph, ids.device):
                self._output = forward(
                    input_ids=self.ids,
                    attention_mask=mask,
                    position_ids=self.positions,
                    use_cache=True,
                    **cache_argument(decoder, cache),
                )
        except _REFUSALS as error:  # anything else is the model's own, and goes on to whoever called it
            first_line = (str(error) or repr(error)).partition("\n")[0]
            raise NotCapturedError(
                f"a step of {type(decoder).__name__} cannot be captured as a CUDA graph ({first_line})"
            ) from error
        finally:
            for layer in cache.fixed_layers:
                layer.seen = seen
            record.newest = newest
            moved = [layer for layer, fields in zip(of_states, before, strict=True) if _put_back(layer, fields)]
        if moved:
            raise NotCapturedError(
                f"a step of {type(decoder).__name__} gives a {type(moved[0]).__name__} other memory, or counts there"
            )
        others = [n for n, x in self._output.items() if n not in CACHE_NAMES and not isinstance(x, torch.Tensor | None)]
        if others:
            raise NotCapturedError(f"a step of {type(decoder).__name__} also returns {', '.join(sorted(others))}")

    def is_of(self, decoder) -> bool:
        """Whether the decoder's weights are still where they were."""
        return self.memory == _memory_of(decoder)

    def fits(self, decoder, ids: torch.Tensor) -> bool:
        """Whether it was captured for such a call."""
        return self.implementation == decoder.config._attn_implementation and self.ids.shape == ids.shape

    def __call__(self, cache, ids: torch.Tensor, positions: torch.Tensor, newest: torch.Tensor | None):
        """The step's output, in memory of its own."""
        newest = torch.ones_like(self.newest) if newest is None else newest
        if not self._is_foreseen(ids, positions, newest):
            self.take_back(cache)
            self._begin(ids, positions, newest)
        self.is_ahead = False
        _wait_for_steps(ids.device)
        for layer in cache.fixed_layers:
            layer.seen += 1
        now = {name: x.clone() for name, x in self._output.items() if isinstance(x, torch.Tensor)}
        # "in" says yes of a cache's old name, too
        return type(self._output)(**now, **dict.fromkeys(self._output.keys() & set(CACHE_NAMES), cache))

    def _begin(self, ids: torch.Tensor, positions: torch.Tensor, newest: torch.Tensor) -> None:
        for mine, given in ((self.ids, ids), (self.positions, positions), (self.newest, newest)):
            mine.copy_(given)
        with _beside(self.ids.device):
            self._graph.replay()

    def begin_next(self, ids: torch.Tensor) -> None:
        """Begin the step after the present one, since its tokens, (B, 1), are known: the GPU need not wait for the
        Python between two steps.

        A call that asks for another step takes it back, and then none begins ahead any more.
        """
        if self.foresees:
            self.is_ahead = True  # before it is true: what an interrupt leaves can be taken back
            self._begin(ids, self.positions + 1, torch.ones_like(self.newest))

    def _is_foreseen(self, ids: torch.Tensor, positions: torch.Tensor, newest: torch.Tensor) -> bool:
        """Whether the step that is asked for has begun."""
        if not self.is_ahead:
            return False
        asked, begun = torch.cat([ids, positions, newest], 1), torch.cat([self.ids, self.positions, self.newest], 1)
        self.foresees = torch.equal(asked, begun)
        return self.foresees

    def take_back(self, cache) -> None:
        """Undo a step that has begun ahead: the slots that it took are free again."""
        if self.is_ahead:
            self.finish()
            for room in cache.rooms:
                room.close(cache.n_room - cache.n_free, 1)
            self.is_ahead = False

    def finish(self) -> None:
        """Wait until no step writes any more."""
        _finish_steps(self.ids.device)
