"""What a selection needs beside the scores: segments and quotas, made once per prompt and shared by all layers."""

from typing import NamedTuple

import numpy as np

from .arrays import Int32
from .budget import apportion, floor_and_rest
from .fairness import Fair, Layout


class Plan(NamedTuple):
    """Segments and quotas, as the core takes them."""

    edges: Int32  # int32 (B,S+1)
    quotas: Int32  # int32 (B,H,S)
    n_kept: int  # the largest sum of quotas


def plan_of(edges: Int32, quotas: Int32, n_head: int) -> Plan:
    """The plan of quotas (B,H,S), or (B,S) for every head."""
    shaped = quotas if quotas.ndim == 3 else np.broadcast_to(quotas[:, None], (len(quotas), n_head, quotas.shape[-1]))
    quotas = np.array(shaped, np.int32)
    quotas.flags.writeable = edges.flags.writeable = False  # shared by all layers
    return Plan(edges, quotas, int(quotas.sum(-1).max()))


def whole_plan(layout: Layout, fair: Fair, n_head: int, budgets: tuple[int, ...]) -> Plan:
    """The best of each row, wherever they are; raises where a budget has no room for what must be kept."""

    def make() -> Plan:
        layout.check_room(fair, budgets)
        edges = edges_array([[row] for row in layout.valid], layout)
        return plan_of(edges, np.array(budgets, np.int32)[:, None], n_head)

    return layout.plan(("whole", n_head, budgets), fair, make)


def fair_plan(layout: Layout, fair: Fair, n_head: int, budgets: tuple[int, ...]) -> Plan:
    """A quota for each segment."""

    def make() -> Plan:
        return plan_of(edges_array(layout.segments(fair), layout), fair_quotas(layout, fair, budgets), n_head)

    return layout.plan(("fair", n_head, budgets), fair, make)


def floors_of(layout: Layout, fair: Fair) -> tuple[Int32, Int32]:
    """The segments' edges (B,S+1), and how many tokens of each are kept at least (B,S)."""
    segments = layout.segments(fair)
    return edges_array(segments, layout), padded(layout.floors(fair), max(map(len, segments)))


def padded(rows: list[list[int]], n_segment: int) -> Int32:
    """Rows (B,S), zeros at the end of the shorter ones."""
    return np.array([row + [0] * (n_segment - len(row)) for row in rows], np.int32)


def edges_array(segments: list[list[tuple[int, int]]], layout: Layout) -> Int32:
    """Segments as edges (B,S+1); rows with fewer segments end in empty ones."""
    n_segment = max(map(len, segments))
    edges = np.empty((len(segments), n_segment + 1), np.int32)
    for row, of_row in zip(edges, segments, strict=True):
        row[0] = of_row[0][0]
        row[1:] = of_row[-1][1]
        row[1 : len(of_row) + 1] = [end for _, end in of_row]
    return edges


def fair_quotas(layout: Layout, fair: Fair, budgets: tuple[int, ...]) -> Int32:
    """Quotas (B,S), before any blending; rows with fewer segments have zeros at the end."""
    segments = layout.segments(fair)
    quotas = np.zeros((len(budgets), max(map(len, segments))), np.int32)
    for b, (of_row, weights, names) in enumerate(zip(segments, layout.weights(fair), layout.names(fair), strict=True)):
        lengths = [end - begin for begin, end in of_row]
        floors = layout.floors(fair)[b]
        if fair.rule == "paper":
            quotas[b, : len(of_row)] = floor_and_rest(budgets[b], lengths, floors)
        else:
            quotas[b, : len(of_row)] = apportion(budgets[b], lengths, weights, floors, [name is None for name in names])
    return quotas
