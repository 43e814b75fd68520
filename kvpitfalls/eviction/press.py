"""From keys to kept rows by one call of the core."""

from dataclasses import dataclass
from typing import Any, Generic

from ..policies import Policy
from .allocation import UNIFORM, Allocation
from .arrays import A, Int32
from .fairness import Fair, Layout
from .plans import fair_plan, whole_plan
from .selection import budgets_of, inputs_of, is_paper


@dataclass(frozen=True)
class Pressed(Generic[A]):
    """What :func:`press` leaves: :class:`Kept` without the scores, and the kept rows (B,H,K,D) and (B,H,K,Dv)."""

    positions: A
    counts: A
    keys: A
    values: A
    quotas: Int32
    segments: Int32


def press(
    policy: Policy,
    fair: Fair,
    layout: Layout,
    keys: A,
    values: A,
    queries: A | None,
    *,
    compression_ratio: float | None = None,
    budget: int | None = None,
    allocation: Allocation = UNIFORM,
    layer: int = 0,
    n_layer: int = 1,
    **known: Any,
) -> Pressed[A] | None:
    """``rank``, ``choose`` and the gathering of the kept rows by one call of the core, to the same bits; for
    those who ask for no scores. None where that takes more than one: scores that are no single scorer's, a budget that
    heads share, or quotas that depend on scores. ``known``: what :func:`rank` takes beside these."""
    paper_whole = is_paper(fair) and not policy.paper_quotas
    is_plain = fair.is_biased or fair.strength == 1
    if not policy.scores_by_call or allocation.shares_heads or paper_whole or not is_plain:
        return None
    inputs = inputs_of(policy, fair, layout, keys, queries, values=values, layer=layer, n_layer=n_layer, **known)
    if (call := policy.call(inputs)) is None:
        return None
    budgets, n_head = budgets_of(layout, (layer, n_layer), compression_ratio, budget, allocation), keys.shape[1]
    whole = whole_plan(layout, fair, n_head, budgets)  # raises where there is no room
    plan = whole if fair.is_biased else fair_plan(layout, fair, n_head, budgets)
    made = call.press(values, plan.edges, plan.quotas, layout.mask_beside(keys), plan.n_kept)
    return Pressed(*made, plan.quotas, plan.edges)
