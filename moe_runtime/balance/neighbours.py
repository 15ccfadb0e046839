"""The moves that relieve the busiest rank of each layer, and the load that they leave.

Of n layers at once: V views, E experts, D ranks, S slots of a rank, P = D × S. Each method returns the greatest load of
the ranks touched `[n]` (infinite where no such move is allowed) and the move. Loads in units of the mean rank load.

The load of "other ranks that hold an expert" is taken as if the busiest of them gained: never too low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.balance.arrays import Bools, Grid, Ints

if TYPE_CHECKING:
    from moe_runtime.balance.search import Search

Move = tuple[Grid, Ints, Ints]


class Neighbours:
    """`rows [n]` of a search. `rank [n]` is each layer's busiest rank in any view, `top [n]` its load there."""

    def __init__(self, search: Search, rows: Ints) -> None:
        self.search, self.rows = search, rows
        n, (ranks, size) = len(rows), search.slots.shape[1:]
        self.at = np.arange(n)
        self.size = size
        self.flat = search.slots[rows].reshape(n, ranks * size)
        self.views, self.counts = search.views[:, rows], search.counts[rows]
        self.each = np.take_along_axis(self.views / self.counts, self.flat[None], axis=2)
        self.totals = self.each.reshape(-1, n, ranks, size).sum(axis=3)
        peak = self.totals.max(axis=0)
        self.rank = peak.argmax(axis=1)
        self.top: Grid = peak[self.at, self.rank]
        self.mine = search.slots[rows, self.rank]
        self.own = self.each.reshape(-1, n, ranks, size)[:, self.at, self.rank]
        self.busy = self.totals[:, self.at, self.rank]

    def best_swap(self) -> Move:
        """(load after, slot of the busiest rank `[n]`, place 0..P-1 of the other replica `[n]`)."""
        totals, shape = self._of_slots(self.totals), (len(self.at), self.size, self.flat.shape[1])
        worst, gain, left = np.full(shape, -np.inf), np.empty(shape), np.empty(shape)
        for view in range(len(totals)):  # one after the other, so that the arrays stay in the cache
            np.subtract(self.own[view][..., None], self.each[view][:, None], out=gain)
            np.add(totals[view][:, None], gain, out=left)
            np.maximum(worst, left, out=worst)
            np.subtract(self.busy[view][:, None, None], gain, out=left)
            np.maximum(worst, left, out=worst)
        if self.search.apart:  # among them all of the busiest rank itself
            self._forbid(worst, self._held_here()[:, None])
            self._forbid(worst, self._of_slots(self._held_there()))
        self._forbid(worst, self._outside()[:, None])
        return self._best(worst)

    def best_give(self) -> Move:
        """(load after, slot of the busiest rank whose expert gets a replica, place 0..P-1 that it takes)."""
        counts = np.take_along_axis(self.counts, self.mine, axis=1)
        spare = np.take_along_axis(self.counts, self.flat, axis=1)
        relief = self.own / (counts + 1)  # w/c - w/(c+1)
        more = self.each / np.maximum(spare - 1, 1)  # w/(c-1) - w/c
        others = np.take_along_axis(self._others(), self.flat[None], axis=2)
        after = (self._of_slots(self.totals) - self.each)[:, :, None] + (self.own - relief)[..., None]
        np.maximum(after, (others + more)[:, :, None], out=after)
        here = np.where(self._held_here(), more, 0.0)
        np.maximum(after, self.busy[:, :, None, None] - relief[..., None] + here[:, :, None], out=after)
        worst = after.max(axis=0)
        if self.search.apart:
            self._forbid(worst, self._of_slots(self._held_there()))
            self._forbid(worst, (counts >= self.search.most_replicas)[..., None])
        self._forbid(worst, (self._outside() | (spare < 2))[:, None])
        return self._best(worst)

    def best_drop(self) -> Move:
        """(load after, slot of the busiest rank that is emptied, expert that moves in)."""
        counts = np.take_along_axis(self.counts, self.mine, axis=1)
        more = self.own / np.maximum(counts - 1, 1)
        others = np.take_along_axis(self._others(), self.mine[None], axis=2)
        lighter = self.views / (self.counts + 1)
        after = (self.busy[..., None] - self.own)[..., None] + lighter[:, :, None]
        np.maximum(after, (others + more)[..., None], out=after)
        worst = after.max(axis=0)
        if self.search.apart:
            self._forbid(worst, self.search.holds[self.rows, self.rank][:, None])
            self._forbid(worst, (self.counts >= self.search.most_replicas)[:, None])
        if self.search.far is not None:
            near = self.search.holds[self.rows] & ~self.search.far[self.rank][..., None]
            self._forbid(worst, ~near.any(axis=1)[:, None])
        self._forbid(worst, (counts < 2)[..., None])
        return self._best(worst)

    def _others(self) -> Grid:
        """[V, n, E]: the busiest of the ranks that hold an expert, the busiest rank of all aside."""
        totals = self.totals.copy()
        totals[:, self.at, self.rank] = -np.inf
        experts = self.views.shape[2]
        index = self.flat + self.at[:, None] * experts
        out = np.full((len(totals), len(self.at) * experts), -np.inf)
        for row, values in zip(out, self._of_slots(totals), strict=True):
            np.maximum.at(row, index.ravel(), values.ravel())
        return out.reshape(self.views.shape)

    def _of_slots(self, ranks: Grid | Bools) -> Grid:
        """[…, D] -> […, P]"""
        return np.repeat(ranks, self.size, axis=-1)

    def _held_here(self) -> Bools:
        """[n, P]: the busiest rank holds that slot's expert."""
        held: Bools = self.search.holds[self.rows[:, None], self.rank[:, None], self.flat]
        return held

    def _held_there(self) -> Bools:
        """[n, S, D]: that rank holds the expert in the busiest rank's slot."""
        held: Bools = self.search.holds[self.rows[:, None], :, self.mine]
        return held

    def _outside(self) -> Bools:
        """[n, P]: slots of the busiest rank itself and of other nodes."""
        far = np.arange(self.totals.shape[2]) == self.rank[:, None]
        if self.search.far is not None:
            far = far | self.search.far[self.rank]
        outside: Bools = np.repeat(far, self.size, axis=1)
        return outside

    @staticmethod
    def _forbid(worst: Grid, where: Bools | Grid) -> None:
        np.copyto(worst, np.inf, where=where.astype(np.bool_, copy=False))

    def _best(self, worst: Grid) -> Move:
        flat = worst.reshape(len(worst), -1)
        best = flat.argmin(axis=1)
        mine, place = np.divmod(best, worst.shape[2])
        return flat[self.at, best], mine, place
