"""Plans beside a previous one: ranks and slots named so that most stays, and the best use of a budget of moves.

W windows, V views, L layers, E experts, D ranks, S slots of a rank; B rows. A move is a slot whose expert changes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np

from moe_runtime.balance.arrays import Bools, Grid, Ints
from moe_runtime.balance.best import MAX_STEPS, can_be_apart, measures, no_worse, objective, views_of
from moe_runtime.balance.measures import clashes
from moe_runtime.balance.search import Search

SLACK: Final = 0.001
"""Of the objective, in mean rank loads: what fewer moves are worth."""
_LEAST_GAIN: Final = 1e-9


def keep(new: Ints, old: Ints, *, nodes: int, num_experts: int) -> Ints:
    """`new [L, D, S]` with nodes, ranks of a node and slots of a rank renamed to agree with `old`; equally balanced."""
    layers, ranks, size = new.shape
    if nodes > 1:
        perm = _match(_overlap(new, old, nodes, num_experts))
        new = _permute(new.reshape(layers, nodes, -1), perm).reshape(new.shape)
    near, was = (slots.reshape(layers * nodes, ranks // nodes, size) for slots in (new, old))
    near = _permute(near, _match(_overlap(near, was, ranks // nodes, num_experts)))
    return _same_slots(near.reshape(-1, size), was.reshape(-1, size)).reshape(new.shape)


def _overlap(new: Ints, old: Ints, parts: int, num_experts: int) -> Grid:
    """[B, parts, parts]: experts that part i of `new` and part j of `old` have in common."""
    sets = []
    for slots in (new, old):
        members = np.zeros((len(slots), parts, num_experts), dtype=np.float32)
        np.put_along_axis(members, slots.reshape(len(slots), parts, -1), 1.0, axis=2)
        sets.append(members)
    common: Grid = np.matmul(sets[0], sets[1].swapaxes(1, 2))
    return common


def _match(overlap: Grid) -> Ints:
    """[B, n]: the old place of each new part: greedily, those that have most in common with some place first."""
    rows, n, _ = overlap.shape
    order = np.argsort(-overlap.max(axis=2), axis=1, kind="stable")
    free = np.zeros((rows, n), dtype=overlap.dtype)
    at, place = np.arange(rows), np.empty((rows, n), dtype=np.int64)
    for part in order.T:
        chosen = (overlap[at, part] + free).argmax(axis=1)
        place[at, part] = chosen
        free[at, chosen] = -np.inf
    return place


def _permute(parts: Ints, place: Ints) -> Ints:
    out = np.empty_like(parts)
    out[np.arange(len(parts))[:, None], place] = parts
    return out


def _same_slots(new: Ints, old: Ints) -> Ints:
    """`new [B, S]` reordered: an expert that `old` has stays in its slot, the others fill what is left in order."""
    rows, size = new.shape
    unused = np.ones((rows, size), dtype=np.bool_)
    out = np.full((rows, size), -1, dtype=np.int64)
    at = np.arange(rows)
    for slot in range(size):
        same = (new == old[:, slot : slot + 1]) & unused
        which, found = same.argmax(axis=1), same.any(axis=1)
        out[found, slot] = old[found, slot]
        unused[at[found], which[found]] = False
    holes = out < 0
    out[holes] = new[unused]  # row by row: as many holes as unused experts in each
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """A layer's plans from the previous one on: the moves of each and `measures [3]` after them."""

    moves: list[int]
    measured: list[Grid]
    plans: list[Ints]

    def score(self, i: int) -> float:
        return float(objective(self.measured[i]))


class Ways:
    """Of each layer, the steps of a local search from `old [L, D, S]`, and `full [L, D, S]`, each a plan."""

    def __init__(self, loads: Grid, old: Ints, full: Ints, *, node: Ints) -> None:
        self.old, self.full = old, full
        self._loads = loads
        limit = measures(loads, old)
        self._ways = [_Way([0], [limit[:, i]], [old[i]]) for i in range(len(old))]
        apart = can_be_apart(old.shape[2], loads.shape[2])
        search = Search(views_of(loads, old), old, node=node, apart=apart)
        for _ in range(MAX_STEPS):
            moved = search.step()
            if not moved.size:
                break
            self._note(moved, search.slots)
        self._note(np.arange(len(old)), full)

    def _note(self, at: Ints, slots: Ints) -> None:
        measured = measures(self._loads[:, at], slots[at])
        moves = (slots[at] != self.old[at]).sum(axis=(1, 2))
        for j, (i, count) in enumerate(zip(at.tolist(), moves.tolist(), strict=True)):
            way = self._ways[i]
            way.moves.append(count)
            way.measured.append(measured[:, j])
            way.plans.append(slots[i].copy())

    def nearest(self, base: Ints, usable: Bools) -> Ints:
        """Per layer the plan with fewest moves that is as good as `full` but for SLACK and no worse than `base`.

        It has no two replicas of one expert on a rank, unless `full` has. `full` itself where `usable [L]` is False.
        """
        limit, chosen = measures(self._loads, base), self.full.copy()
        for layer, way in enumerate(self._ways):
            enough, fewest = way.score(-1) + SLACK, way.moves[-1]
            clash = clashes(self.full[layer])
            for i, plan in enumerate(way.plans[:-1] if usable[layer] else []):
                fine = way.moves[i] < fewest and way.score(i) <= enough and no_worse(way.measured[i], limit[:, layer])
                if fine and (clash or not clashes(plan)):
                    fewest, chosen[layer] = way.moves[i], plan
        return chosen

    def within(self, budget: int) -> Ints:
        """At most `budget` slots changed in all, best gain per move first; a layer's gain counts by its tokens."""
        if int((self.old != self.full).sum()) <= budget:
            return self.full
        weight = self._loads.sum(axis=(0, 2))
        chosen, now = self.old.copy(), [0] * len(self._ways)
        heap: list[tuple[float, int, int]] = []

        def push(layer: int) -> None:
            way = self._ways[layer]
            score, moves = way.score(now[layer]), way.moves[now[layer]]
            steps = [
                ((score - way.score(i)) * weight[layer] / max(1, count - moves), -count, i)
                for i, count in enumerate(way.moves)
                if count - moves <= budget and way.score(i) < score - _LEAST_GAIN
            ]
            if steps:
                rate, _, i = max(steps)
                heapq.heappush(heap, (-rate, layer, i))

        for layer in range(len(self._ways)):
            push(layer)
        while heap:
            _, layer, i = heapq.heappop(heap)
            way = self._ways[layer]
            cost = way.moves[i] - way.moves[now[layer]]
            if cost <= budget:
                budget -= cost
                now[layer] = i
                chosen[layer] = way.plans[i]
            push(layer)
        return chosen
