"""Decoding on a cache of fixed size whose budget is held: each new token takes the slot of one that went."""

from dataclasses import replace
from typing import cast

import torch

from .fixed import FixedCache, FixedLayer, free_slots
from .forward import AttentionCall
from .held_room import JUDGED, HeldRoom, Packed, is_judged, judge_of
from .hold import Hold
from .layer import KeptLayer, leave_ticket
from .masks import real_newest


class HeldLayer(FixedLayer):
    """A :class:`.FixedLayer` with a slot more than its budget, in which the new token joins before another one goes.

    Several tokens at once come to a growing twin of it, whose budget is held as ever and which it then takes over.
    """

    room: HeldRoom

    def __init__(self, layer: KeptLayer, n_slot: int):
        KeptLayer.__init__(self, layer.index)
        vars(self).update({name: x for name, x in vars(layer).items() if name not in ("keys", "values", "spare")})
        self.keys, self.values = (
            x.new_empty(*x.shape[:2], n_slot, x.shape[3], requires_grad=False) for x in (layer.keys, layer.values)
        )

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token's row into the free slot, or give several to a growing twin; called by the model."""
        forward = self._forward()
        if key_states.shape[-2] > 1:
            return GrowingTwin(self).update(key_states, value_states, *args, **kwargs)
        if self.room.first_layer == self.index:
            self.room.open(forward.newest)
        at = self.room.free[..., None].expand(-1, key_states.shape[1], -1, -1)
        for x, new in ((self.keys, key_states), (self.values, value_states)):
            x.scatter_(2, at.expand(-1, -1, -1, x.shape[3]), new.to(x.dtype))
        self.seen += 1
        leave_ticket(forward, self, 1)
        return self.keys, self.values

    def after_step(self, call: AttentionCall) -> None:
        """One token was seen: one is let go."""
        if self.room.last_layer == self.index:
            self.room.close(call)

    def take_over(self, layer: KeptLayer) -> None:
        """Hold what a growing layer holds."""
        self.seen, self.held = layer.seen, layer.held
        packed = Packed(layer, self.keys.shape[2])
        for x, rows in ((self.keys, layer.keys), (self.values, layer.values)):
            x.copy_(packed(rows.detach()))
        if self.room.last_layer == self.index:  # those before it ask until then where their own tokens stood
            self.room.fill(layer, packed)

    @property
    def is_evicted(self) -> bool:
        """Its slots are in no order."""
        return True

    @property
    def live(self) -> torch.Tensor:
        """Slots that hold a token (B, H, S)."""
        return self.room.visible.expand(self.keys.shape[:3])

    @property
    def pos(self) -> torch.Tensor:
        """Logical positions (B, H, S); 0 for empty slots."""
        return self.room.pos.long().clamp(min=0).expand(self.keys.shape[:3])

    def map_in_place(self, rows) -> None:
        """Rows move and the memory stays, so a captured step stays right."""
        for x in (self.keys, self.values):
            x.copy_(rows(x))
        self.held = self.held.map_rows(rows)

    def _map_rows(self, rows) -> None:
        self.keys, self.values, self.held = rows(self.keys), rows(self.values), self.held.map_rows(rows)
        self.prompt_shape = (len(self.keys), *self.prompt_shape[1:])


class GrowingTwin(KeptLayer):
    """What a held layer of fixed size holds, as a growing layer, for one forward of several tokens."""

    def __init__(self, home: HeldLayer):
        super().__init__(home.index)
        vars(self).update({name: x for name, x in vars(home).items() if name not in ("room", "keys", "values")})
        room, n_head = home.room, home.keys.shape[1]
        n_live = room.n_live.flatten().cpu()
        n_slot = int(n_live.max())
        order = room.pos.argsort(-1)[..., room.pos.shape[2] - n_slot :]  # empty slots first
        self.home, front = home, n_slot - n_live
        carried, n_came = room.judge.carried(order), home.seen - room.n_prompt
        absent = room.absent[:, :n_came].long().cpu()
        self.held = replace(home.held, front=front, carried=carried, absent=absent)
        order = order.expand(-1, n_head, -1)
        self.keys, self.values = (
            x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in (home.keys, home.values)
        )
        live = home.live.gather(2, order) if bool(front.any()) else None
        self.place(home.pos.gather(2, order), live)

    def _forward(self):
        return self.home._forward()

    def settle(self) -> None:
        """Its layer takes over what is left."""
        self.home.take_over(self)


class HeldFixedCache(FixedCache):
    """A :class:`.FixedCache` whose budget is held: its memory does not depend on how many tokens may come."""

    def _make_layers(self, kept_layers: list[KeptLayer]) -> None:
        if (why := why_not_held(cast(Hold, self.action), kept_layers)) is not None:
            raise ValueError(why)
        self.layers = list(held_layers(self, kept_layers, self.n_room))

    def newest_of(self, mask, n_new: int) -> torch.Tensor | None:
        """As of a :class:`.FixedCache`; several tokens go the way of a growing cache."""
        newest = super().newest_of(mask, n_new)
        return newest if n_new == 1 else real_newest(mask, n_new)

    def crop(self, n: int) -> None:
        """Not of a held budget."""
        self.layers[0].check_crop(n)


def held_layers(cache: FixedCache, kept_layers: list[KeptLayer], n_room: int, kind=HeldLayer) -> list[HeldLayer]:
    """Layers of a fixed size that hold what growing ones do, and the budget from now on, with rooms of the cache."""
    action, first = cast(Hold, cache.action), kept_layers[0]
    n_slot = _n_slot(action, first, n_room)
    layers = [kind(layer, n_slot) for layer in kept_layers]
    is_shared, n_came = judge_of(action.policy).is_of_all_layers, first.seen - first.held.layout.n_token
    for layer, kept in zip(layers, kept_layers, strict=True):
        if not (is_shared and cache.rooms):
            last = kept_layers[-1] if is_shared else kept
            cache.rooms.append(HeldRoom(action, kept, n_slot, n_came + n_room, last.index))
        layer.room = cache.rooms[-1]
    for layer, kept in zip(layers, kept_layers, strict=True):
        layer.take_over(kept)
    return layers


def why_not_held(action: Hold, kept_layers: list[KeptLayer]) -> str | None:
    """Why a budget cannot be held at a fixed size; None if it can."""
    expects = "a fixed cache that holds its budget expects"
    if action.when != "always":
        return f"when is {action.when!r}; {expects} 'always'"
    if action.is_fair or action.fair.min_tokens:
        return f"fair is {action.fair.label!r}; {expects} False, since shares move with each token, or a growing cache"
    if shared := [layer.index for layer in kept_layers if layer.shared]:
        return (
            f"layers {shared} make one choice for all heads, by keys that the model makes of the cache's; {expects} "
            "heads that are cached as they are, or a growing cache"
        )
    return (
        None
        if is_judged(action.policy)
        else f"policy is {action.policy.name!r}; {expects} {JUDGED}, or a growing cache"
    )


def _n_slot(action: Hold, layer: KeptLayer, n_room: int) -> int:
    """A slot more than any row will have tokens."""
    held = layer.held
    n_live = layer.keys.shape[2] - held.front
    most = int(torch.minimum(action.limits_of(held), n_live + n_room).max())
    return most + free_slots(most, 1)
