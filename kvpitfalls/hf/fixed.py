"""Decoding on a cache of fixed size: what eviction left first, then room for new tokens, written in place."""

from collections.abc import Callable
from typing import Any, cast

import torch

from ..numbers import check_whole
from .cache import KeptCache, why_not_compressed
from .layer import KeptLayer, leave_ticket
from .masks import check_padding
from .rows import holds_nothing, is_kept_alone
from .step_graph import StepGraph, why_not, why_not_this

_SLOTS = 16


class Room:
    """Which slots hold a visible token, and where the next one goes; shared by all layers that agree on it.

    Attributes
    ----------
    visible : BoolTensor (B, H or 1, S)
    bias : tensor (B, H or 1, S)
        The same to be added to logits, 0 or minus infinity, in the keys' dtype: SDPA would make it of a mask anew in
        every layer.
    at : LongTensor (1,)
        The first free slot; on the device, so that a captured step can count.
    where : LongTensor (n,)
        The slots of the tokens that the present forward brings.
    """

    def __init__(self, visible: torch.Tensor, n_kept: int, first_layer: int, dtype: torch.dtype):
        self.visible, self.n_kept, self.first_layer, self.dtype = visible, n_kept, first_layer, dtype
        self._renew()
        self.at = self.where = torch.tensor([n_kept], device=visible.device)

    def open(self, n_new: int, newest: torch.Tensor | None) -> None:
        """Take the next slots; ``newest``, bool (B, n), says which of the tokens are none but padding."""
        self.where = self._next(n_new)
        self.at += n_new
        if newest is None:
            self.visible.index_fill_(2, self.where, True)
        else:
            self.visible.index_copy_(2, self.where, newest[:, None].expand(-1, self.visible.shape[1], -1))
        self._renew()

    def _next(self, n_new: int) -> torch.Tensor:
        return self.at + torch.arange(n_new, device=self.at.device)

    def _renew(self) -> None:
        self.bias = torch.zeros_like(self.visible, dtype=self.dtype).masked_fill_(~self.visible, float("-inf"))

    def close(self, n_came: int, n: int) -> None:
        """The slots behind those of ``n_came`` new tokens, of which ``n`` may be taken, are free."""
        self.at.fill_(self.n_kept + n_came)
        self.visible.index_fill_(2, self._next(n), False)

    def move(self, rows: Callable) -> None:
        """Batch rows move, and the memory stays."""
        self.visible.copy_(rows(self.visible))

    def replace(self, rows: Callable) -> None:
        """Other batch rows, in other memory."""
        self.visible = rows(self.visible)


class InPlace:
    """Of layers that write new rows into slots that they have from the beginning."""

    is_fixed = True
    kind_of_room: type[Room] = Room
    room: Room  # given by the cache, whose layers share their rooms
    index: int
    seen: int
    keys: torch.Tensor
    values: torch.Tensor
    _forward = KeptLayer._forward

    def update(self, key_states, value_states, *args, **kwargs):
        """Write new rows where they belong; called by the model."""
        forward = self._forward()
        n_new = key_states.shape[-2]
        if self.room.first_layer == self.index:
            self.room.open(n_new, forward.newest)
        self.keys.index_copy_(2, self.room.where, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.room.where, value_states.to(self.values.dtype))
        self.seen += n_new
        leave_ticket(forward, cast(KeptLayer, self), n_new)  # as one; a window is one in all that is asked of it
        return self.keys, self.values

    @property
    def slots(self) -> "FixedSlots":
        """What stands where."""
        return FixedSlots(self)


class FixedLayer(InPlace, KeptLayer):
    """A :class:`KeptLayer` whose keys and values have all their slots from the beginning; those behind ``seen`` tokens
    are zero."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: KeptLayer, n_room: int):
        super().__init__(layer.index)
        vars(self).update(
            {name: value for name, value in vars(layer).items() if name not in ("keys", "values", "spare")}
        )
        n_row, n_head, n_slot = layer.keys.shape[:3]
        self.n_slot, self.seen_before = n_slot, layer.seen
        self.keys, self.values = (with_room(x, n_room) for x in (layer.keys, layer.values))
        later = torch.arange(self.seen, self.seen + n_room, device=layer.keys.device).expand(n_row, n_head, -1)
        self.pos_before, self.live_before, self.n_after = torch.cat([layer.places, later], -1), None, 0
        self.prompt_shape = layer.prompt_shape or (n_row, n_head, self.seen)
        self.bytes_before = layer.bytes_before or layer.keys.nbytes + layer.values.nbytes

    @property
    def live(self) -> torch.Tensor:
        """Slots that hold a token (B, H, S); a step that has begun ahead has taken one more."""
        n_taken = self.n_slot + self.seen - self.seen_before
        return self.slots.live & (torch.arange(self.keys.shape[2], device=self.keys.device) < n_taken)

    @property
    def pos(self) -> torch.Tensor:
        """Logical positions (B, H, S); those of free slots are the newest token's."""
        return self.pos_before.clamp(max=self.seen - 1)

    def crop(self, n: int) -> None:
        """Not of one layer alone."""
        raise ValueError(
            "crop was called on a layer of a fixed cache; expected a call on the cache, whose layers share their slots"
        )

    def reset(self) -> None:
        """Not of a fixed cache."""
        raise ValueError("reset was called on a fixed cache; expected a new cache for a new prompt")

    def map_in_place(self, rows: Callable) -> None:
        """Rows move and the memory stays, so a captured step stays right."""
        for x in (self.keys, self.values, self.pos_before):
            x.copy_(rows(x))

    def _map_rows(self, rows) -> None:
        self.keys, self.values, self.pos_before = rows(self.keys), rows(self.values), rows(self.pos_before)
        self.prompt_shape = (len(self.keys), *self.prompt_shape[1:])


class FixedSlots:
    """:class:`Slots` of a fixed layer; made only where somebody asks."""

    is_fixed = True

    def __init__(self, layer: Any):
        self._layer, self.seen = layer, layer.seen

    @property
    def pos(self) -> torch.Tensor:
        """See :class:`Slots`."""
        return self._layer.pos

    @property
    def live(self) -> torch.Tensor:
        """See :class:`Slots`; by the device's count, which a captured step reads."""
        return self._layer.room.visible.expand(*self._layer.keys.shape[:3])

    @property
    def bias(self) -> torch.Tensor:
        """What one new token sees, (B, H or 1, S); see :class:`Room`."""
        return self._layer.room.bias


class FixedCache(KeptCache):
    """A compressed cache with room for a number of new tokens; made by :meth:`KeptCache.fixed`.

    On a GPU a step of one token is captured as a CUDA graph when it comes for the second time, and replayed from then
    on; inside ``generate`` it begins as soon as its token is chosen. What the graph relies on (the memory of the
    weights, modules without hooks) is looked at when ``generate`` begins and when several tokens come, not between the
    steps of one answer.

    Parameters
    ----------
    cache : KeptCache
        Right after its prompt. It is not changed, and shares no memory with this one.
    n_room : int
        How many tokens may follow.
    use_graph : bool
        Whether to capture where that is possible; ``repr`` says what was done, and why.
    """

    layers: list[FixedLayer]
    graph: StepGraph | None = None
    is_warm = False  # a first step has set up what a graph may not hold
    barrier: str | None = None  # why no step of the decoder can be captured
    obstacle: str | None = None  # why the last step was run by Python

    def __init__(self, cache: KeptCache, n_room: int, use_graph: bool):
        _check(cache, n_room)
        vars(self).update({name: value for name, value in vars(cache).items() if name != "layers"})
        self.n_room, self.n_before, self.use_graph = n_room, cache.n_seen, use_graph
        self.rooms: list[Any] = []
        self._make_layers(cache.kept_layers)

    def _make_layers(self, kept_layers: list[KeptLayer]) -> None:
        n_free = [free_slots(kept.keys.shape[2], self.n_room) for kept in kept_layers]
        self.layers = [FixedLayer(kept, n) for kept, n in zip(kept_layers, n_free, strict=True)]
        for layer, kept, n in zip(self.layers, kept_layers, n_free, strict=True):
            real = _real(self.valid, self.n_before, kept.keys.device)
            layer.room = self._room_for(layer, real_slots(kept, real, n), kept.keys.shape[2])

    def _room_for(self, layer: InPlace, visible: torch.Tensor, n_kept: int) -> Room:
        kind = layer.keys.dtype, n_kept
        for room in self.rooms:
            is_alike = type(room) is layer.kind_of_room and (room.dtype, room.n_kept) == kind
            if is_alike and _equal(room.visible, visible):
                return room
        self.rooms.append(layer.kind_of_room(visible, n_kept, layer.index, layer.keys.dtype))
        return self.rooms[-1]

    @property
    def fixed_layers(self) -> list[Any]:
        """The layers whose slots stay where they are."""
        return [layer for layer in self.layers if isinstance(layer, InPlace)]

    @property
    def n_free(self) -> int:
        """How many more tokens fit."""
        return self.n_room - (self.n_seen - self.n_before)

    def check_decoder(self, decoder: torch.nn.Module) -> None:
        """Also forget a captured step that would no longer do what the decoder does."""
        super().check_decoder(decoder)
        self.take_back()
        if self.graph is None or why_not(decoder) is not None or not self.graph.is_of(decoder):
            self.graph, self.is_warm, self.barrier = None, False, None

    def newest_of(self, mask, n_new: int) -> torch.Tensor | None:
        """Which of the tokens that a forward brings are real, bool (B, n), None for all; raises if it asks for what
        cannot be.

        Called before anything is changed. ``mask``: the forward's.
        """
        if self.layers[0].keys.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                "a fixed cache, which is written in place, was made inside torch.inference_mode and given to a forward "
                "outside of it; expected a forward inside of it, or a cache that was made outside"
            )
        if n_new > self.n_free:
            raise ValueError(
                f"{n_new} new token{'s were' if n_new > 1 else ' was'} given to a fixed cache with room for "
                f"{self.n_free} of {self.n_room}; expected a larger max_new_tokens in cache.fixed()"
            )
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            raise ValueError("attention_mask is not a padding mask (B, T); expected one, or none, for a fixed cache")
        if self.n_free == self.n_room:  # later ones are this one with new columns
            check_padding(mask, self.valid, self.n_seen)
        return mask[:, mask.shape[1] - n_new :].bool()

    def run(self, decoder, forward: Callable, args: tuple, kwargs: dict, record):
        """A forward of the decoder over this cache: by Python, or replayed.

        Parameters
        ----------
        decoder : torch.nn.Module
        forward : callable
            Its own forward, called with ``args`` and ``kwargs``.
        record : Forward
            Of this call.
        """
        self.obstacle = (why_not_this(record.bound) or self.barrier) if self.use_graph else "use_graph is False"
        if self.obstacle is None and not self.is_warm:
            self.is_warm, self.barrier = True, why_not(decoder)
            self.obstacle = self.barrier or "the first one is"
        if self.obstacle is None:
            ids, positions = record.ids, record.bound["position_ids"].expand(record.ids.shape)
            if self.graph is None or not self.graph.fits(decoder, ids):
                self.take_back()
                self.graph = StepGraph(decoder, forward, self, record)
            return self.graph(self, ids, positions, record.newest)
        self.take_back()
        return forward(*args, **kwargs)

    def begin_next(self, ids: torch.Tensor) -> None:
        """Begin the step of the tokens (B, 1) that come next, before anybody asks for it: if the one before was
        replayed, there is room, and it could be taken back, as a state or what a held budget let go could not.

        Whoever changes the cache before it is asked for takes it back.
        """
        if self.graph is None or self.obstacle is not None or not self.n_free:
            return
        has_slots = all(isinstance(x, InPlace) or holds_nothing(x) for x in self.layers)
        if has_slots and all(isinstance(x, Room) for x in self.rooms):
            self.graph.begin_next(ids)

    def take_back(self) -> None:
        """Undo a step that has begun and that nobody has asked for."""
        if self.graph is not None:
            self.graph.take_back(self)

    def __repr__(self) -> str:
        how = (
            "a step is a CUDA graph"
            if self.graph is not None
            else f"steps are run by Python: {self.obstacle or 'none came yet'}"
        )
        return f"{super().__repr__()[:-1]}, room for {self.n_free} of {self.n_room} more; {how}>"

    def __getstate__(self) -> dict:
        self.take_back()
        return {
            name: value for name, value in vars(self).items() if name not in ("graph", "is_warm")
        }  # of this cache's memory alone

    def fixed(self, max_new_tokens: int, *, use_graph: bool = True) -> "FixedCache":
        """Not twice."""
        raise ValueError("fixed was called on a fixed cache; expected the cache that it was made from")

    def save(self, path) -> None:
        """Not of a fixed cache."""
        raise ValueError("save was called on a fixed cache; expected the cache that it was made from")

    def crop(self, n: int) -> None:
        """Drop the newest ``-n`` tokens (or, n > 0, cut down to n) of those that came into the room."""
        n = int(n)
        drop = -n if n <= 0 else self.get_seq_length() - n
        if drop <= 0:
            return
        if drop > (n_came := self.n_room - self.n_free):
            raise ValueError(f"crop would drop {drop} tokens, but only the newest {n_came} came after eviction")
        self.take_back()
        for room in self.rooms:
            room.close(n_came - drop, drop)
        for layer in self.layers:
            layer.seen -= drop

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: rows move, in place."""
        self.take_back()
        with self._moving():
            for layer in self.layers:
                layer.map_in_place(lambda x: x[beam_idx.to(x.device)])
            for room in self.rooms:
                room.move(lambda x: x[beam_idx.to(x.device)])
            super()._map_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self.take_back()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices) -> None:
        """Keep some batch rows, in the given order."""
        self.take_back()
        super().batch_select_indices(indices)

    def _map_rows(self, rows: list[int]) -> None:
        super()._map_rows(rows)
        self.graph = None  # it is of the old memory
        for room in self.rooms:
            room.replace(lambda x: x[rows])


def _check(cache: KeptCache, n_room: int) -> None:
    check_whole("max_new_tokens", n_room, 1)
    if others := {i: why_not_compressed(x) for i, x in enumerate(cache.layers) if not is_kept_alone(x)}:
        raise ValueError(
            f"layers {list(others)} are not compressed, or not as a whole ({next(iter(others.values()))}); expected a "
            "cache of KeptLayers alone"
        )
    if not cache.is_in_order:
        raise ValueError(
            "the model runs some layers several times over, so that no layer is known to be the first to take a slot; "
            "expected the cache as it is"
        )
    if not cache.get_seq_length():
        raise ValueError("the cache is empty; expected one that has seen a prompt")
    if any(x.seen != (x.prompt_shape[2] if x.prompt_shape else cache.n_prompt) for x in cache.kept_layers):
        raise ValueError(
            "the cache has seen tokens after its prompt; expected fixed() to be called right after the prompt"
        )


def free_slots(n_kept: int, n_room: int) -> int:
    """Slots behind the kept ones: ``n_room`` and as many more as make 16 divide them all, which kernels of attention
    want."""
    return -(-(n_kept + n_room) // _SLOTS) * _SLOTS - n_kept


def with_room(x: torch.Tensor, n_room: int) -> torch.Tensor:
    out = x.new_zeros(*x.shape[:2], x.shape[2] + n_room, x.shape[3])
    out[:, :, : x.shape[2]] = x.detach()
    return out


def real_slots(layer: KeptLayer, real: torch.Tensor | None, n_free: int) -> torch.Tensor:
    """Bool (B, H or 1, S): the slots that hold a real token, and behind them the free ones, which do not.

    ``real``, bool (B, n_seen): which tokens are not padding; None: all.
    """
    n_row, n_head, n_slot = layer.keys.shape[:3]
    visible = layer.live
    if visible is None:
        visible = torch.ones(n_row, 1, n_slot, dtype=torch.bool, device=layer.keys.device)
    if real is not None:
        of_token = real[:, None].expand(-1, n_head, -1)
        visible = visible & (of_token if layer.pos is None else of_token.gather(2, layer.pos))
    if bool((visible == visible[:, :1]).all()):
        visible = visible[:, :1]
    return torch.cat([visible, visible.new_zeros(*visible.shape[:2], n_free)], -1)


def _real(valid, n_seen: int, device: torch.device) -> torch.Tensor | None:
    """Which tokens of a prompt are not padding, bool (B, n_seen); None: all."""
    if all(row == (0, n_seen) for row in valid or ()):
        return None
    token = torch.arange(n_seen, device=device)
    return torch.stack([(token >= begin) & (token < end) for begin, end in valid])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.shape == b.shape and bool((a == b).all())
