"""Which experts get copies, and on which ranks the copies go: the start placement, before any load is measured."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def replicate(loads: Sequence[float], homes: Sequence[int], num_copies: int) -> list[int]:
    """The expert of each copy: always the one with most load per replica.

    Ties go to the first expert of each rank, then to the second of each, …: copies of one rank's experts cannot stay
    on that rank, so an even mix is what other ranks have room for.
    """
    firsts = [sum(homes[:rank]) for rank in range(len(homes))]
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
    ranks: list[list[int]] = []
    for count in homes:
        first = sum(len(rank) for rank in ranks)
        ranks.append(list(range(first, first + count)))
    for copy in copies:
        if not _place(copy, ranks, homes, slots, set()):
            min((rank for rank in ranks if len(rank) < slots), key=len).append(copy)
    return ranks


def _place(copy: int, ranks: list[list[int]], homes: Sequence[int], slots: int, visited: set[int]) -> bool:
    """Put `copy` on a rank without it, moving other copies if need be; False (and no change) if there is no way."""
    open_ranks = [i for i, rank in enumerate(ranks) if copy not in rank and i not in visited]
    for i in open_ranks:
        if len(ranks[i]) < slots:
            ranks[i].append(copy)
            return True
    for i in open_ranks:
        if i in visited:
            continue
        visited.add(i)
        for position in range(homes[i], slots):
            if _place(ranks[i][position], ranks, homes, slots, visited):
                ranks[i][position] = copy
                return True
    return False
