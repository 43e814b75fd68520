"""Holding a budget: after every forward that follows the prompt, a layer is cut to the budget again.

All of it happens in *slots*: the rows a layer holds, oldest first, empty ones (of rows that hold fewer) before them. A
policy scores slots as it scores the tokens of a prompt. Fair: each instruction is judged by its own tokens only, so its
scores are those of the prefill; what came after the prompt is a segment of its own, and all segments share the budget
in proportion to the tokens they ever had. With a floor and strength 0 the policy judges all slots, but the best of each
instruction come first. Protection is of the prompt's tokens. Padding between the prompt and a question is no token: its
slots become empty ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from ..errors import BudgetError
from ..eviction import ops
from ..eviction.allocation import UNIFORM, get_allocation
from ..eviction.arrays import as_torch
from ..eviction.budget import apportion, kept_tokens
from ..eviction.layout import Layout, Split
from ..eviction.selection import check_room, rank
from ..policies import Vote
from .evict import Evict
from .forward import AttentionCall
from .layer import KeptLayer
from .slot_scores import best_first, inputs_of, over_heads, received

if TYPE_CHECKING:
    from .held_fixed import HeldLayer


@dataclass(frozen=True)
class Held:
    """What a layer remembers while its budget is held.

    Attributes
    ----------
    front : LongTensor (B,)
        Empty slots at the start of each row.
    counts : LongTensor (B, S)
        Slots of each prompt segment, the same for all heads; fair only.
    carried : tensor float32 (B, H, slots), or None
        Fair: scores of the prompt's slots. A running policy: attention received so far, for the other slots.
    queries : tensor (B, Hq, W, D), or None
        The newest, as many as the policy reads.
    rows : LongTensor (B,)
        The prompt each row came from.
    layout : Layout
        Of the prompts.
    absent : LongTensor (B, n), or None
        1 where one of the n tokens since the prompt was padding; None: nowhere.
    """

    front: torch.Tensor
    counts: torch.Tensor
    carried: torch.Tensor | None
    queries: torch.Tensor | None
    rows: torch.Tensor
    layout: Layout
    absent: torch.Tensor | None = None

    def map_rows(self, rows: Callable) -> "Held":
        """Move batch rows."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **{name: rows(x) for name, x in tensors.items()})

    def then(self, n_seen: int, n_new: int, newest: torch.Tensor | None) -> "Held":
        """With ``n_new`` tokens more, of which ``newest`` are real."""
        if self.absent is None and newest is None:
            return self
        before = (
            torch.zeros(len(self.rows), n_seen - n_new - self.layout.n_token, dtype=torch.long, device="cpu")
            if self.absent is None
            else self.absent
        )
        new = torch.zeros(len(self.rows), n_new, dtype=torch.long, device="cpu") if newest is None else (~newest).long()
        return replace(self, absent=torch.cat([before, new], 1))

    def n_came(self, n_seen: int) -> list[int]:
        """How many tokens came after each row's prompt."""
        absent = torch.zeros(len(self.rows), 1, dtype=torch.long, device="cpu") if self.absent is None else self.absent
        return (n_seen - self.layout.n_token - absent.sum(1)).tolist()

    def ages(self, n_seen: int, pos: torch.Tensor) -> torch.Tensor:
        """How many tokens came since those at ``pos`` (B, H, S), themselves included."""
        ages = n_seen - pos
        if self.absent is not None:
            since = self.absent.flip(1).cumsum(1).flip(1).to(pos.device)
            place = (pos - self.layout.n_token).clamp(min=0)
            ages = ages - since[:, None].expand(-1, pos.shape[1], -1).gather(2, place)
        return ages.clamp(min=1)  # of empty slots

    def shields(self, pos: torch.Tensor) -> torch.Tensor | None:
        """Which of the tokens at ``pos`` (B, H, S) are protected, bool; None: no token is."""
        if (mask := self.layout.mask) is None:
            return None
        of_rows = torch.from_numpy(mask).bool()[self.rows].to(pos.device)
        shielded = torch.nn.functional.pad(of_rows, (0, 1))  # one more column, for all that came later
        return shielded[:, None].expand(*pos.shape[:2], -1).gather(2, pos.clamp(max=self.layout.n_token))

    @property
    def starts(self) -> torch.Tensor:
        """Per row, the first slot that is not judged by what is carried: after the prompt if fair, else the first
        one."""
        return self.front + self.counts.sum(-1)


@dataclass(frozen=True)
class Hold(Evict):
    """A cache's action: hold the budget while generating; ``when="always"`` compresses the prompt first."""

    when: str = "always"
    holds = True

    def __post_init__(self):
        super().__post_init__()
        if self.allocation != UNIFORM:
            is_its_own = get_allocation(self.policy.allocation) == self.allocation
            whose = f" of policy {self.policy.name!r}" if is_its_own else ""
            raise ValueError(
                f"allocation{whose} is {self.allocation!r}; when={self.when!r} expects 'uniform', since the budget is "
                "held anew each step"
            )
        if self.fair.strength not in (0, 1) or (self.is_fair and self.fair.rule != "proportional"):
            raise ValueError(
                f"fair is {self.fair.label!r}; when={self.when!r} expects False, True, 'floor=M', or a Fair of "
                "strength 0 or 1 without "
                "rule='paper'"
            )
        if not self.policy.holds:
            raise ValueError(
                f"policy is {self.policy.name!r}, which judges a prompt that is whole; when={self.when!r} expects "
                "another"
            )
        if self.policy.needs_queries and not (self.policy.recent_queries or self.policy.running):
            raise ValueError(
                f"policy {self.policy.name!r} reads queries but states no recent_queries; when={self.when!r} keeps as "
                "many as it states"
            )

    @property
    def is_fair(self) -> bool:
        """Whether segments have quotas."""
        return self.fair.strength > 0

    def limit(self, n_token: int) -> int:
        """Budget of a row whose prompt has ``n_token`` real tokens."""
        return self.budget if self.budget is not None else kept_tokens(n_token, self.compression_ratio)

    def limits_of(self, held: Held) -> torch.Tensor:
        """The same of each row, LongTensor (B,)."""
        valid = held.layout.valid
        return torch.tensor([self.limit(valid[row][1] - valid[row][0]) for row in held.rows.tolist()], device="cpu")

    def waits(self, layer: KeptLayer) -> bool:
        """True for when="decode" until a later forward."""
        return self.when == "decode" and layer.seen == layer.prompt_shape[2]

    def check_chunks(self) -> None:
        """Not of a held budget."""
        raise ValueError(
            f"prefill_chunk_size was given, but when={self.when!r} takes a prompt as a whole; expected none, or "
            "when='prefill'"
        )

    def spans_of(self, n_token: int, valid: Sequence[tuple[int, int]], n_layer: int) -> list:
        """As for :class:`Evict`; there must also be room for the newest token, and for the window of a policy that has
        one."""
        if any(end != n_token for _, end in valid):
            raise ValueError(f"the prompts are padded on the right; when={self.when!r} expects padding on the left")
        task = self.task(n_token, valid, n_layer)
        split = task.split
        for b, (begin, end) in enumerate(valid):
            floors = sum(split.floors[b])
            needed = floors + (1 if self.is_fair else max(1, self.policy.recent_queries))
            if floors and self.limit(end - begin) < needed:
                raise BudgetError(
                    f"the budget of row {b} is {self.limit(end - begin)} tokens; when={self.when!r} expects at least "
                    f"{needed}: "
                    f"{floors} that must be kept, and {needed - floors} newest"
                )
        _ = split.segments  # raises where fairness has none to give
        check_room(self.policy, split, task.budgets)
        return list(split.layout.spans)

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """After the prompt's prefill."""
        n_row, _, n_token = call.keys.shape[:3]
        split = self.task(n_token, call.valid, call.n_layer).split
        fronts = torch.tensor([begin for begin, _ in call.valid], device="cpu")
        counts, carried = torch.zeros(n_row, 0, dtype=torch.long, device="cpu"), None
        if self.is_fair:
            segments = split.segments
            counts = torch.zeros(n_row, max(map(len, segments)), dtype=torch.long, device="cpu")
            for b, row in enumerate(segments):
                counts[b, : len(row)] = torch.tensor([end - begin for begin, end in row], device="cpu")
            carried = as_torch(rank(self.policy, split, call).scores)
        elif self.policy.running:
            carried = received(call, fronts, _votes_on(fronts, [n_token] * n_row, n_token))
        n_recent = self.policy.recent_queries
        layer.prompt_shape, layer.bytes_before = (
            (n_row, layer.keys.shape[1], n_token),
            layer.keys.nbytes + layer.values.nbytes,
        )
        queries = call.queries[:, :, -n_recent:].clone() if n_recent else None
        layer.held = Held(fronts, counts, carried, queries, torch.arange(n_row, device="cpu"), split.layout)
        if self.when == "always":
            self._cut(layer, call)

    def after_step(self, layer: KeptLayer, call: AttentionCall) -> None:
        """After a later forward."""
        if layer.is_fixed:
            cast("HeldLayer", layer).after_step(call)
            return
        n_new = call.queries.shape[2]
        held = layer.held.then(layer.seen, n_new, call.newest)
        if held.carried is not None:
            held = replace(held, carried=torch.nn.functional.pad(held.carried, (0, n_new)))
        if held.queries is not None:
            held = replace(held, queries=_newest_queries(held.queries, call, self.policy.recent_queries))
        layer.held = held
        n_real = [n_new] * len(held.rows) if call.newest is None else call.newest.sum(1).tolist()
        if call.newest is not None:
            call = _without_padding(layer, call, call.newest)
        held = layer.held
        if self.policy.running and held.carried is not None:
            votes = _votes_on(held.starts, n_real, layer.keys.shape[2])
            layer.held = replace(held, carried=held.carried + received(call, held.front, votes))
        self._cut(layer, call)
        layer.settle()

    def _cut(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Down to the budget."""
        held, n_slot = layer.held, layer.keys.shape[2]
        n_kept = torch.minimum(n_slot - held.front, self.limits_of(held))
        if bool((n_kept == n_slot - held.front).all()) and not bool(held.front.all()):
            return
        edges = torch.cat(
            [
                held.front[:, None],
                held.front[:, None] + held.counts.cumsum(-1),
                torch.full_like(held.front[:, None], n_slot),
            ],
            1,
        )
        quotas = self._quotas(layer, n_kept.tolist()) if self.is_fair else n_kept[:, None]
        scores = self._scores(layer, call)
        of_rows = np.stack([held.front.numpy(), np.full(len(n_kept), n_slot)], 1)
        slots, _ = ops.select(scores, quotas.numpy(), segments=edges.numpy(), valid=of_rows)
        front = slots.shape[2] - n_kept
        place = (
            (torch.arange(slots.shape[2], device="cpu") - front[:, None]).clamp(min=0).to(slots.device)
        )  # select puts the empty ones last
        slots = slots.long().gather(2, place[:, None].expand_as(slots))
        carried = None if held.carried is None else held.carried.gather(2, slots[:, : held.carried.shape[1]])
        layer.held = replace(held, front=front, counts=quotas[:, :-1] if self.is_fair else held.counts, carried=carried)
        layer.rearrange(slots.expand(-1, layer.keys.shape[1], -1), front)

    def _quotas(self, layer: KeptLayer, n_kept: list[int]) -> torch.Tensor:
        """Slots per segment (B, S+1), the last for what came after the prompt; a segment gets no more than it still
        has. All layers of a step hold the same numbers of slots, so the first of them asks for all."""
        split = layer.held.layout.split(self.fair)
        rows = list(_segments(layer, split))
        asked, quotas = split.made.get("held", (None, None))
        if asked != (n_kept, rows):
            shares = [_shares(segments, total) for segments, total in zip(rows, n_kept, strict=True)]
            quotas = torch.tensor(shares, device="cpu")
            split.made["held"] = (n_kept, rows), quotas
        return quotas

    def _scores(self, layer: KeptLayer, call: AttentionCall) -> torch.Tensor:
        """Of each slot (B, H, slots); protected ones above all."""
        held, n_slot, pos = layer.held, layer.keys.shape[2], layer.places
        starts, carried = held.starts, cast(torch.Tensor, held.carried)  # None only where it is not asked for
        if self.policy.running:
            scores = carried / held.ages(layer.seen, pos[:, : carried.shape[1]])
        elif bool((starts == n_slot).all()):  # fair, and nothing after the prompt yet
            scores = carried
        else:
            valid = [(front, n_slot) for front in held.front.tolist()]
            queries = None if held.queries is None else held.queries[:, :, -n_slot:]
            inputs = inputs_of(call, queries, valid, [[(start, n_slot)] for start in starts.tolist()])
            scores = over_heads(as_torch(self.policy.scored(inputs)), call)
        if self.is_fair:
            of_prompt = torch.arange(n_slot, device=scores.device) < starts.to(scores.device)[:, None, None]
            scores = torch.where(of_prompt, carried, scores)
        pos = pos[:, : scores.shape[1]]
        if (shielded := held.shields(pos)) is not None:
            scores = scores.masked_fill(shielded, torch.inf)
        return scores if self.is_fair or not self.fair.min_tokens else self._with_floors(scores, pos, held)

    def _with_floors(self, scores: torch.Tensor, pos: torch.Tensor, held: Held) -> torch.Tensor:
        """The best of each instruction above all, as many as its floor says."""
        split = held.layout.split(self.fair)
        edges, floors = (torch.tensor(x, device="cpu")[held.rows] for x in (split.edges, split.floors_array))
        return best_first(scores, pos, held.front, edges, floors)


class _Segment(NamedTuple):
    """One of a row's: how many tokens it had in all and still has, and what is its due."""

    n_had: int
    n_has: int
    weight: float | Fraction
    floor: int
    is_unmarked: bool


def _segments(layer: KeptLayer, split: Split) -> Iterator[list[_Segment]]:
    """Each row's, the last of them what came after the prompt."""
    held, n_slot = layer.held, layer.keys.shape[2]
    of_rows = (held.rows.tolist(), held.front.tolist(), held.counts.tolist(), held.n_came(layer.seen))
    for row, front, counts, n_came in zip(*of_rows, strict=True):
        n = len(split.segments[row])
        facts = zip(
            split.segments[row], counts[:n], split.weights[row], split.floors[row], split.names[row], strict=True
        )
        of_prompt = [
            _Segment(end - begin, n_has, weight, floor, name is None)
            for (begin, end), n_has, weight, floor, name in facts
        ]
        absent = [_Segment(0, n_has, 0, 0, False) for n_has in counts[n:]]  # other rows have more segments
        n_later = n_slot - front - sum(counts)
        yield [*of_prompt, *absent, _Segment(n_came, n_later, 1, min(1, n_later), True)]  # the newest token stays


def _shares(segments: list[_Segment], total: int) -> list[int]:
    """Slots of each segment of a row."""
    rates = [Fraction(x.weight) * x.n_had / x.n_has if x.n_has else 0 for x in segments]
    _, n_has, _, floors, unmarked = zip(*segments, strict=True)
    return apportion(total, n_has, rates, floors, unmarked)


def _votes_on(starts: torch.Tensor, n_new: list[int], n_slot: int) -> list[list[Vote]]:
    """Each row's newest queries, ``n_new`` of them, on the slots from ``starts`` on."""
    return [
        [Vote(keys=(start, n_slot), queries=(n_slot - n, n_slot), weight="sum")] if n else []
        for start, n in zip(starts.tolist(), n_new, strict=True)
    ]


def _without_padding(layer: KeptLayer, call: AttentionCall, newest: torch.Tensor) -> AttentionCall:
    """The slots of new tokens that are padding become empty ones, before the others; the call as if it had been made
    so."""
    held, n_slot = layer.held, layer.keys.shape[2]
    older = torch.arange(n_slot - call.queries.shape[2], device="cpu") >= held.front[:, None]
    order = _empty_first(torch.cat([older, newest], 1))
    front = held.front + (~newest).sum(1)
    layer.rearrange(order[:, None].expand(-1, layer.keys.shape[1], -1).to(layer.keys.device), front)
    carried = None if held.carried is None else _rearranged(held.carried[..., None], order)[..., 0]
    layer.held = replace(held, front=front, carried=carried)
    of_slots = {"keys": _rearranged(call.keys, order), "values": _rearranged(call.values, order)}
    return replace(call, **of_slots, queries=_rearranged(call.queries, _empty_first(newest)))


def _newest_queries(queries: torch.Tensor, call: AttentionCall, n_recent: int) -> torch.Tensor:
    """The newest ``n_recent`` of those before and the call's; padding counts as older than any."""
    both = torch.cat([queries, call.queries], 2)
    if call.newest is not None:
        both = _rearranged(both, _empty_first(torch.nn.functional.pad(call.newest, (queries.shape[2], 0), value=True)))
    return both[:, :, -n_recent:]


def _empty_first(real: torch.Tensor) -> torch.Tensor:
    """The order (B, S) that puts what is not ``real`` first and changes no other."""
    return real.long().argsort(dim=1, stable=True)


def _rearranged(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) in the order (B, S)."""
    return x.gather(2, order[:, None, :, None].to(x.device).expand(-1, x.shape[1], -1, x.shape[3]))
