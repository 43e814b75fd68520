"""From scores to kept positions. :func:`keep` is the one way through; wrap and audit use it too.

The work has two steps, so that an audit can score once and select many times: :func:`rank` (policy, fairness -> scores)
and :func:`choose` (scores, budget -> positions).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError
from ..numbers import check_real
from ..policies import Again, Inputs, Policy, get_policy
from ..policies.base import AnyPolicy
from ..policies.rotary import Rotary
from . import ops
from .allocation import (
    UNIFORM,
    Allocation,
    check_heads,
    get_allocation,
    head_quotas,
    is_ada,
    layer_budgets,
    raised_at,
    raised_where,
)
from .arrays import A, Array, Int32, Table, check_types
from .budget import blend, check_budget, kept_tokens, raised_to
from .fairness import AnyFair, Fair
from .layer_inputs import LayerInputs
from .layout import Layout, Plan, Protect, Spans, Split, plan_of
from .needed import check_layer, turns_of

#: Per layer, the tokens that each row keeps: the same for all that happens to a batch of prompts.
Budgets: TypeAlias = Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False)  # arrays are not compared by ==
class Kept(Generic[A]):
    """What :func:`keep` keeps.

    Attributes
    ----------
    positions : array of int32, shape (B, H, K)
        Ascending, then -1 where a row keeps fewer than K.
    counts : array of int32, shape (B, H)
    scores : array of float32, shape (B, H, T)
    plan : Plan
        The two that follow, as one.
    quotas : ndarray of int32, shape (B, H, S)
        Tokens per segment; S = 1 when biased.
    segments : ndarray of int32, shape (B, S+1)
        The segments' edges.

    Examples
    --------
    >>> import numpy as np
    >>> import kvpitfalls as kvp
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> kept = kvp.keep("streaming_llm", keys, budget=6, spans=[(0, 5), (5, 10)], fair=True)
    >>> kept.positions[0, 0].tolist(), kept.counts.tolist(), kept.quotas[0, 0].tolist(), kept.segments.tolist()
    ([0, 1, 2, 7, 8, 9], [[6, 6]], [3, 3], [[0, 5, 10]])
    """

    positions: A
    counts: A
    scores: A
    plan: Plan

    @property
    def quotas(self) -> Int32:
        """See the class."""
        return self.plan.quotas

    @property
    def segments(self) -> Int32:
        """See the class."""
        return self.plan.edges


class Pressed(NamedTuple, Generic[A]):
    """What :func:`press` leaves: the positions and the plan of :class:`Kept`, and the kept rows (B,H,K,D) and
    (B,H,K,Dv)."""

    positions: A
    keys: A
    values: A
    plan: Plan


@dataclass(frozen=True, eq=False)
class Ranked:
    """Scores of one layer under one policy and fairness, before any budget: what :func:`choose` selects from."""

    scores: Array
    split: Split
    layer: int  # which it is, of n_layer
    n_layer: int
    global_choice: bool = False
    biased: "Ranked | None" = None
    of_heads: Array | None = None  # the scores before one choice was made for all heads

    def on(self, layout: Layout) -> "Ranked":
        """The same scores, with the protection of another layout of the same spans."""
        biased = None if self.biased is None else self.biased.on(layout)
        return replace(self, split=layout.split(self.split.fair), biased=biased)


def rank(policy: Policy, split: Split, layer: LayerInputs, before: Ranked | None = None) -> Ranked:
    """Score one layer.

    Parameters
    ----------
    policy : Policy
    split : Split
        The layout of the rows under a fairness: ``layout.split(fair)``.
    layer : LayerInputs
        What a wrapped layer, an audit or a caller gives. With ``share_heads`` scores are (B, 1, T).
    before : Ranked, optional
        What this returned for the turn before, of a policy that has the model read on.

    Raises
    ------
    ValueError
        If the policy needs what the layer does not give, or returns something else than scores; see
        :meth:`Policy.scored`.
    """
    fair, again = split.fair, layer.again
    if again is not None:
        again = again._replace(before=None if before is None else before.of_heads)
    check_types(keys=layer.keys, queries=layer.queries, values=layer.values)
    inputs = Inputs.of(layer, **split.of_inputs, again=again)
    policy.check_given(inputs)
    scores = policy.scored(inputs)
    of_heads = scores if again is not None else None
    if layer.share_heads:
        scores = _mean_over_heads(scores)
    biased = None
    if 0 < fair.strength < 1:
        unfair = split.layout.split(Fair.parse(False))
        biased = rank(policy, unfair, layer, None if before is None else before.biased)
    is_global = not policy.paper_quotas and split.is_paper
    return Ranked(scores, split, layer.layer, layer.n_layer, is_global, biased, of_heads)


def _mean_over_heads(scores: Array) -> Array:
    """(B,1,T), by way of float64: equal whole numbers of any size must stay equal."""
    if isinstance(scores, np.ndarray):
        return np.asarray(scores.mean(1, dtype=np.float64, keepdims=True), np.float32)
    return scores.double().mean(1, keepdim=True).float()


class _Once(NamedTuple):
    """A selection by one call, for which scores need not be looked at: its plan, what is protected, and what is asked
    for where heads share."""

    plan: Plan
    mask: Array | None
    shared: dict[str, Any]

    def pressed(self, positions: Array, keys: Array, values: Array) -> Pressed[Array]:
        """What was made by it."""
        plan = Plan(self.plan.edges, self.shared["shares"], positions.shape[2]) if self.shared else self.plan
        return Pressed(positions, keys, values, plan)


def _once(split: Split, keys: Array, budgets: tuple[int, ...], allocation: Allocation) -> _Once | None:
    """None where it takes more: quotas that depend on scores, or heads that share otherwise than :class:`Ada` says, or
    with what must be kept."""
    if split.asks_scores:
        return None
    n_head, mask = keys.shape[1], split.layout.mask_beside(keys)
    plan = split.plan(n_head, budgets, is_whole=split.fair.is_biased)
    if not allocation.shares_heads:
        return _Once(plan, mask, {})
    if not is_ada(allocation) or mask is not None or split.fair.min_tokens:
        return None
    return _Once(plan, None, {"floors": allocation.parts(plan.quotas), "shares": np.empty(plan.quotas.shape, np.int32)})


def press(
    policy: Policy, split: Split, layer: LayerInputs, budgets: Budgets, allocation: Allocation = UNIFORM
) -> Pressed[Array] | None:
    """:func:`rank`, :func:`choose` and the gathering of the kept rows by one call of the core, to the same bits; for
    those who ask for no scores. None where that takes more than one: scores that are no single scorer's, one choice for
    all heads, or more than :func:`_once` is for."""
    if not policy.scores_by_call or layer.share_heads or layer.values is None:
        return None
    if not policy.paper_quotas and split.is_paper:  # one choice over the whole row
        return None
    if (once := _once(split, layer.keys, budgets[layer.layer], allocation)) is None:
        return None
    inputs = Inputs.of(layer, **split.of_inputs)
    policy.check_given(inputs)
    if (call := policy.called(inputs)) is None:
        return None
    plan = once.plan
    return once.pressed(*call.press(layer.values, plan.edges, plan.quotas, once.mask, plan.n_kept, **once.shared))


def evict(
    ranked: Ranked, keys: A, values: A, budgets: Budgets, allocation: Allocation = UNIFORM
) -> Pressed[Array] | None:
    """:func:`choose` and the gathering of the kept rows, likewise."""
    if ranked.global_choice or ranked.scores.shape[1] != keys.shape[1]:
        return None
    if (once := _once(ranked.split, keys, budgets[ranked.layer], allocation)) is None:
        return None
    plan, scores, valid = once.plan, cast(A, ranked.scores), ranked.split.layout.valid_array
    how = valid, plan.edges, plan.quotas, once.mask, plan.n_kept
    return once.pressed(*ops.evict_checked(scores, keys, values, *how, **once.shared))


def _select(ranked: Ranked, plan: Plan) -> Kept[Array]:
    layout, scores = ranked.split.layout, ranked.scores
    positions, counts = ops.select_checked(
        scores, plan.edges, plan.quotas, layout.mask_beside(scores), layout.valid_array, plan.n_kept
    )
    return Kept(positions, counts, scores, plan)


def budgets_of(
    layout: Layout, limit: Callable[[int], int], allocation: Allocation = UNIFORM, n_layer: int = 1
) -> Budgets:
    """What each layer keeps of each row; ``limit``: of a row's real tokens so many are kept, mean over layers and
    heads."""
    return list(zip(*(layer_budgets(allocation, n, limit(n), n_layer) for n in layout.lengths), strict=True))


def choose(ranked: Ranked, budgets: Budgets, allocation: Allocation = UNIFORM) -> Kept[Array]:
    """Select from what was ranked as many tokens of each row as its layer keeps; see :func:`budgets_of`."""
    split, n_head = ranked.split, ranked.scores.shape[1]
    fair = split.fair
    of_rows = budgets[ranked.layer]
    whole = split.plan(n_head, of_rows, is_whole=True)
    if fair.is_biased or (ranked.global_choice and fair.strength == 1):
        return _select(ranked, _over_heads(ranked, whole, allocation))
    if fair.strength == 0:
        return _select_with_floors(ranked, whole, allocation)
    if ranked.global_choice:
        kept = _select(ranked, _over_heads(ranked, whole, allocation))
        plan = plan_of(split.edges, count_per_segment(kept, split.edges), n_head)
    else:
        told = _floored(ranked) if allocation.shares_heads and fair.min_tokens else ranked
        plan = _over_heads(told, split.plan(n_head, of_rows, is_whole=False), allocation)
    if fair.strength < 1:
        plan = plan_of(plan.edges, _blended(ranked, plan, budgets, allocation), n_head)
    return _select(ranked, plan)


def _over_heads(ranked: Ranked, plan: Plan, allocation: Allocation) -> Plan:
    """The plan with what the allocation gives to each head."""
    if not allocation.shares_heads:
        return plan
    scores, mask = ranked.scores, ranked.split.layout.mask_beside(ranked.scores)
    if mask is not None:
        scores = raised_where(scores, mask)
    return plan_of(plan.edges, head_quotas(allocation, scores, plan.edges, plan.quotas), scores.shape[1])


def _blended(ranked: Ranked, plan: Plan, budgets: Budgets, allocation: Allocation) -> Int32:
    """Quotas (B,H,S) between what the biased policy keeps and the plan's, and none below its floor."""
    if ranked.biased is None:
        raise ValueError(
            "these scores were ranked without those of the biased policy; expected a strength between 0 and 1"
        )
    counts, quotas = count_per_segment(choose(ranked.biased, budgets, allocation), plan.edges), plan.quotas
    if allocation.shares_heads:  # the sums are those of all heads together
        counts, quotas = (x.reshape(len(x), 1, -1) for x in (counts, quotas))
    quotas = np.reshape(blend(counts, quotas, ranked.split.fair.strength), plan.quotas.shape)
    floors: Int32 = ranked.split.floors_array[:, None]
    if not ranked.split.fair.min_tokens:
        return quotas
    if not allocation.shares_heads:
        return raised_to(quotas, floors)
    flat = np.broadcast_to(floors, quotas.shape).reshape(len(quotas), 1, -1)
    return raised_to(quotas.reshape(flat.shape), flat).reshape(quotas.shape)


def _select_with_floors(ranked: Ranked, whole: Plan, allocation: Allocation) -> Kept[Array]:
    """The best of the whole row, but first those that must be kept of each segment."""
    raised = _floored(ranked)
    return replace(_select(raised, _over_heads(raised, whole, allocation)), scores=ranked.scores)


def _floored(ranked: Ranked) -> Ranked:
    """With infinite scores for those that must be kept of each segment: no selection and no allocation leaves them
    out."""
    split = ranked.split
    first = _select(ranked, plan_of(split.edges, split.floors_array, ranked.scores.shape[1]))
    return replace(ranked, scores=raised_at(ranked.scores, first.positions))


def count_per_segment(kept: Kept[Array], edges: Int32) -> Int32:
    """Kept tokens per segment, int (B,H,S)."""
    positions = kept.positions if isinstance(kept.positions, np.ndarray) else kept.positions.cpu().numpy()
    ranges = np.stack([edges[:, :-1], edges[:, 1:]], -1)
    return np.stack([count_inside(*row) for row in zip(positions, ranges, strict=True)]).astype(np.int32)


def count_inside(positions: Int32, ranges: Table) -> npt.NDArray[np.int64]:
    """How many of kept positions (H, K), which ascend and end in -1, are in each of the ranges (S, 2): int64 (H, S).

    Edges are looked up among positions: to compare all of these with each range took minutes of a long prompt.
    """
    edges = np.asarray(ranges, positions.dtype).reshape(-1, 2)  # of one type, or each look-up would convert all
    n_held = (positions >= 0).sum(-1)
    places = [np.searchsorted(of_head[:n], edges) for of_head, n in zip(positions, n_held, strict=True)]
    return np.diff(places)[..., 0]


def keep(
    policy: AnyPolicy,
    keys: A,
    queries: A | None = None,
    *,
    compression_ratio: float | None = None,
    budget: int | None = None,
    spans: Spans | None = None,
    fair: AnyFair = False,
    protect: Protect | None = None,
    scaling: float | None = None,
    valid: Table | None = None,
    softcap: float | None = 0.0,
    values: A | None = None,
    layer: int = 0,
    n_layer: int = 1,
    allocation: Allocation | str | None = None,
    rotary: Rotary | None = None,
    output: A | None = None,
    again: Sequence[tuple[A, ...] | Again] | None = None,
) -> Kept[A]:
    """The tokens a policy keeps of bare keys and queries; no model needed.

    Parameters
    ----------
    policy : Policy or str
    keys : array, shape (B, H, T, D)
        As they stand in the cache, after rotary embedding. NumPy or torch; float32, float16 or bfloat16.
    queries : array, shape (B, H*G, Q, D), optional
        For the last Q positions; all T where fairness or H2O needs them.
    compression_ratio, budget : float or int
        Exactly one: the share removed, in [0, 1), or the number of tokens kept.
    spans : list of (start, end), or mapping of name to (start, end); or one such mapping per row
        The instructions, in tokens. One that holds none is as if it was not there.
    fair : bool, float, "paper", "floor", "floor=M" or Fair
        See :meth:`Fair.parse`.
    protect : str, int, iterable of them, or bool array (T,) or (B, T), optional
        Span names (a pinned instruction), positions, "sinks" (the first 4 tokens, or the policy's ``n_sink``), or
        "boundary" (a tenth of the budget, rounded down, at each end of the row). Paid from the budget.
    scaling : float, optional
        Of q.k before the softmax; ``D ** -0.5`` by default.
    valid : (B, 2), optional
        Range of real tokens per row; the rest is padding. Budgets count real tokens.
    softcap : float
        c > 0 maps a logit x to c tanh(x/c).
    values : array, shape (B, H, T, Dv), optional
        For a policy that reads them.
    layer, n_layer : int
        Which of a model's compressed layers it is, and how many there are; the first of one by default.
    allocation : {"uniform", "pyramid", "ada"} or Allocation, optional
        How the budget is shared over layers and heads; the policy's own by default, which is "uniform" for most.
    rotary : Rotary, optional
        How queries and keys were turned by their positions, for a policy that undoes it.
    output : array, shape (H*G, Dv, E), optional
        The output projection of each query head, for a policy that weighs values by it.
    again : list of (queries, keys) or (queries, keys, values), optional
        For a policy that has the model read on after the prompt: what each such forward gave, arrays (B, H*G, n, D),
        (B, H, n, D) and (B, H, n, Dv).

    Returns
    -------
    Kept

    Raises
    ------
    ValueError, TypeError, DeviceError, UnsupportedModelError
        One sentence on what was given and what was expected; a BudgetError, which is a ValueError, where the budget
        does not hold what must be kept.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 10, 8), dtype=np.float32)
    >>> keep("streaming_llm", keys, compression_ratio=0.4).positions[0, 0]
    array([0, 1, 2, 3, 8, 9], dtype=int32)
    >>> keep("streaming_llm", keys, budget=6, spans=[(0, 5), (5, 10)], fair=True, protect=[7]).positions[0, 0]
    array([0, 1, 2, 7, 8, 9], dtype=int32)
    """
    policy, fair = get_policy(policy), Fair.parse(fair)
    check_budget(compression_ratio, budget)
    if not hasattr(keys, "shape"):
        raise TypeError(f"keys is a {type(keys).__name__}; expected a NumPy array or a torch tensor")
    if len(keys.shape) != 4:
        raise ValueError(f"keys has shape {tuple(keys.shape)}; expected (B, H, T, D)")
    if not keys.shape[1] or not keys.shape[3]:
        raise ValueError(f"keys has shape {tuple(keys.shape)}; expected at least one head, and one channel")
    check_real({name: x for name, x in (("scaling", scaling), ("softcap", softcap)) if x is not None})
    check_layer(keys, values, layer, n_layer)
    if rotary is not None and not isinstance(rotary, Rotary):
        raise TypeError(f"rotary is a {type(rotary).__name__}; expected a kvpitfalls.Rotary")
    limit = partial(kept_tokens, compression_ratio=compression_ratio, budget=budget)
    layout = Layout.of(
        keys.shape[0], keys.shape[2], valid=valid, spans=spans, protect=protect, n_sink=policy.n_sink, limit=limit
    )
    allocation = allocation_of(policy, allocation)
    check_heads(allocation, keys.shape[1])
    split, budgets = layout.split(fair), budgets_of(layout, limit, allocation, n_layer)
    check_room(policy, split, budgets)
    attention: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "rotary": rotary, "output": output}
    inputs = LayerInputs(keys, queries, values, layer=layer, n_layer=n_layer, **attention)
    turns = turns_of(policy, layout, keys, again) if policy.needs_again else []
    ranked = rank(policy, split, replace(inputs, again=turns[0] if turns else None))
    for turn in turns[1:]:
        ranked = rank(policy, split, replace(inputs, again=turn), ranked)
    return cast("Kept[A]", choose(ranked, budgets, allocation))  # in the library of the keys


def allocation_of(policy: Policy, allocation: Allocation | str | None) -> Allocation:
    """What was asked for, or else what the policy does; raises if both say something."""
    own = get_allocation(policy.allocation)
    if allocation is None:
        return own
    asked = get_allocation(allocation)
    if own != UNIFORM and asked != own:
        raise ValueError(
            f"allocation is {allocation!r}; policy {policy.name!r} has one of its own, {own!r}, and expects none"
        )
    return asked


def check_room(policy: Policy, split: Split, budgets: Budgets) -> None:
    """Raise BudgetError where a policy is not defined for a row's length or budget, or the smallest budget of a layer
    is smaller than what must be kept of a row. A row that is kept whole is no business of a policy."""
    of_rows = list(zip(*budgets, strict=True))
    for n_token, of_layers in zip(split.layout.lengths, of_rows, strict=True):
        if (n_kept := sum(of_layers) // len(of_layers)) < n_token:  # the mean is what was asked for
            try:
                policy.check(n_token, n_kept)
            except ValueError as reason:
                raise BudgetError(str(reason)) from reason
    split.check_room([min(of_layers) for of_layers in of_rows])
