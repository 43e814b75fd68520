"""One layer's keys and values after eviction."""

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from ..errors import NotInterceptedError
from ..eviction import ops
from .threads import local

if TYPE_CHECKING:
    from ..eviction.selection import Ranked
    from .chunks import Partial
    from .forward import Forward
    from .hold import Held

UNWRAPPED = (
    "a KeptCache was given to a model that is not wrapped; expected a call inside `with kvpitfalls.wrap(model, ...)`"
)
STATES = ("conv_states", "recurrent_states")  # of linear attention, where a layer holds some
SPARE = 64  # tokens that a layer takes room for where it pays; 0: none, and every step copies the layer
_SMALL = 2**16  # bytes of keys below which a copy takes no longer than what saves it

_LAZY_TAKES_VALUES = len(inspect.signature(DynamicLayer.lazy_initialization).parameters) > 2


@dataclass(frozen=True)
class Slots:
    """What stands where in an evicted layer: ``pos``, ``live`` and ``seen`` of :class:`KeptLayer`.

    Since the last eviction ``n_after`` tokens came, which stand last and in order; they are written out only where
    somebody asks, since a decoding step of an unpadded row never does.
    """

    pos_before: torch.Tensor
    live_before: torch.Tensor | None
    n_after: int
    seen: int
    is_fixed = False  # see FixedSlots

    @property
    def pos(self) -> torch.Tensor:
        """Logical positions (B, H, S)."""
        if self.n_after == 0:
            return self.pos_before
        newest = torch.arange(self.seen - self.n_after, self.seen, device=self.pos_before.device)
        return torch.cat([self.pos_before, newest.expand(*self.pos_before.shape[:2], -1)], -1)

    @property
    def live(self) -> torch.Tensor | None:
        """Slots that hold a token (B, H, S); None: all."""
        if self.n_after == 0 or self.live_before is None:
            return self.live_before
        return torch.cat([self.live_before, self.live_before.new_ones(*self.live_before.shape[:2], self.n_after)], -1)


@dataclass
class Ticket:
    """A layer as its update left it, for the attention call that must follow; some models call attention more than once
    for one update, so eviction must not change this."""

    layer: "KeptLayer"
    keys: weakref.ref
    values: weakref.ref
    n_new: int
    n_slot: int
    n_byte: int
    slots: Slots | None
    done: bool = False


def leave_ticket(forward: "Forward", layer: "KeptLayer", n_new: int) -> None:
    """``layer`` was updated by ``n_new`` tokens; nobody asks for its attention call where nothing is done there."""
    if not forward.is_plain:
        keys, values = layer.keys, layer.values
        rows = n_new, keys.shape[2], keys.nbytes + values.nbytes
        forward.tickets[layer.index] = Ticket(layer, weakref.ref(keys), weakref.ref(values), *rows, layer.slots)


class Spare:
    """Memory that holds a layer's rows and has room for more: a step then writes one row instead of copying all.

    Attributes
    ----------
    keys, values : tensor (B, H, S + SPARE, D or Dv)
    of : tensor
        The layer's keys, the beginning of these; whatever else a layer holds is not here.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = (_with_spare(x) for x in (keys, values))
        self.of = keys

    @property
    def is_writable(self) -> bool:
        """torch refuses to write to tensors of ``inference_mode`` outside of it."""
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()


def _with_spare(x: torch.Tensor) -> torch.Tensor:
    n_row, n_head, n_slot, n_dim = x.shape
    out = x.new_empty(n_row, n_head, n_slot + SPARE, n_dim)
    out[:, :, :n_slot] = x
    return out


class KeptLayer(DynamicLayer):
    """One layer's keys and values after eviction.

    Lengths are *logical* everywhere (how many tokens were seen), so position ids, ``generate`` and the mask builder
    need not know that entries are gone. Slot ``s`` of head ``h`` holds the token at logical position ``pos[b, h, s]``.

    Attributes
    ----------
    seen : int
        Logical length.
    n_prompt : int
        How many of them were the prompt's, padding included; 0 before one came.
    pos : LongTensor (B, H, S), or None
        None: nothing was evicted and slot s holds position s.
    live : BoolTensor (B, H, S), or None
        Slots that hold a token; None: all. (A padded batch keeps different numbers of tokens in its rows.)
    shared : bool
        The model mixes heads after the cache, or caches latents, so one choice of tokens served all heads.
    """

    # None in an empty layer; who asks for them knows that it is none.
    keys: torch.Tensor
    values: torch.Tensor
    pos_before: torch.Tensor  # None while nothing was evicted
    prompt_shape: tuple[int, int, int]  # (B, H, T) of a prompt that was evicted, or whose budget is held; else None
    held: "Held"  # None while no budget is held
    judged: "Ranked | None"  # so far, while the model reads on after a prompt; else None
    partial: "Partial | None"  # what it remembers between the chunks of a prompt
    spare: "Spare | None"  # where there is room behind its rows

    is_compileable = False
    is_fixed = False  # see FixedLayer

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self._forget()

    def _forget(self) -> None:
        self.seen = self.n_prompt = 0
        self.pos_before = None  # type: ignore[assignment] # see the class
        self.live_before: torch.Tensor | None = None  # of Slots
        self.n_after = 0
        self.prompt_shape = None  # type: ignore[assignment] # see the class
        self.bytes_before = 0
        self.shared = False
        self.held = None  # type: ignore[assignment] # see the class
        self.judged = None
        self.partial = self.spare = None

    def _forward(self) -> "Forward":
        """The forward of a wrapped model that calls this layer; refused outside one, whose masks would not fit."""
        forward = local.forward
        layers = () if forward is None else forward.cache.layers
        if forward is None or self.index >= len(layers) or layers[self.index] is not self:
            raise NotInterceptedError(UNWRAPPED)
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "torch.compile is running; expected an uncompiled model, since a KeptCache changes shape"
            )
        return forward

    def update(self, key_states, value_states, *args, **kwargs):
        """Append new rows; called by the model."""
        forward = self._forward()
        if not self.is_initialized:
            self.lazy_initialization(*((key_states, value_states) if _LAZY_TAKES_VALUES else (key_states,)))
        n_new = key_states.shape[-2]
        if n_new != 1 or not self._written(key_states, value_states):
            wider = torch.promote_types(self.keys.dtype, key_states.dtype)
            if wider != key_states.dtype and not torch.is_autocast_enabled(self.keys.device.type):
                raise ValueError(
                    f"the model gives keys of {key_states.dtype}, but its cache holds {self.keys.dtype}, as the model "
                    "gave before it was changed; expected the same or a wider type, or a new cache"
                )
            self.keys = torch.cat([self.keys, key_states], -2)
            self.values = torch.cat([self.values, value_states], -2)
            self.spare = None
        self.seen += n_new
        self.n_after += n_new
        leave_ticket(forward, self, n_new)
        return self.keys, self.values

    def _written(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Write one token's rows behind the others, instead of copying all of them; False where that cannot be, or does
        not pay."""
        if not SPARE or self.keys.nbytes < _SMALL or torch.is_grad_enabled() or self.held is not None:
            return False
        both = ((self.keys, key_states), (self.values, value_states))
        if any(x.dtype != new.dtype or x.shape[:2] != new.shape[:2] for x, new in both):
            return False  # writing would round to the older type, or repeat a row, where copying promotes or refuses
        n, spare = self.keys.shape[2], self.spare
        if spare is None or spare.of is not self.keys or n == spare.keys.shape[2] or not spare.is_writable:
            spare = self.spare = Spare(self.keys, self.values)
        spare.keys[:, :, n] = key_states[:, :, 0]
        spare.values[:, :, n] = value_states[:, :, 0]
        self.keys = spare.of = spare.keys[:, :, : n + 1]
        self.values = spare.values[:, :, : n + 1]
        return True

    def __copy__(self) -> "KeptLayer":
        """A layer of its own, though of the same tensors: what comes to one is not written beside the other."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self), spare=None)
        return twin

    @property
    def slots(self) -> Slots | None:
        """What stands where; None if nothing was evicted."""
        before = self.pos_before
        return None if before is None else Slots(before, self.live_before, self.n_after, self.seen)

    @property
    def is_evicted(self) -> bool:
        """Whether anything was evicted."""
        return self.pos_before is not None

    @property
    def pos(self) -> torch.Tensor | None:
        """See the class."""
        return None if (slots := self.slots) is None else slots.pos

    @property
    def places(self) -> torch.Tensor:
        """``pos``, written out also where nothing was evicted."""
        if (pos := self.pos) is not None:
            return pos
        return torch.arange(self.seen, device=self.keys.device).expand(*self.keys.shape[:3])

    @property
    def live(self) -> torch.Tensor | None:
        """See the class."""
        return None if (slots := self.slots) is None else slots.live

    def place(self, pos: torch.Tensor, live: torch.Tensor | None) -> None:
        """Say what stands where."""
        self.pos_before, self.live_before, self.n_after = pos, live, 0

    @property
    def kept_positions(self) -> np.ndarray | None:
        """What eviction left of the prompt: int32 (B,H,K), ascending, -1 where a row holds fewer than K. None if
        nothing was evicted.

        Asked of the slots when it is wanted, since a GPU has to be waited for.
        """
        if (slots := self.slots) is None:
            return None
        mine, n_prompt = self._of_prompt(slots), self.prompt_shape[2]
        ordered = torch.where(mine, slots.pos, n_prompt).sort(-1).values[..., : int(mine.sum(-1).max())]
        return ordered.masked_fill(ordered == n_prompt, -1).int().cpu().numpy()

    @property
    def kept_counts(self) -> np.ndarray | None:
        """How many tokens of the prompt are left, (B,H). None if nothing was evicted."""
        return None if (slots := self.slots) is None else self._of_prompt(slots).sum(-1).int().cpu().numpy()

    def _of_prompt(self, slots: Slots) -> torch.Tensor:
        mine, live = slots.pos < self.prompt_shape[2], slots.live
        return mine if live is None else mine & live

    @property
    def n_byte(self) -> int:
        """Bytes of its keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def keep(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, full: bool) -> None:
        """Hold only these rows; ``positions`` int32 (B,H,K), -1 where a row keeps fewer than K, which none does if
        ``full``."""
        self.bytes_before = self.n_byte
        n_row, n_head, n_token = self.keys.shape[:3]
        self.prompt_shape = (n_row, n_head, n_token)
        self.keys, self.values = keys, values
        places = positions.to(keys.device, torch.int64)
        self.place(places if full else places.clamp(min=0), None if full else places >= 0)

    @property
    def has_plain_rows(self) -> bool:
        """Whether the core can copy rows: nobody records gradients through them, and keys and values are of one type.
        Under autocast transformers 5.24 turns keys to float32 and leaves values as they are."""
        recorded = torch.is_grad_enabled() and (self.keys.requires_grad or self.values.requires_grad)
        return not recorded and self.keys.dtype == self.values.dtype

    def evict(self, positions: torch.Tensor, full: bool) -> None:
        """Hold only the rows at these positions; see :meth:`keep`. Gradients flow through them where the prefill
        recorded any."""
        rows = ops.gather if self.has_plain_rows else _gathered
        self.keep(*rows(self.keys, self.values, positions), positions, full)

    def widened(self, n_slot: int) -> "KeptLayer":
        """This evicted layer with empty slots before its own, ``n_slot`` in all."""
        wide, n_more = copy.copy(self), n_slot - self.keys.shape[2]
        wide.keys, wide.values = (torch.nn.functional.pad(x, (0, 0, n_more, 0)) for x in (self.keys, self.values))
        pos = cast(torch.Tensor, self.pos)
        live = torch.ones_like(pos, dtype=torch.bool) if self.live is None else self.live
        wide.place(torch.nn.functional.pad(pos, (n_more, 0)), torch.nn.functional.pad(live, (n_more, 0)))
        return wide

    def rearrange(self, positions: torch.Tensor, front: torch.Tensor) -> None:
        """Hold only these slots of the present ones, int64 (B,H,K); the first ``front`` of each row are empty."""
        pos, rows = self.places, positions[..., None]
        self.keys, self.values = (x.gather(2, rows.expand(-1, -1, -1, x.shape[-1])) for x in (self.keys, self.values))
        empty = torch.arange(positions.shape[2], device=positions.device) < front.to(positions.device)[:, None]
        self.place(
            pos.gather(2, positions), None if not bool(front.any()) else ~empty[:, None].expand(*positions.shape)
        )

    def take_states(self, other: "KeptLayer") -> None:
        """Hold the states of linear attention that another has, where there are any; see :class:`.KeptHybridLayer`."""

    def settle(self) -> None:
        """Called when its budget is held again; see :class:`.held_fixed.GrowingTwin`."""

    def get_seq_length(self, *args) -> int:
        """The logical length."""
        return self.seen

    def get_mask_sizes(self, query_length):
        """Logical sizes for the mask; an int, or before transformers 5.4 the tensor of cache positions."""
        n_new = (
            query_length.shape[0] if isinstance(query_length, torch.Tensor) and query_length.ndim else int(query_length)
        )
        return self.seen + n_new, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_croppable(self) -> bool:
        """True as long as nothing was evicted, and scores do not depend on what would go."""
        return not self.is_evicted and self.held is None

    def check_crop(self, n: int) -> int:
        """How many tokens :meth:`crop` would drop; raises if it cannot."""
        n = int(n)  # transformers 5.17 gives a tensor after drafts
        drop = -n if n <= 0 else self.seen - n
        if drop <= 0 or not self.is_initialized:
            return 0
        if self.held is not None:
            raise ValueError("crop was called on a cache that holds its budget; tokens evicted since cannot come back")
        added = self.seen - (self.prompt_shape[2] if self.is_evicted else 0)
        if drop > added:
            raise ValueError(
                f"crop would drop {drop} tokens, but only the newest {added} came after eviction; the others are gone"
            )
        return drop

    def crop(self, n: int) -> None:
        """Drop the newest ``-n`` tokens (or, n > 0, cut down to n); only newest tokens that were added after eviction
        can go."""
        drop = self.check_crop(n)
        if drop <= 0:
            return
        self.keys, self.values = self.keys[..., :-drop, :], self.values[..., :-drop, :]
        pos, live = self.pos, self.live
        self.seen -= drop
        self.n_prompt = min(self.n_prompt, self.seen)
        if pos is not None:
            self.place(pos[..., :-drop], None if live is None else live[..., :-drop])

    def reset(self) -> None:
        """Empty the layer; the next prompt is compressed again."""
        self.keys = self.values = None  # type: ignore[assignment] # see the class
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx) -> None:
        """Beam search: rows move."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        """Keep some batch rows, in the given order."""
        self._map_rows(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def _map_rows(self, rows) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = rows(self.keys), rows(self.values)
        pos, live = self.pos, self.live
        if pos is not None:
            self.place(rows(pos), None if live is None else rows(live))
        if self.held is not None:
            self.held = self.held.map_rows(rows)
        if self.prompt_shape is not None:
            self.prompt_shape = (len(self.keys), *self.prompt_shape[1:])


def bare(layer: Any) -> Any:
    """A cache's layer whose keys, values and states have shapes alone."""
    twin = copy.copy(layer)  # without its spare room
    for name in {"keys", "values", *STATES} & vars(layer).keys():
        setattr(twin, name, mapped(getattr(layer, name), lambda x: torch.empty_like(x, device="meta")))
    return twin


def mapped(states: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """States of a layer, by their numbers or (before transformers 5.17) one, each as the function gives it."""
    if isinstance(states, Mapping):
        return {number: mapped(x, function) for number, x in states.items()}
    return None if states is None else function(states)


def _gathered(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`ops.gather` by torch, which can go back through it, and takes keys and values of two types."""
    places, empty = positions.long().clamp(min=0)[..., None], (positions < 0)[..., None]
    kept, of_values = (
        x.gather(2, places.expand(*places.shape[:3], x.shape[-1])).masked_fill(empty, 0) for x in (keys, values)
    )
    return kept, of_values
