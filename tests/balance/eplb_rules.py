"""EPLB's published rules, one expert and one rank at a time, in fp32: what the planners are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Load = np.float32


def pack(loads: Sequence[Load], packs: int) -> list[list[int]]:
    """Heaviest first, each to the lightest pack that is not full; one item per pack: in order."""
    size = len(loads) // packs
    if size == 1:
        return [[i] for i in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    weights = [Load(0)] * packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        to = min((i for i in range(packs) if len(found[i]) < size), key=lambda i: weights[i])
        found[to].append(item)
        weights[to] += loads[item]
    return found


def replicate(loads: Sequence[Load], replicas: int) -> list[int]:
    """Every expert once, then always the one with most load per replica once more."""
    chosen = list(range(len(loads)))
    while len(chosen) < replicas:
        chosen.append(max(range(len(loads)), key=lambda e: loads[e] / Load(chosen.count(e))))
    return chosen


def plan(loads: Sequence[float], *, ep: int, slots: int, nodes: int, groups: int) -> list[list[int]]:
    """Experts of each rank."""
    weights = [Load(load) for load in loads]
    size = len(weights) // groups
    heavy = [Load(sum(weights[g * size : (g + 1) * size], Load(0))) for g in range(groups)]
    ranks = []
    for node in pack(heavy, nodes):
        mine = [g * size + i for g in node for i in range(size)]
        local = [weights[e] for e in mine]
        items = replicate(local, ep * slots // nodes)
        each = [local[e] / Load(items.count(e)) for e in items]
        ranks += [[mine[items[i]] for i in rank] for rank in pack(each, ep // nodes)]
    return ranks
