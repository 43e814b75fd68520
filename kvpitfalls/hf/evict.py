"""Evicting once: after a layer's prefill."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from ..eviction.allocation import Allocation, layer_budgets
from ..eviction.budget import kept_tokens
from ..eviction.fairness import Fair
from ..eviction.layout import Layout, read_once
from ..eviction.selection import Kept, Pressed, allocation_of, check_room, choose, press, rank
from ..policies import Again, Policy
from .action import Action
from .chunks import check_chunks, cut
from .coming import Coming
from .forward import AttentionCall
from .layer import KeptLayer


@dataclass(frozen=True)
class Evict(Action):
    """A cache's action: after a layer's prefill, keep what the policy keeps."""

    policy: Policy
    fair: Fair
    compression_ratio: float | None
    budget: int | None
    protect: Any = None
    spans: Any = None
    allocation: Allocation | str | None = None  # None: the policy's own
    layouts: dict = field(
        default_factory=dict, init=False, compare=False, repr=False
    )  # one layout serves all layers of a prompt

    def __post_init__(self):
        for name in ("protect", "spans"):
            object.__setattr__(self, name, read_once(getattr(self, name)))
        object.__setattr__(self, "allocation", allocation_of(self.policy, self.allocation))

    @property
    def sharing(self) -> Allocation:
        """``allocation``, or the policy's own."""
        return cast(Allocation, self.allocation)  # since __post_init__

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
        return self.sharing.shares_heads

    @property
    def least_heads(self) -> int:  # type: ignore[override] # read only, as whoever asks takes it
        """What the allocation expects."""
        return self.sharing.least_heads if self.acts else 1

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
        """The same of each layer, mean over heads."""
        return layer_budgets(self.sharing, n_token, self.limit(n_token), n_layer)

    def layout(self, n_row: int, n_token: int, valid) -> Layout:
        """What stands where in the prompts."""
        key = (n_row, n_token, tuple(valid))
        if key not in self.layouts:
            settings = {
                "valid": valid,
                "spans": self.spans,
                "protect": self.protect,
                "n_sink": self.n_sink,
                "limit": self.limit,
            }
            self.layouts[key] = Layout.of(n_row, n_token, **settings)
        return self.layouts[key]

    def spans_of(self, n_row: int, n_token: int, valid, n_layer: int) -> list:
        """The instructions of each row; raises if they, or the protection, do not fit the prompt. Called before any
        layer is touched."""
        layout = self.layout(n_row, n_token, valid)
        check_room(self.policy, self.fair, self.sharing, layout, self.limit, n_layer)
        return list(layout.spans)

    def chosen(self, call: AttentionCall) -> Kept:
        """What is kept of a layer's prompt."""
        layout = self.layout(call.key.shape[0], call.key.shape[2], call.valid)
        ranked = rank(self.policy, self.fair, layout, call.key, call.query, **call.known)
        return choose(ranked, compression_ratio=self.compression_ratio, budget=self.budget, allocation=self.sharing)

    def pressed(self, call: AttentionCall) -> Pressed[torch.Tensor] | None:
        """What is kept of a layer's prompt, and its rows, by one call of the core; None where that takes more."""
        layout = self.layout(call.key.shape[0], call.key.shape[2], call.valid)
        known = {name: value for name, value in call.known.items() if name not in ("share_heads", "values")}
        return press(
            self.policy,
            self.fair,
            layout,
            call.key,
            call.value,
            call.query,
            compression_ratio=self.compression_ratio,
            budget=self.budget,
            allocation=self.sharing,
            **known,
        )

    def _keeps_all(self, valid: Sequence[tuple[int, int]]) -> bool:
        return all(self.limit(end - begin) == end - begin for begin, end in valid)

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Evict from ``layer``, unless the policy has the model read on."""
        if self._keeps_all(call.valid) or self.policy.needs_again:
            return
        if not call.shared and layer.has_plain_rows and (pressed := self.pressed(call)) is not None:
            layer.keep(pressed.keys, pressed.values, pressed.positions, _fills(pressed, call.valid))
            return
        self.evict(layer, self.chosen(call), call.valid)

    def asks(self, valid: Sequence[tuple[int, int]]) -> list[Policy]:
        """The policy, if it does."""
        return [self.policy] if self.policy.needs_again and not self._keeps_all(valid) else []

    def after_turn(self, layer: KeptLayer, call: AttentionCall, policy: Policy, again: Again) -> None:
        """Judge the prompt by what was read."""
        if policy == self.policy:
            layout = self.layout(call.key.shape[0], call.key.shape[2], call.valid)
            known = {**call.known, "again": again, "before": layer.judged}
            layer.judged = rank(self.policy, self.fair, layout, call.key, None, **known)

    def after_turns(self, layer: KeptLayer, valid: Sequence[tuple[int, int]]) -> None:
        """Evict from ``layer``."""
        if (ranked := layer.judged) is not None:
            settings = {"compression_ratio": self.compression_ratio, "budget": self.budget}
            self.evict(layer, choose(ranked, **settings, allocation=self.sharing), valid)
            layer.judged = None

    def evict(self, layer: KeptLayer, kept: Kept, valid: Sequence[tuple[int, int]]) -> None:
        """Hold only what is kept."""
        n_head = layer.keys.shape[1]  # one choice for all heads is repeated for each
        positions = kept.positions.expand(-1, n_head, -1).contiguous()
        layer.evict(positions, _fills(kept, valid))

    def check_chunks(self) -> None:
        """Raise if what is kept cannot be told before the whole prompt has come."""
        if self.acts:
            check_chunks(self.policy, self.fair, self.sharing)

    def after_chunk(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Evict from ``layer`` what a chunk leaves too much."""
        coming = cast(Coming, call.coming)
        lengths = [end - begin for begin, end in coming.valid]
        budgets = tuple(self.limits(n, call.n_layer)[call.layer] for n in lengths)
        if budgets != tuple(lengths):
            layout = self.layout(len(lengths), coming.n_token, coming.valid)
            cut(layer, call, self.policy, self.fair, layout, budgets)


def _fills(kept: Kept | Pressed, valid) -> bool:
    """Whether every row keeps as many tokens as there are places, by the quotas: the counts may be on a GPU that is
    still at work."""
    begin, end = (np.array(column)[:, None] for column in zip(*valid, strict=True))
    lengths = (np.minimum(kept.segments[:, 1:], end) - np.maximum(kept.segments[:, :-1], begin)).clip(0)
    return bool((np.minimum(kept.quotas, lengths[:, None]).sum(-1) == kept.positions.shape[-1]).all())
