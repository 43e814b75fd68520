"""Evicting between the chunks of a prompt, so that no layer ever holds the whole of it.

What is kept of each segment in the end is known before the first chunk: its quota. Of a segment whose first ``a`` of
``n`` tokens have come, ``ceil(quota * a / n)`` are held after the chunk, and never less than what is protected or a
floor. So an instruction that has come holds its quota and loses nothing more, the last chunk leaves what a prefill at
once leaves, and a row never holds more than its share of the tokens so far (a token more for each segment at most, and
all of a beginning that is due nothing) and one chunk.

All of it happens in *slots*: the rows a layer holds, oldest first, empty ones before them. A policy judges the slots of
the segments that have tokens in the chunk: these alone can lose any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch

from ..eviction import ops
from ..eviction.allocation import Allocation
from ..eviction.arrays import as_torch
from ..eviction.fairness import Fair
from ..eviction.layout import Layout
from ..policies import Policy, Vote
from .forward import AttentionCall
from .layer import KeptLayer
from .slot_scores import best_first, inputs_of, over_heads, received


@dataclass(frozen=True)
class Partial:
    """What a layer remembers between chunks.

    Attributes
    ----------
    received : tensor float32 (B, H, slots), or None
        Of a running policy: attention that each slot received so far.
    queries : tensor (B, Hq, W, D), or None
        The newest, as many as the policy reads.
    """

    received: torch.Tensor | None
    queries: torch.Tensor | None


class Stage(NamedTuple):
    """How far a prompt has come: tokens of each segment that came, and those held after the cut, int32 (B, S)."""

    came: np.ndarray
    held: np.ndarray


def check_chunks(policy: Policy, fair: Fair, allocation: Allocation) -> None:
    """Raise ValueError unless quotas and scores can be told before a prompt has come as a whole."""
    if not policy.in_chunks:
        raise ValueError(
            f"policy is {policy.name!r}, which judges a prompt that is whole; prefill_chunk_size expects another"
        )
    if policy.needs_rotary:
        raise ValueError(
            f"policy is {policy.name!r}, which asks where in the prompt each key stands; prefill_chunk_size expects "
            "another"
        )
    if policy.needs_queries and not (policy.recent_queries or policy.running):
        raise ValueError(
            f"policy {policy.name!r} reads queries but states no recent_queries; prefill_chunk_size keeps as many as "
            "it states"
        )
    if allocation.shares_heads:
        raise ValueError(
            f"allocation is {allocation!r}, whose shares depend on the whole prompt; prefill_chunk_size expects "
            "'uniform' or 'pyramid'"
        )
    if fair.strength not in (0, 1) or (fair.strength > 0 and fair.rule != "proportional"):
        raise ValueError(
            f"fair is {fair.label!r}, whose quotas depend on the whole prompt; prefill_chunk_size expects False, True, "
            "'floor=M', or a Fair of strength 0 or 1 without rule='paper'"
        )


def cut(
    layer: KeptLayer, call: AttentionCall, policy: Policy, fair: Fair, layout: Layout, budgets: tuple[int, ...]
) -> None:
    """Evict from a layer after a chunk.

    Parameters
    ----------
    layer : KeptLayer
        After its update.
    call : AttentionCall
    policy, fair
    layout : Layout
        Of the whole prompts.
    budgets : tuple of int
        Tokens that each row keeps of its whole prompt in this layer.
    """
    n_new = call.queries.shape[2]
    stages = [_stage_at(layout, fair, budgets, n) for n in (layer.seen - n_new, layer.seen)]
    cut_to(layer, call, policy, fair, layout, *stages)


def cut_to(
    layer: KeptLayer, call: AttentionCall, policy: Policy, fair: Fair, layout: Layout, before: Stage, now: Stage
) -> None:
    """:func:`cut` from what was held before the chunk to what is to be held after it, of the segments that
    have quotas."""
    n_slot = layer.keys.shape[2]
    sizes = before.held + now.came - before.came
    front = torch.from_numpy(n_slot - sizes.sum(-1))
    scored = _Slots(layer, call, policy, _edges(n_slot, sizes), now.came > before.came)
    scores, sums = scored.judged(_ends(layout, fair, now))
    slots = None
    if now.held.sum() and (now.held.sum(-1) != n_slot).any():
        scores = _with_protection(scores, scored.pos, layout)
        if fair.min_tokens and not fair.strength:
            scores = best_first(scores, scored.pos[:, : scores.shape[1]], front, *_floors_at(layout, fair, layer.seen))
        slots = _keep(layer, scores, scored, now, layout.n_token)
    is_last = layer.seen == layout.n_token
    layer.partial = None if is_last else _remembered(layer.partial, call, policy, sums, slots)


def _stage_at(layout: Layout, fair: Fair, budgets: tuple[int, ...], n_seen: int) -> Stage:
    """After ``n_seen`` tokens, padding included; the same for every layer of that budget."""
    made, key = layout.split(fair).made, ("stage", budgets, n_seen)
    if key not in made:
        made[key] = _stage(layout, fair, budgets, n_seen)
    return made[key]


def _stage(layout: Layout, fair: Fair, budgets: tuple[int, ...], n_seen: int) -> Stage:
    segments = _shared_out(layout, fair)
    quotas = np.array(budgets)[:, None] if not fair.strength else layout.split(fair).quotas(budgets)
    came, held = np.zeros(quotas.shape, np.int32), np.zeros(quotas.shape, np.int32)
    for row, (of_row, least) in enumerate(zip(segments, _least(layout, fair, n_seen), strict=True)):
        for i, (begin, end) in enumerate(of_row):
            a, n = min(max(n_seen - begin, 0), end - begin), max(1, end - begin)
            came[row, i], held[row, i] = a, min(a, max(-(-int(quotas[row, i]) * a // n), least[i]))
        if not held[row].any():  # a layer holds something, and what others hold is not this row's affair
            held[row] = came[row]
    return Stage(came, held)


def _shared_out(layout: Layout, fair: Fair) -> list[list[tuple[int, int]]]:
    """Per row, the segments that have quotas; one without fairness, or where it is a floor."""
    return layout.split(fair).segments if fair.strength else [[row] for row in layout.valid]


def _least(layout: Layout, fair: Fair, n_seen: int) -> list[list[int]]:
    """Per row, tokens of each of these segments that must be held after ``n_seen``: those protected, and floors."""
    if not fair.min_tokens:
        return [
            [
                int(np.diff(np.searchsorted(protected, [begin, max(begin, min(end, n_seen))]))[0])
                for begin, end in of_row
            ]
            for of_row, protected in zip(_shared_out(layout, fair), layout.protected, strict=True)
        ]
    floors = _floors_at(layout, fair, n_seen)[1]
    return floors.tolist() if fair.strength else floors.sum(1, keepdim=True).tolist()


def _floors_at(layout: Layout, fair: Fair, n_seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges (B, S+1) of the instructions that have floors, in tokens, and how many of each must be held after
    ``n_seen`` (B, S)."""
    edges = layout.split(fair).edges
    named = [[name is not None for name in row] for row in layout.split(fair).names]
    floors = torch.zeros(len(edges), edges.shape[1] - 1, dtype=torch.int32, device="cpu")
    for b, (row, protected) in enumerate(zip(named, layout.protected, strict=True)):
        for i, is_named in enumerate(row):
            begin, end = int(edges[b, i]), max(int(edges[b, i]), min(int(edges[b, i + 1]), n_seen))
            shielded = int(np.diff(np.searchsorted(protected, [begin, end]))[0])
            floors[b, i] = max(shielded, min(fair.min_tokens, end - begin) if is_named else 0)
    return torch.tensor(edges, device="cpu"), floors


def _edges(n_slot: int, sizes: np.ndarray) -> np.ndarray:
    """Slots where segments of these sizes begin and end, which stand last: int32 (B, S+1)."""
    begins = n_slot - sizes.sum(-1, keepdims=True)
    return np.concatenate([begins, begins + sizes.cumsum(-1)], 1).astype(np.int32)


def _ends(layout: Layout, fair: Fair, now: Stage) -> np.ndarray:
    """Per segment, the token after the last one that came (B, S)."""
    begins = np.zeros(now.came.shape, np.int64)
    for row, of_row in zip(begins, _shared_out(layout, fair), strict=True):
        row[: len(of_row)] = [begin for begin, _ in of_row]
    return begins + now.came


class _Slots:
    """The slots of a layer after a chunk: where segments are, and which of them are judged.

    Parameters
    ----------
    edges : int32 (B, S+1)
    is_open : bool (B, S)
        Segments that have tokens in the chunk.
    """

    def __init__(
        self, layer: KeptLayer, call: AttentionCall, policy: Policy, edges: np.ndarray, is_open: np.ndarray
    ) -> None:
        self.call, self.policy, self.edges, self.partial = call, policy, edges, layer.partial
        n_slot = self.n_slot = layer.keys.shape[2]
        # A row of padding alone has no slot; its last one is judged and never kept.
        self.valid = [(min(int(begin), n_slot - 1), n_slot) for begin in edges[:, 0]]
        self.segments = [
            [(int(row[i]), int(row[i + 1])) for i in np.flatnonzero(of_row)] or [(n_slot - 1, n_slot)]
            for row, of_row in zip(edges, is_open, strict=True)
        ]
        self.pos = layer.places

    def judged(self, ends: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores (B, H, slots) and, of a running policy, the sums that they come from; ``ends``: see _ends."""
        if self.policy.running:
            sums = self._received()
            pos = self.pos[:, : sums.shape[1]]
            return sums / (self._per_slot(ends).to(pos.device)[:, None] - pos).clamp(min=1), sums
        queries = self.call.queries
        if self.partial is not None and self.partial.queries is not None:
            queries = torch.cat([self.partial.queries, queries], 2)[:, :, -self.n_slot :]
        inputs = inputs_of(self.call, queries, self.valid, self.segments)
        return over_heads(as_torch(self.policy.scored(inputs)), self.call), None

    def _received(self) -> torch.Tensor:
        first = self.n_slot - self.call.queries.shape[2]
        votes = [
            [Vote(keys=segment, queries=(max(segment[0], first), segment[1]), weight="sum") for segment in row]
            for row in self.segments
        ]
        sums = received(self.call, torch.tensor([begin for begin, _ in self.valid], device="cpu"), votes)
        if self.partial is None or self.partial.received is None:
            return sums
        older = self.partial.received
        return sums + torch.nn.functional.pad(older, (0, self.n_slot - older.shape[2]))

    def _per_slot(self, of_segments: np.ndarray) -> torch.Tensor:
        """What is said of segments (B, S), of each slot (B, slots)."""
        place = np.arange(self.n_slot)
        segment = np.stack([np.searchsorted(row[1:-1], place, side="right") for row in self.edges])
        return torch.from_numpy(np.take_along_axis(of_segments, segment, 1))


def _with_protection(scores: torch.Tensor, pos: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Protected tokens above all."""
    mask = layout.mask_beside(scores)
    if mask is None:
        return scores
    pos = pos[:, : scores.shape[1]]
    of_rows = cast(torch.Tensor, as_torch(mask)).bool()[:, None].expand(-1, pos.shape[1], -1)
    return scores.masked_fill(of_rows.gather(2, pos), torch.inf)


def _keep(layer: KeptLayer, scores: torch.Tensor, scored: _Slots, now: Stage, n_token: int) -> torch.Tensor:
    """Hold only the best of each segment; the slots that they stood in (B, H, K)."""
    n_row, n_head, n_slot = layer.keys.shape[:3]
    slots, _ = ops.select(
        scores, now.held, segments=np.minimum(scored.edges, n_slot), valid=np.array(scored.valid, np.int32)
    )
    front = slots.shape[2] - torch.from_numpy(now.held.sum(-1))
    # select puts the empty ones last
    place = (torch.arange(slots.shape[2], device="cpu") - front[:, None]).clamp(min=0)
    slots = as_torch(slots).long().clamp(min=0)
    slots = slots.gather(2, place.to(slots.device)[:, None].expand_as(slots))
    layer.bytes_before = (layer.keys.nbytes + layer.values.nbytes) // n_slot * n_token
    layer.prompt_shape = (n_row, n_head, n_token)
    layer.rearrange(slots.expand(-1, n_head, -1), front)
    return slots


def _remembered(
    before: Partial | None,
    call: AttentionCall,
    policy: Policy,
    sums: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> Partial:
    if sums is not None and slots is not None:
        sums = sums.gather(2, slots[:, : sums.shape[1]])
    n_recent, queries = policy.recent_queries, None
    if n_recent:
        older: Sequence[torch.Tensor] = () if before is None or before.queries is None else (before.queries,)
        queries = torch.cat([*older, call.queries], 2)[:, :, -n_recent:].clone()
    return Partial(sums, queries)
