"""One forward of a wrapped decoder: what its cache's layers and its attention calls have to do with each other.

Each :meth:`KeptLayer.update` leaves a :class:`.Ticket`; the attention call of this decoder that receives the ticket's
keys gets its mask translated and, after a prefill, hands the layer to the cache's action; a ticket that was never
collected is an error.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from ..errors import NotInterceptedError, UnsupportedModelError
from ..eviction.layer_inputs import LayerInputs
from . import one_token
from .cache import KeptCache
from .coming import Coming
from .coverage import RANDOM
from .denominators import Denominators
from .layer import KeptLayer, Ticket
from .masks import physical_mask
from .threads import local

if TYPE_CHECKING:
    from .evict import Action
    from .fixed import FixedCache
    from .rotations import LayerRotary


@dataclass(eq=False)
class AttentionCall(LayerInputs):
    """What a cache's action sees of one layer's attention: what any layer gives, here queries and keys after rotary
    embedding as attention used them, and what of the forward goes with it.

    Attributes
    ----------
    keys, values : tensor (B, H, T, D) and (B, H, T, Dv)
        With ``share_heads`` made from the cache's rows, not the rows themselves (latents, mixed heads).
    queries : tensor (B, Hq, q, D)
    layer, n_layer : int
        Of the cache: which of the compressed layers this is, and how many there are.
    sinks : tensor (Hq,), or None
        As of gpt-oss.
    lse : tensor of float32, shape (B, Hq, T), or None
        Where the attention itself told it.
    rotary : Rotary, or None
        Only of a prompt, for an action that reads it.
    output : tensor of float32, shape (Hq, Dv, E), or None
        As ``rotary``; see ``projections.py``.
    valid : list of (int, int)
        Per row, the range of real tokens of a prompt; after it, all slots.
    newest : BoolTensor (B, q), or None
        After a prompt, where a budget is held: False where a new token is padding. None: nowhere.
    coming : Coming, or None
        The prompt, if it comes in chunks; ``queries`` are then of the newest one, and the others of the slots.
    """

    keys: torch.Tensor
    queries: torch.Tensor  # pyright: ignore[reportGeneralTypeIssues] # no default: attention has them all
    values: torch.Tensor  # pyright: ignore[reportGeneralTypeIssues] # see above
    _: KW_ONLY
    valid: Sequence[tuple[int, int]]
    newest: torch.Tensor | None = None
    coming: Coming | None = None


@dataclass
class Forward:
    """One forward of a wrapped decoder, on one thread."""

    cache: KeptCache
    own: Mapping[torch.nn.Module, int]  # the decoder's attention modules and their layers
    prefill: bool
    n_seen: int  # before it
    ids: torch.Tensor | None
    valid: Sequence[tuple[int, int]] | None
    newest: torch.Tensor | None = (
        None  # bool (B, n), for a fixed cache or a held budget: False where a new token is padding; None: nowhere
    )
    bound: dict | None = None  # the call's arguments by name, for a cache of fixed size
    coming: Coming | None = None  # the prompt that this is a chunk of
    rotaries: "Mapping[torch.nn.Module, LayerRotary]" = field(
        default_factory=dict
    )  # of attention modules, where the action reads them
    projections: Mapping[torch.nn.Module, Callable] = field(default_factory=dict)
    tickets: dict[int, Ticket] = field(default_factory=dict)  # in the order in which layers were updated
    angles: Any = None  # cosines and sines by which queries were turned since the last attention call
    afterwards: Callable | None = None  # what else the decoder's own forward is called for, before anything is evicted

    @property
    def notes_angles(self) -> bool:
        """Whether anybody asks by what angles the layers turn their queries."""
        return bool(self.rotaries)

    @cached_property
    def layers(self) -> list[KeptLayer]:
        """Those whose cache is compressed."""
        return self.cache.kept_layers

    @cached_property
    def compressed(self) -> dict[int, int]:
        """The numbers of the layers whose cache is compressed, and which of them each is."""
        return {layer.index: place for place, layer in enumerate(self.layers)}

    def spans_of(self, n_token: int) -> list:
        """The instructions of a prompt of ``n_token`` tokens; raises if these, or protection, do not fit it."""
        action = self.cache.action
        return [] if action is None else action.spans_of(n_token, self.valid or [], len(self.compressed))

    def note_prompt(self, n_token: int, spans: list) -> None:
        """Tell the cache of its prompt."""
        self.cache.valid, self.cache.spans = self.valid, spans
        for layer in self.layers:
            layer.n_prompt = n_token

    @cached_property
    def is_plain(self) -> bool:
        """Whether attention is the model's own: nothing was evicted before it, and nothing is done after it."""
        return not self.prefill and not self.cache.is_held and not any(x.is_evicted for x in self.layers)

    @cached_property
    def act(self) -> Callable | None:
        """What the cache's action does to each layer after its attention; None: nothing."""
        action = self.cache.action
        if action is None or not (self.prefill or action.holds):
            return None
        if self.coming is not None:
            return action.after_chunk
        return action.after_prefill if self.prefill else action.after_step

    def note_peak(self) -> None:
        """What the cache held before each eviction of this forward: nothing else makes it smaller. From what the layers
        hold now back to the first one's update."""
        if self.act is None or not self.tickets:
            return
        sizes = {layer.index: layer.n_byte for layer in self.layers}
        held = peak = sum(sizes.values())
        for ticket in reversed(self.tickets.values()):
            if (now := sizes.get(ticket.layer.index)) is not None:  # a window of fixed slots has its ticket, too
                held += ticket.n_byte - now
                peak = max(peak, held)
                held -= ticket.n_byte * ticket.n_new // ticket.n_slot
        self.cache.peak_bytes = max(self.cache.peak_bytes, peak)

    def collect(self, key: torch.Tensor, module) -> Ticket | None:
        """The ticket whose keys these are, or, where a model makes other keys from what the cache returned, its layer's
        own.

        Other models' attention may run on this thread, too, inside this forward: what is not this decoder's gets none.
        """
        index = self.own.get(module)
        if index is None:
            return None
        ticket = self.tickets.get(index)
        if ticket is None or ticket.keys() is not key:  # a layer that shares another layer's keys
            ticket = next((other for other in self.tickets.values() if other.keys() is key), ticket)
        if ticket is None or key.shape[2] == ticket.n_slot:
            return ticket
        if not ticket.done:
            raise UnsupportedModelError(
                f"{type(module).__name__} (layer {ticket.layer.index}) calls attention on {key.shape[2]} keys, but "
                "its cache returned "
                f"{ticket.n_slot}; such models cannot be compressed"
            )
        return None

    def run(self, decoder, forward, args: tuple, kwargs: dict):
        """The decoder's own forward; on a cache of fixed size that may be a captured one. If it is broken off, the
        cache is of no use."""
        cache = self.cache
        cache.is_half_filled = True
        output = (
            cast("FixedCache", cache).run(decoder, forward, args, kwargs, self)
            if self.bound is not None
            else forward(*args, **kwargs)
        )
        self.check(decoder)
        self.note_peak()
        if self.afterwards is not None:
            self.afterwards(decoder, forward, self)
        cache.origin, cache.is_half_filled = cache.origin.then(self.ids, self.n_seen), False
        if cache.coming is not None and cache.n_seen >= cache.coming.n_token:
            cache.coming = None
        return output

    def check(self, decoder) -> None:
        """Raise, when the forward has ended, if a layer's attention did not come by."""
        waiting = [ticket.layer.index for ticket in self.tickets.values() if not ticket.done]
        untouched = [layer.index for layer in self.layers if self.prefill and layer.index not in self.tickets]
        if waiting or untouched:
            raise NotInterceptedError(
                f"{type(decoder).__name__}: layers {waiting or untouched} were not compressed, because their "
                "attention did not go through "
                "transformers' attention interface"
            )


@dataclass
class Watched:
    """In place of a forward, while one attention module is called alone.

    Attributes
    ----------
    is_plain, notes_angles : bool
        As a forward's.
    told : tensor (B, n, Hq, Dv), or None
        What attention is to give; zeros if it is not said.
    attended : tensor (B, n, Hq, Dv)
        What it gave.
    query, key, value : tensor (B, Hq, n, D), (B, H, n, D), (B, H, n, Dv)
        What it was given.
    angles : (tensor, tensor), or None
        As a forward's.
    returned : tensor
        What the module made of what it attended to.
    """

    is_plain: ClassVar[bool] = False
    notes_angles: ClassVar[bool] = True
    told: torch.Tensor | None
    attended: torch.Tensor = field(init=False)
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    returned: torch.Tensor = field(init=False)
    angles: Any = None

    def attend(self, query, key, value):
        """What stands for attention."""
        self.query, self.key, self.value = query, key, value
        nothing = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        self.attended = nothing if self.told is None else self.told
        return self.attended, None


def watched(module: torch.nn.Module, attended: torch.Tensor | None, **arguments) -> Watched:
    """What an attached decoder's attention module asks and returns if it is called so."""
    before, watch = local.forward, Watched(attended)
    try:
        local.forward = watch
        returned = module(**arguments)
    finally:
        local.forward = before
    if not hasattr(watch, "query"):
        raise NotInterceptedError(
            f"{type(module).__name__} did not go through transformers' attention interface when it was called alone"
        )
    watch.returned = returned[0] if isinstance(returned, tuple) else returned
    return watch


def attention_around(base: Callable, implementation: str | None) -> Callable:
    """What this thread calls in place of an attention function: that itself, where there is nothing to do before or
    after it."""
    forward = local.forward
    if forward is None or forward.is_plain:
        return base
    return partial(attention, base, implementation or "eager")


def noting_angles(function: Callable) -> Callable:
    """What stands for a modeling file's function that turns queries: the same, and this thread's forward knows by what
    angles."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def turn(*args, **kwargs):
        if local.forward is not None and local.forward.notes_angles:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            local.forward.angles = given.get("cos"), given.get("sin")
        return function(*args, **kwargs)

    vars(turn)["own"] = function
    return turn


def attention(base, implementation, module, query, key, value, attention_mask=None, **kwargs):
    forward = local.forward
    if isinstance(forward, Watched):
        return forward.attend(query, key, value)
    angles = None
    if forward is not None:  # those of a layer that is not compressed are not the next one's
        angles, forward.angles = forward.angles, None
    ticket = forward.collect(key, module) if forward is not None else None
    if forward is None or ticket is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    if ticket.slots is not None:
        base, attention_mask = _over_slots(ticket, base, implementation, query, key, attention_mask, kwargs)
    is_first, ticket.done = not ticket.done, True
    # a window of fixed slots has its ticket, too
    act = forward.act if is_first and isinstance(ticket.layer, KeptLayer) else None
    if act is None:
        out = base(module, query, key, value, attention_mask, **kwargs)
    else:
        tells = forward.prefill and _tells_denominators(forward, implementation, query)
        with Denominators(query, kwargs.get("scaling")) if tells else contextlib.nullcontext() as seen:
            out = base(module, query, key, value, attention_mask, **kwargs)
        check_call(module, implementation, kwargs)
        _check_angles(module, forward, angles)
        lse = None if seen is None else seen.lse
        call = _seen_by(ticket, forward, module, implementation, query, key, value, kwargs, lse)
        act(ticket.layer, call)
    if is_first and forward.cache.progress is not None:
        forward.cache.progress.update()
    return out


def check_call(module, implementation: str, extra: dict) -> None:
    """Raise if this attention call does more to its logits than a policy can follow."""
    if extra.get("dropout"):
        raise UnsupportedModelError(RANDOM)
    name = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    if implementation.startswith("paged"):
        raise UnsupportedModelError(
            f"{name} runs under continuous batching ({implementation}); expected a plain forward or generate"
        )
    for key in ("indices", "block_indices", "position_bias"):
        if extra.get(key) is not None:
            raise UnsupportedModelError(
                f"{name} passes {key!r} to its attention, which indexes cache entries that eviction moves"
            )


def _check_angles(module, forward: Forward, angles: Any) -> None:
    """Raise if a layer turned a prompt's queries otherwise than its rotary says."""
    if forward.prefill and module in forward.rotaries and not forward.rotaries[module].meet(angles):
        raise UnsupportedModelError(
            f"{type(module).__name__} (layer {module.layer_idx}) was handed other angles than its decoder's rotary_emb "
            "gives; the policy undoes rotary embedding and expects one for all layers of a kind"
        )


def _over_slots(ticket: Ticket, base, implementation: str, query, key, mask, kwargs: dict):
    """The attention function and the mask for slots that are not in order."""
    is_per_head = ticket.layer.keys.shape[1] in (1, key.shape[1])  # some models repeat heads that the cache holds once
    if (
        is_per_head
        and (mask is None or mask.shape[1] == 1)
        and one_token.serves(base, implementation, query, key, kwargs)
    ):
        return _one_token, one_token.visible_slots(ticket.slots, mask)
    return base, physical_mask(ticket.slots, mask, query, implementation)


def _one_token(module, query, key, value, visible, scaling=None, **kwargs):
    return one_token.attend(query, key, value, visible, scaling)


def _tells_denominators(forward: Forward, implementation: str, query) -> bool:
    """On a GPU they take a pass over all keys of their own; a CPU gets them from the pass that it makes anyway."""
    return (
        query.is_cuda
        and forward.coming is None
        and implementation == "sdpa"
        and cast("Action", forward.cache.action).reads_queries
        and all(row == (0, query.shape[2]) for row in forward.valid or ())
    )


def _seen_by(
    ticket: Ticket, forward: Forward, module, implementation: str, query, key, value, kwargs: dict, lse
) -> AttentionCall:
    # sdpa ignores softcap and sinks, so scores must, too
    others: dict[str, Any] = {"scaling": kwargs.get("scaling")}
    if implementation != "sdpa":
        sinks = kwargs.get("s_aux")
        others |= {"softcap": kwargs.get("softcap"), "sinks": None if sinks is None else sinks.detach()}
    valid = forward.valid or [(0, key.shape[2])] * key.shape[0]
    ticket.layer.shared = ticket.keys() is not key or ticket.values() is not value
    projection = forward.projections.get(module)
    if torch.is_grad_enabled():  # what is kept is no function of them that has a gradient
        key, query, value = key.detach(), query.detach(), value.detach()
    return AttentionCall(
        key,
        query,
        value,
        lse=lse,
        layer=forward.compressed[ticket.layer.index],
        n_layer=len(forward.compressed),
        rotary=forward.rotaries.get(module),
        output=None if projection is None else projection(value.new_empty(query.shape[1], value.shape[-1])),
        share_heads=ticket.layer.shared,
        valid=valid,
        newest=forward.newest,
        coming=forward.coming,
        **others,
    )
