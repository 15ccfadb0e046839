"""Which experts get copies, and on which ranks the copies go: the start placement, before any load is measured."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate


def replicate(loads: Sequence[float], homes: Sequence[int], num_copies: int) -> list[int]:
    """The expert of each copy: always the one with most load per replica.

    Ties go to the first expert of each rank, then to the second of each, …: copies of one rank's experts cannot stay
    on that rank, so an even mix is what other ranks have room for.
    """
    firsts = accumulate(homes[:-1], initial=0)
    turn = sorted((i, first + i) for first, count in zip(firsts, homes, strict=True) for i in range(count))
    heap = [(-loads[expert], place, expert, 1) for place, (_, expert) in enumerate(turn)]
    heapq.heapify(heap)
    copies = []
    for _ in range(num_copies):
        _, place, expert, replicas = heap[0]
        copies.append(expert)
        heapq.heapreplace(heap, (-loads[expert] / (replicas + 1), place, expert, replicas + 1))
    return copies


def home_counts(num_experts: int, num_ranks: int) -> list[int]:
    """Experts in order over ranks: shares differ by at most one, larger shares first."""
    share, rest = divmod(num_experts, num_ranks)
    return [share + (rank < rest) for rank in range(num_ranks)]


def spread(homes: Sequence[int], copies: Sequence[int], slots: int) -> list[list[int]]:
    """Experts of each rank, `slots` each: its home experts in order, then copies.

    A copy never joins a replica of its own on a rank unless no arrangement avoids it: an augmenting path moves
    earlier copies aside (bipartite matching of copies to ranks, O(copies · ranks) each at worst).
    """
    shelves = _Shelves(homes, slots)
    for copy in copies:
        if not shelves.place(copy, set()):
            shelves.append(min(shelves.roomy, key=lambda i: len(shelves.ranks[i])), copy)
    return shelves.ranks


class _Shelves:
    """The ranks' experts while they are filled. `roomy`: ranks with a free slot, in order."""

    def __init__(self, homes: Sequence[int], slots: int) -> None:
        ends = list(accumulate(homes))
        self.homes = homes
        self.slots = slots
        self.ranks = [list(range(end - count, end)) for end, count in zip(ends, homes, strict=True)]
        self.roomy = [i for i, count in enumerate(homes) if count < slots]
        self._held = [set(rank) for rank in self.ranks]

    def append(self, i: int, copy: int) -> None:
        self.ranks[i].append(copy)
        self._held[i].add(copy)
        if len(self.ranks[i]) == self.slots:
            self.roomy.remove(i)

    def place(self, copy: int, visited: set[int]) -> bool:
        """Put `copy` on a rank without it, moving other copies if need be; False (and no change) if there is no way."""
        for i in self.roomy:
            if copy not in self._held[i] and i not in visited:
                self.append(i, copy)
                return True
        for i, held in enumerate(self._held):
            if copy in held or i in visited:
                continue
            visited.add(i)
            for position in range(self.homes[i], self.slots):
                moved = self.ranks[i][position]
                if self.place(moved, visited):
                    self.ranks[i][position] = copy
                    self._held[i] = set(self.ranks[i])
                    return True
        return False
