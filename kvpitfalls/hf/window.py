"""A sliding layer's window as slots that stay where they are: a new token takes that of the one that leaves it."""

from typing import cast

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .fixed import InPlace, Room, free_slots, with_room


class Ring(Room):
    """Slots of which the first follows the last."""

    def _next(self, n_new: int) -> torch.Tensor:
        return super()._next(n_new) % self.visible.shape[2]


class WindowLayer(InPlace, DynamicSlidingWindowLayer):
    """A sliding layer of transformers in slots of a fixed number, in the place of a growing one, ``home``, which it
    keeps.

    One token at a time: of several, the first would see less than its window. Slots are in no order once the window
    is full, which attention does not mind.

    Parameters
    ----------
    layer : DynamicSlidingWindowLayer
        That :func:`is_window` says yes of.
    index : int
        Its place in the cache.
    n_room : int
        How many tokens may follow.
    """

    kind_of_room = Ring

    def __init__(self, layer: DynamicSlidingWindowLayer, index: int, n_room: int) -> None:
        vars(self).update(vars(layer))
        keys, values = cast(torch.Tensor, layer.keys), cast(torch.Tensor, layer.values)
        self.home, self.index, self.n_slot, self.seen_before = layer, index, keys.shape[2], self.seen
        n_free = min(free_slots(self.n_slot, n_room), self.sliding_window - self.n_slot)
        self.keys, self.values = (with_room(x, n_free) for x in (keys, values))

    @property
    def seen(self) -> int:
        """The logical length."""
        return self.cumulative_length

    @seen.setter
    def seen(self, n: int) -> None:
        self.cumulative_length = n

    @property
    def live(self) -> torch.Tensor:
        """Slots that hold a token of the window (B, 1, S)."""
        return self.room.visible

    def real_slots(self, real: torch.Tensor | None) -> torch.Tensor:
        """Bool (B, 1, S): the slots that hold a real token; ``real``, bool (B, n_seen): which are not padding."""
        visible = torch.zeros(len(self.keys), 1, self.keys.shape[2], dtype=torch.bool, device=self.keys.device)
        visible[:, 0, : self.n_slot] = True if real is None else real[:, self.seen_before - self.n_slot :]
        return visible

    def grown(self, copies: bool) -> DynamicSlidingWindowLayer:
        """The growing layer, with what is in the window, in order; ``copies``: in memory of its own, as it must be once
        a token has come."""
        n_all = self.n_slot + self.seen - self.seen_before
        begin = max(n_all - self.sliding_window + 1, 0)
        if copies:
            at = torch.arange(begin, n_all, device=self.keys.device) % self.keys.shape[2]
            keys, values = (x.index_select(2, at) for x in (self.keys, self.values))
        else:
            keys, values = (x[:, :, begin:n_all] for x in (self.keys, self.values))
        vars(self.home).update(keys=keys, values=values, cumulative_length=self.seen)
        return self.home


def is_window(layer: object, layer_type: str | None) -> bool:
    """Whether it is a layer of transformers that holds what its next token sees, but for itself.

    Layers of attention to chunks are of the same class, and see less; ``layer_type``: the config's.
    """
    return (
        type(layer) is DynamicSlidingWindowLayer
        and layer_type == "sliding_attention"
        and layer.sliding_window > 1
        and not getattr(layer, "record_past", False)  # not before transformers 5.1x
        and layer.is_initialized
        and cast(torch.Tensor, layer.keys).shape[2] == min(layer.cumulative_length, layer.sliding_window - 1)
    )
