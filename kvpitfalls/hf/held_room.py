"""Slots of a cache of fixed size whose budget is held: who stands where, and who goes when a token comes.

All of it is tensors that a step changes in place by operations of fixed shapes, on the device and without waiting for
it, so that a step can be captured. Who goes is who :class:`.hold.Hold` lets go of a growing cache: the new token joins,
is seen, and then the worst slot of each row that holds more than its limit is free again, of equals the newest one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from ..errors import UnsupportedModelError
from ..policies import Policy
from ..policies.h2o import H2O
from ..policies.streaming_llm import StreamingLLM
from ..policies.tova import TOVA
from .forward import AttentionCall
from .layer import KeptLayer

if TYPE_CHECKING:
    from .hold import Hold


class HeldRoom:
    """The slots of one layer, or of several that always hold the same tokens.

    Where heads always hold the same tokens, they are one head here (H is 1).

    Attributes
    ----------
    pos : IntTensor (B, H, S)
        Logical positions; -1: empty.
    stays : BoolTensor (B, H, S)
        Slots that cannot be let go: of protected tokens, and empty ones.
    bias : tensor (B, H, S)
        To be added to logits: 0, or minus infinity where a slot is empty; in the keys' dtype.
    free : LongTensor (B, H, 1)
        The empty slot that the next token takes.
    n_live : LongTensor (B, 1, 1)
        Tokens of each row.
    limit : LongTensor (B, 1, 1)
        The most that each may have after a step.
    seen : LongTensor (1,)
        Position of the next token.
    absent : BoolTensor (B, n)
        Which of the tokens since the prompt were padding.
    is_real : BoolTensor (B, 1, 1)
        Whether the newest token is none of them.
    judge : Judge
        Who scores the slots.

    Parameters
    ----------
    action : Hold
    layer : KeptLayer
        Whose budget is held; where its tokens stand is said by :meth:`fill`.
    n_slot, n_room : int
        Slots of each head, and how many tokens may come.
    last_layer : int
        The last layer of those that it serves, of which ``layer`` is the first.
    """

    def __init__(self, action: "Hold", layer: KeptLayer, n_slot: int, n_room: int, last_layer: int) -> None:
        n_row, n_head = layer.keys.shape[:2]
        self.judge = judge_of(action.policy)
        self.first_layer, self.last_layer, self.n_prompt = layer.index, last_layer, layer.held.layout.n_token
        on, shape = layer.keys.device, (n_row, 1 if self.judge.is_of_all_heads else n_head, n_slot)
        self.pos = torch.empty(shape, dtype=torch.int32, device=on)
        self.stays = torch.empty(shape, dtype=torch.bool, device=on)
        self.bias = torch.empty(shape, dtype=layer.keys.dtype, device=on)
        self.free = torch.empty(*shape[:2], 1, dtype=torch.long, device=on)
        self.n_live = torch.empty(n_row, 1, 1, dtype=torch.long, device=on)
        self.limit = action.limits_of(layer.held)[:, None, None].to(on)
        self.seen = torch.tensor([layer.seen], device=on)
        self.absent = torch.zeros(n_row, n_room, dtype=torch.bool, device=on)
        self.is_real = torch.ones(n_row, 1, 1, dtype=torch.bool, device=on)

    @property
    def visible(self) -> torch.Tensor:
        """Slots that hold a token, bool (B, H, S)."""
        return self.pos >= 0

    def fill(self, layer: KeptLayer, packed: "Packed") -> None:
        """Take over what a growing layer holds, whose budget was held since its newest tokens came."""
        held, n_head = layer.held, self.pos.shape[1]
        pos = packed(layer.places[:, :n_head])
        protected = held.shields(pos)
        live = packed.is_live[:, None].expand(pos.shape)
        self.stays.copy_(~live if protected is None else ~live | protected)
        self.pos.copy_(pos.masked_fill(~live, -1))
        self.bias.zero_().masked_fill_(~live, float("-inf"))
        self.n_live.copy_(packed.is_live.sum(1)[:, None, None])
        self.free.copy_(self.n_live.expand(self.free.shape))
        self.seen.fill_(layer.seen)
        if held.absent is not None:
            self.absent[:, : held.absent.shape[1]] = held.absent.bool()
        self.judge.fill(layer, self, packed)

    def open(self, newest: torch.Tensor | None) -> None:
        """The next token takes the free slots; ``newest``, bool (B, 1): False where it is none but padding."""
        if newest is None:
            self.is_real.fill_(True)
        else:
            self.is_real.copy_(newest[:, :, None])
            self.absent.index_copy_(1, self.seen - self.n_prompt, ~newest)
        is_real = self.is_real.expand(self.free.shape)
        self.pos.scatter_(2, self.free, torch.where(is_real, self.seen, -1).int())
        self.stays.scatter_(2, self.free, ~is_real)
        self.bias.scatter_(2, self.free, torch.where(is_real, 0.0, float("-inf")).to(self.bias.dtype))
        self.n_live += self.is_real
        self.seen += 1

    def close(self, call: AttentionCall) -> None:
        """The token was seen: the worst slot of a row that holds too many is free, else the next of those never
        taken."""
        scores = self.judge.scores(call, self).masked_fill(self.stays, torch.inf)
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN goes first
        worst = torch.where(scores == scores.amin(-1, keepdim=True), self.pos, -1).argmax(-1, keepdim=True)
        is_over = self.n_live > self.limit
        self.n_live -= is_over.long()
        # rows fill their slots in order; one that has begun to let tokens go is over its limit with each that comes
        unused = torch.where(self.is_real, self.n_live, self.free)
        self.free.copy_(torch.where(is_over, worst, unused))
        for x, empty in ((self.pos, -1), (self.stays, True), (self.bias, float("-inf"))):
            x.scatter_(2, self.free, empty)

    def move(self, rows: Callable) -> None:
        """Batch rows move, and the memory stays."""
        for part in (self, self.judge):
            for name, x in vars(part).items():
                if isinstance(x, torch.Tensor) and name != "seen":
                    x.copy_(rows(x))

    def replace(self, rows: Callable) -> None:
        """Other batch rows, in other memory."""
        for part in (self, self.judge):
            moved = {n: rows(x) for n, x in vars(part).items() if isinstance(x, torch.Tensor) and n != "seen"}
            vars(part).update(moved)


class Packed:
    """Reads what stands in a growing layer's slots, empty ones first, into the first slots of a fixed one.

    Attributes
    ----------
    is_live : BoolTensor (B, S)
    """

    def __init__(self, layer: KeptLayer, n_slot: int) -> None:
        front, slots = layer.held.front[:, None], torch.arange(n_slot, device="cpu")
        n_old, on = layer.keys.shape[2], layer.keys.device
        self.is_live = (slots < n_old - front).to(on)
        self._from = (slots + front).clamp(max=n_old - 1).to(on)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, old slots, ...) in the order of the new ones; what comes into empty ones means nothing."""
        order = self._from.view(len(x), 1, -1, *[1] * (x.ndim - 3))
        return x.gather(2, order.expand(*x.shape[:2], -1, *x.shape[3:]))


class Judge:
    """Scores slots, float32 (B, H, S), as a policy does that judges all of a row's slots in order of position."""

    is_of_all_heads = False  # heads hold the same tokens
    is_of_all_layers = False  # and so do layers

    def __init__(self, policy: Policy) -> None:
        """Of a policy of the kind that it stands for."""

    def fill(self, layer: KeptLayer, room: HeldRoom, packed: Packed) -> None:
        """Take over what a growing layer remembers."""

    def scores(self, call: AttentionCall, room: HeldRoom) -> torch.Tensor:
        """Of a step, whose token stands in the room's free slot."""
        raise NotImplementedError

    def carried(self, order: torch.Tensor) -> torch.Tensor | None:
        """What ``Held.carried`` is, of the slots in that order, LongTensor (B, H, slots)."""
        return None

    def _remember(self, **tensors: torch.Tensor) -> None:
        """Where they were before, if they were: a captured step reads and writes that memory."""
        for name, x in tensors.items():
            if name in vars(self):
                vars(self)[name].copy_(x)
            else:
                setattr(self, name, x)


class _ByPosition(Judge):
    """StreamingLLM: who is a sink is settled when a token comes, since no sink goes before a token behind it."""

    is_of_all_heads = is_of_all_layers = True
    score: torch.Tensor
    _SINK = 2**24  # above all positions; float32 tells so many apart

    def __init__(self, policy: StreamingLLM) -> None:
        self.n_sink = policy.n_sink

    def fill(self, layer: KeptLayer, room: HeldRoom, packed: Packed) -> None:
        is_sink = torch.arange(room.pos.shape[2], device=room.pos.device) < self.n_sink
        self._remember(score=torch.where(is_sink, self._SINK - room.pos, room.pos).float())

    def scores(self, call: AttentionCall, room: HeldRoom) -> torch.Tensor:
        at = room.seen - 1
        score = torch.where(room.n_live <= self.n_sink, self._SINK - at, at).float()
        return self.score.scatter_(2, room.free, score.expand(room.free.shape))


class _ByNewest(Judge):
    """TOVA: the newest token judges all others."""

    is_of_all_heads = True

    def scores(self, call: AttentionCall, room: HeldRoom) -> torch.Tensor:
        votes = attention_weights(call, room.bias).flatten(1, 2).mean(1, keepdim=True)
        return votes.scatter_(2, room.free, torch.inf)


class _BySum(Judge):
    """H2O: what slots received so far, over their age in tokens.

    Attributes
    ----------
    sums, age : tensor of float32, shape (B, H, S)
    """

    sums: torch.Tensor
    age: torch.Tensor

    def fill(self, layer: KeptLayer, room: HeldRoom, packed: Packed) -> None:
        age = packed(layer.held.ages(layer.seen, layer.places)).float()
        self._remember(sums=packed(cast(torch.Tensor, layer.held.carried)), age=age)  # a running policy's

    def scores(self, call: AttentionCall, room: HeldRoom) -> torch.Tensor:
        for x in (self.sums, self.age):
            x.scatter_(2, room.free, 0.0)
        received = attention_weights(call, room.bias).mean(2)
        self.sums += torch.where(room.is_real, received, 0.0)  # padding may be no number, nor its attention
        self.age += room.is_real
        return self.sums / self.age

    def carried(self, order: torch.Tensor) -> torch.Tensor | None:
        return self.sums.gather(2, order)


_JUDGES: dict[type[Policy], type[Judge]] = {StreamingLLM: _ByPosition, TOVA: _ByNewest, H2O: _BySum}


JUDGED = "one of " + ", ".join(repr(known.name) for known in _JUDGES)


def is_judged(policy: Policy) -> bool:
    """Whether somebody here scores slots as it does."""
    return type(policy) in _JUDGES


def judge_of(policy: Policy) -> Judge:
    """Who scores slots as a policy does."""
    return _JUDGES[type(policy)](policy)


def attention_weights(call: AttentionCall, bias: torch.Tensor) -> torch.Tensor:
    """What the newest query attends to: float32 (B, H, G, S), of each query head of each key head."""
    if call.softcap or call.sinks is not None:
        raise UnsupportedModelError(
            "attention with a softcap or with sinks was called on a fixed cache that holds its budget by attention; "
            "expected a growing cache"
        )
    n_row, n_head, n_slot = call.keys.shape[:3]
    rows = call.queries.reshape(n_row, n_head, -1, call.keys.shape[3])
    logits = _products(rows.flatten(0, 1), call.keys.flatten(0, 1)).view(n_row, n_head, -1, n_slot)
    return torch.add(bias[:, :, None], logits, alpha=call.scaling).softmax(-1)


def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Float32 (N, G, S) of (N, G, D) and (N, S, D), not rounded to a shorter type on the way."""
    if keys.is_cuda and keys.dtype == rows.dtype != torch.float32 and _TELLS_TYPE:
        return torch.bmm(rows, keys.transpose(1, 2), out_dtype=torch.float32)  # reads keys as they are
    return rows.float() @ keys.float().transpose(1, 2)


_TELLS_TYPE = torch.__version__ >= "2.8"  # torch.bmm takes out_dtype
