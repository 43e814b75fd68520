"""What is done to a cache's layers, after a prompt's prefill and after every later forward: nothing, or, here, evicting
once, after the prefill."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self, cast

from ..eviction.allocation import layer_budgets
from ..eviction.budget import kept_tokens
from ..eviction.fairness import Fair
from ..eviction.layout import Layout, Split, read_once
from ..eviction.selection import (
    Budgets,
    Kept,
    Pressed,
    Ranked,
    allocation_of,
    check_room,
    choose,
    evict,
    press,
    rank,
)
from ..policies import Policy
from .chunks import check_chunks, cut
from .coming import Coming
from .forward import AttentionCall
from .layer import KeptLayer


class Action:
    """A cache's action. This one leaves every layer as it is."""

    evicts = False  # takes rows from a prompt
    holds = False  # acts after later forwards, too
    shares_heads = False  # a layer's heads hold different numbers of tokens
    least_heads = 1  # that a layer must choose for
    reads_queries = False  # has use for softmax denominators that attention tells
    reads_rotary = False  # wants to know how layers turn the queries of a prompt
    reads_output = False  # wants to know what layers make of what they attended to

    @property
    def acts(self) -> bool:
        """Whether it takes anything from a cache."""
        return self.evicts or self.holds

    def spans_of(self, n_token: int, valid: Sequence[tuple[int, int]], n_layer: int) -> list:
        """The instructions of each row; raises if they do not fit the prompt. Called before any of the ``n_layer``
        layers is touched."""
        return []

    def limit(self, n_token: int) -> int:
        """How much of a prompt of ``n_token`` real tokens a row may hold, mean over layers and heads."""
        return n_token

    def limits(self, n_token: int, n_layer: int) -> Sequence[int]:
        """What :meth:`limit` says, of each layer; mean over heads."""
        return [self.limit(n_token)] * n_layer

    def waits(self, layer: KeptLayer) -> bool:
        """Whether it is not ``layer``'s turn yet, though it has seen a prompt."""
        return False

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen a prompt."""

    def asks(self, valid: Sequence[tuple[int, int]]) -> list[Policy]:
        """The policies that have the model read on after these prompts, before they are judged; see ``again.py``."""
        return []

    def after_turn(self, layer: KeptLayer, call: AttentionCall, policy: Policy) -> None:
        """``layer``, which still has its prompt alone, has seen what this ``policy`` had the model read, which is
        ``call.again``; the rest of ``call`` is the prompt's, without its queries."""

    def after_turns(self, layer: KeptLayer, valid: Sequence[tuple[int, int]]) -> None:
        """``layer`` has seen all of it."""

    def after_chunk(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen a part of a prompt, or its last one; see ``call.coming``."""

    def after_step(self, layer: KeptLayer, call: AttentionCall) -> None:
        """``layer`` has seen what follows it; only of an action that ``holds``."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be done to every layer of a batch of prompts.

    Attributes
    ----------
    split : Split
        The prompts under the action's fairness.
    budgets : list of tuple of int
        Per layer, the tokens that each row keeps.
    """

    split: Split
    budgets: Budgets

    @cached_property
    def is_whole(self) -> bool:
        """Whether nothing of any prompt goes."""
        return all(of_layer == self.split.layout.lengths for of_layer in self.budgets)


@dataclass(frozen=True)
class Evict(Action):
    """A cache's action: after a layer's prefill, keep what the policy keeps."""

    policy: Policy
    fair: Fair
    compression_ratio: float | None
    budget: int | None
    protect: Any = None
    spans: Any = None
    allocation: Any = None  # None: the policy's own; an Allocation since __post_init__
    layout: Layout | None = field(default=None, init=False, compare=False, repr=False)  # of prompts that are known
    tasks: dict = field(
        default_factory=dict, init=False, compare=False, repr=False
    )  # one serves all layers of a prompt; and what `limits` gave

    def __post_init__(self):
        allocation = allocation_of(self.policy, self.allocation)
        vars(self).update(allocation=allocation, spans=read_once(self.spans), protect=read_once(self.protect))

    def __deepcopy__(self, memo: dict) -> Self:
        """For a copy of a cache: with the policy itself, which may hold what nobody copies, as a lock or a model."""
        twin = copy.copy(self)
        vars(twin).update(tasks=dict(self.tasks))
        return twin

    def of_prompts(self, spans: Any = None, layout: Layout | None = None) -> Self:
        """The same for prompts with these instructions; ``layout``: theirs and the protection's, where it is known
        already."""
        twin = copy.copy(self)
        vars(twin).update(spans=read_once(spans) if layout is None else layout.spans, layout=layout, tasks={})
        return twin

    @property
    def n_sink(self) -> int:
        """What protect="sinks" protects."""
        return self.policy.n_sink

    @property
    def evicts(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """False if everything is kept."""
        return self.compression_ratio != 0

    @property
    def shares_heads(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether heads of a layer share its budget."""
        return self.allocation.shares_heads

    @property
    def least_heads(self) -> int:  # type: ignore[override] # read only, as whoever asks takes it
        """What the allocation expects."""
        return self.allocation.least_heads if self.acts else 1

    @property
    def reads_queries(self) -> bool:
        """Whether the policy does."""
        return self.policy.needs_queries

    @property
    def reads_rotary(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether the policy does, and is asked."""
        return self.policy.needs_rotary and self.acts

    @property
    def reads_output(self) -> bool:  # type: ignore[override] # read only, as whoever asks takes it
        """Whether the policy does, and is asked."""
        return self.policy.needs_output and self.acts

    def limit(self, n_token: int) -> int:
        """How much of a prompt of ``n_token`` real tokens a row may hold, mean over layers and heads."""
        return kept_tokens(n_token, self.compression_ratio, self.budget)

    def limits(self, n_token: int, n_layer: int) -> Sequence[int]:
        """What :meth:`limit` says, of each layer; mean over heads. Asked for once: an allocation of the caller's may
        draw, or change later."""
        key = (n_token, n_layer)
        if key not in self.tasks:
            self.tasks[key] = layer_budgets(self.allocation, n_token, self.limit(n_token), n_layer)
        return self.tasks[key]

    def task(self, n_token: int, valid: Sequence[tuple[int, int]], n_layer: int) -> Task:
        """What is to be done to each layer of prompts of ``n_token`` tokens, padding included; raises if instructions
        or protection do not fit the prompts, or an instruction has no token."""
        key = (n_token, tuple(valid), n_layer)
        if key not in self.tasks:
            layout = self.layout
            if layout is None or (layout.n_token, layout.valid) != (n_token, list(valid)):  # a cache may be used again
                where = {"valid": valid, "spans": self.spans, "protect": self.protect}
                layout = Layout.of(len(valid), n_token, **where, n_sink=self.n_sink, limit=self.limit)
            of_rows = [self.limits(end - begin, n_layer) for begin, end in valid]
            task = Task(layout.split(self.fair), list(zip(*of_rows, strict=True)))
            for name, (begin, end) in (item for row in layout.spans for item in row.items()):
                if begin == end:  # no share of it could be told
                    raise ValueError(f"span {name!r} is [{begin}, {end}); expected at least one token")
            self.tasks[key] = task
        return self.tasks[key]

    def spans_of(self, n_token: int, valid: Sequence[tuple[int, int]], n_layer: int) -> list:
        """The instructions of each row; raises if they, or the protection, do not fit the prompt, or one has no token.
        Called before any layer is touched."""
        task = self.task(n_token, valid, n_layer)
        check_room(self.policy, task.split, task.budgets)
        return list(task.split.layout.spans)

    def pressed(self, layer: KeptLayer, call: AttentionCall, task: Task) -> Pressed | None:
        """What is kept of a layer's prompt, and its rows, by one call of the core; None where that takes more."""
        return press(self.policy, task.split, call, task.budgets, self.allocation) if layer.has_plain_rows else None

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Evict from ``layer``, unless the policy has the model read on."""
        task = self.task(call.keys.shape[2], call.valid, call.n_layer)
        if self.policy.needs_again or task.is_whole:
            return
        if (pressed := self.pressed(layer, call, task)) is not None:
            layer.keep(pressed.keys, pressed.values, pressed.positions, pressed.plan.is_full)
            return
        self.choose(layer, rank(self.policy, task.split, call), task)

    def asks(self, valid: Sequence[tuple[int, int]]) -> list[Policy]:
        """The policy, if it does."""
        if not self.policy.needs_again or all(self.limit(end - begin) == end - begin for begin, end in valid):
            return []
        return [self.policy]

    def after_turn(self, layer: KeptLayer, call: AttentionCall, policy: Policy) -> None:
        """Judge the prompt by what was read."""
        if policy == self.policy:
            task = self.task(call.keys.shape[2], call.valid, call.n_layer)
            layer.judged = rank(self.policy, task.split, call, layer.judged)

    def after_turns(self, layer: KeptLayer, valid: Sequence[tuple[int, int]]) -> None:
        """Evict from ``layer``."""
        if (ranked := layer.judged) is not None:
            task = self.task(ranked.split.layout.n_token, valid, ranked.n_layer)
            self.choose(layer, ranked, task)
            layer.judged = None

    def choose(self, layer: KeptLayer, ranked: Ranked, task: Task) -> None:
        """Hold only what is kept by these scores; by one call of the core where that can be."""
        made: Pressed | None = None
        if layer.has_plain_rows:
            made = evict(ranked, layer.keys, layer.values, task.budgets, self.allocation)
        if made is not None:
            layer.keep(made.keys, made.values, made.positions, made.plan.is_full)
            return
        kept: Kept = choose(ranked, task.budgets, self.allocation)
        # one choice for all heads is repeated for each
        positions = kept.positions.expand(-1, layer.keys.shape[1], -1).contiguous()
        layer.evict(positions, kept.plan.is_full)

    def check_chunks(self) -> None:
        """Raise if what is kept cannot be told before the whole prompt has come."""
        if self.acts:
            check_chunks(self.policy, self.fair, self.allocation)

    def after_chunk(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Evict from ``layer`` what a chunk leaves too much."""
        coming = cast(Coming, call.coming)
        task = self.task(coming.n_token, coming.valid, call.n_layer)
        budgets = task.budgets[call.layer]
        if budgets != task.split.layout.lengths:
            cut(layer, call, self.policy, self.fair, task.split.layout, budgets)
