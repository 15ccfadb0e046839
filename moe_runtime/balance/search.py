"""Local search on a placement: relieve the busiest rank of each layer, all layers at once.

V views of the load (time windows), L layers, E experts, D ranks, S slots of a rank, P = D × S.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from moe_runtime.balance.arrays import Bools, Grid, Ints
from moe_runtime.balance.neighbours import Neighbours

_LEAST_GAIN: Final = 1e-9
_EVEN: Final = 1.0002
"""A layer whose busiest rank has this many times the mean is done: 1.0 is out of reach, and time is not."""


class Search:
    """`views [V, L, E]`, each scaled by its own mean rank load; a copy of `slots [L, D, S]` is improved in place.

    `node [D]`: experts stay on ranks of their node. `apart`: no rank gets two replicas of one expert. A move is made
    only if every rank that it touches stays below the busiest rank before it, so the greatest load never grows.
    """

    def __init__(self, views: Grid, slots: Ints, *, node: Ints, apart: bool = True) -> None:
        layers, ranks, _ = slots.shape
        experts = views.shape[2]
        self.views, self.slots, self.apart = views, slots.copy(), apart
        index = slots.reshape(layers, -1) + np.arange(layers)[:, None] * experts
        self.counts: Ints = np.bincount(index.ravel(), minlength=layers * experts).reshape(layers, experts)
        self.holds: Bools = np.zeros((layers, ranks, experts), dtype=np.bool_)
        np.put_along_axis(self.holds, slots, True, axis=2)
        self.far: Bools | None = node[:, None] != node[None, :] if node[-1] else None
        self.most_replicas = int(np.bincount(node).max())
        self._live = np.arange(layers)

    def run(self, max_steps: int) -> Ints:
        """`step` until no layer moves; the slots."""
        for _ in range(max_steps):
            if not self.step().size:
                break
        return self.slots

    def step(self) -> Ints:
        """One move in every layer that still has a good one; those layers."""
        if not self._live.size:
            return self._live
        around = Neighbours(self, self._live)
        after, mine, place = around.best_swap()
        good = (after < around.top - _LEAST_GAIN) & (around.top > _EVEN)
        self._swap(around, np.flatnonzero(good), mine, place)
        stuck = np.flatnonzero(~good & (around.top > _EVEN))
        if stuck.size:
            good[stuck] = self._change_counts(self._live[stuck])
        self._live = self._live[good]
        return self._live

    def _swap(self, around: Neighbours, at: Ints, mine: Ints, place: Ints) -> None:
        rows, rank, mine = around.rows[at], around.rank[at], mine[at]
        other, slot = np.divmod(place[at], self.slots.shape[2])
        ours, theirs = self.slots[rows, rank, mine], self.slots[rows, other, slot]
        self._put(rows, rank, mine, theirs)
        self._put(rows, other, slot, ours)

    def _change_counts(self, rows: Ints) -> Bools:
        """The better of give and drop in each of `rows`; whether there was one."""
        around = Neighbours(self, rows)
        given, giver, place = around.best_give()
        dropped, loser, expert = around.best_drop()
        good: Bools = np.minimum(given, dropped) < around.top - _LEAST_GAIN
        at = np.flatnonzero(good & (given <= dropped))
        other, slot = np.divmod(place[at], self.slots.shape[2])
        self._put(rows[at], other, slot, self.slots[rows[at], around.rank[at], giver[at]])
        at = np.flatnonzero(good & (given > dropped))
        self._put(rows[at], around.rank[at], loser[at], expert[at])
        return good

    def _put(self, rows: Ints, rank: Ints, slot: Ints, expert: Ints) -> None:
        old = self.slots[rows, rank, slot]
        self.counts[rows, old] -= 1
        self.counts[rows, expert] += 1
        self.slots[rows, rank, slot] = expert
        self.holds[rows, rank, old] = (self.slots[rows, rank] == old[:, None]).any(axis=1)
        self.holds[rows, rank, expert] = True
