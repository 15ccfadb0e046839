"""Copies of experts and their ranks, greedily, for many layers at once.

B rows (a layer, or a node of a layer), E experts, N items (replicas), D ranks, S slots of a rank: N = D × S.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_runtime.balance.arrays import Bools, Floats, Ints


def replicate(loads: Floats, num_items: int, *, most: int | None = None) -> tuple[Ints, Ints]:
    """Give `loads [B, E]` copies until there are `num_items`: always the expert with most load per replica.

    Returns the expert of each item `[B, N]` (0..E-1, then the copies) and the replicas of each expert `[B, E]`. This
    makes the heaviest replica as light as it can be. No expert gets more than `most` replicas.
    """
    rows, experts = loads.shape
    items = np.empty((rows, num_items), dtype=np.int64)
    items[:, :experts] = np.arange(experts)
    counts = np.ones((rows, experts), dtype=np.int64)
    each = loads.copy()
    at = np.arange(rows)
    for i in range(experts, num_items):
        chosen = each.argmax(axis=1)
        items[:, i] = chosen
        counts[at, chosen] += 1
        replicas = counts[at, chosen]
        each[at, chosen] = loads[at, chosen] / replicas.astype(loads.dtype)
        if most is not None:
            each[at, chosen] = np.where(replicas < most, each[at, chosen], -1.0)
    return items, counts


def pack(loads: Floats, num_ranks: int) -> Ints:
    """Items `[B, D, S]` of each rank: `loads [B, N]` from the heaviest on, each to the lightest rank with room."""
    rows, items = loads.shape
    size = items // num_ranks
    if size == 1:
        return np.broadcast_to(np.arange(items)[None, :, None], (rows, items, 1)).copy()
    order = np.argsort(-loads, axis=1, kind="stable")
    packed = np.empty((rows, num_ranks, size), dtype=np.int64)
    totals = np.zeros((rows, num_ranks), dtype=loads.dtype)
    held = np.zeros((rows, num_ranks), dtype=np.int64)
    at = np.arange(rows)
    for item in order.T:
        rank = totals.argmin(axis=1)
        place = held[at, rank]
        packed[at, rank, place] = item
        held[at, rank] = place + 1
        # A full rank is never the lightest.
        totals[at, rank] = np.where(place + 1 < size, totals[at, rank] + loads[at, item], np.inf)
    return packed


def pack_apart(loads: Floats, experts: Ints, num_experts: int, num_ranks: int) -> Ints:
    """Like `pack`, but no rank gets two of `experts [B, N]` alike; returns experts `[B, D, S]`.

    Possible where no expert has more replicas than there are ranks (`deal` is the proof). Rows in which the greedy
    order ends in a corner are dealt.
    """
    rows, items = loads.shape
    size = items // num_ranks
    order = np.lexsort((experts, -loads), axis=1)
    packed = np.empty((rows, num_ranks, size), dtype=np.int64)
    totals = np.zeros((rows, num_ranks))
    held = np.zeros((rows, num_ranks), dtype=np.int64)
    holds: Bools = np.zeros((rows, num_experts, num_ranks), dtype=np.bool_)
    stuck = np.zeros(rows, dtype=np.bool_)
    at = np.arange(rows)
    for item in order.T:
        expert = experts[at, item]
        allowed = np.where(holds[at, expert], np.inf, totals)
        rank = allowed.argmin(axis=1)
        stuck |= np.isinf(allowed[at, rank])
        place = np.minimum(held[at, rank], size - 1)
        packed[at, rank, place] = expert
        held[at, rank] = place + 1
        holds[at, expert, rank] = True
        totals[at, rank] = np.where(place + 1 < size, totals[at, rank] + loads[at, item], np.inf)
    if stuck.any():
        packed[stuck] = deal(np.sort(experts[stuck], axis=1), num_ranks)
    return packed


def deal(experts: Ints, num_ranks: int) -> Ints:
    """Sorted `experts [B, N]` dealt to the ranks in turn: replicas of one expert meet only if they outnumber ranks."""
    return np.ascontiguousarray(experts.reshape(len(experts), -1, num_ranks).swapaxes(1, 2))


def per_item(loads: Floats, counts: Ints, items: Ints) -> Floats:
    """[B, N]: load of each replica of `loads [B, E]`, evenly split among `counts [B, E]`."""
    each: NDArray[np.floating] = loads / counts.astype(loads.dtype)
    return np.take_along_axis(each, items, axis=1)
