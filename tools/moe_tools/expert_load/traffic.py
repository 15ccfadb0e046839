"""Rows from rank to rank under a placement: sent again from their homes where routes are known, else estimated.

S ep ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.balance.replay import Replayed

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Rows of one dispatch direction, all windows and layers together: one per assignment, to its replica's rank."""

    ranks: Ints
    """[S, S]: from the token's home rank to the expert's"""
    ranks_per_node: int
    to_ranks: int | None
    """Rows if a token travelled once to each other rank that it needs; None where routes are not known"""
    to_nodes: int | None
    """Rows if it travelled once to each other node"""

    @classmethod
    def replayed(cls, found: Replayed, ranks_per_node: int) -> Traffic:
        nodes = found.node_copies.numpy()
        own = np.arange(len(nodes)) // ranks_per_node == np.arange(nodes.shape[1])[:, None]
        once = found.rank_copies.numpy()
        return cls(
            found.copies.numpy(),
            ranks_per_node,
            int(once.sum() - np.trace(once)),
            int(nodes.sum() - nodes[own.T].sum()),
        )

    @classmethod
    def even(cls, rows: NDArray[np.float64], ranks_per_node: int) -> Traffic:
        """An estimate from the rows that each rank receives, `[S]`: all ranks send alike."""
        ranks = len(rows)
        return cls(np.rint(np.tile(rows / ranks, (ranks, 1))).astype(np.int64), ranks_per_node, None, None)

    @property
    def exact(self) -> bool:
        """Row for row, from the routes; else the estimate."""
        return self.to_ranks is not None

    @property
    def nodes(self) -> Ints:
        """[nodes, nodes] rows."""
        return by_node(self.ranks, self.ranks_per_node)

    @property
    def total(self) -> int:
        return int(self.ranks.sum())

    @property
    def off_rank(self) -> int:
        """Rows for another rank than their home."""
        return self.total - int(np.trace(self.ranks))

    @property
    def off_node(self) -> int:
        """Rows for another node."""
        return self.total - int(np.trace(self.nodes))

    @property
    def busiest(self) -> int:
        """Rows from other ranks that the rank with most of them receives."""
        return int((self.ranks.sum(axis=0) - np.diag(self.ranks)).max())


def by_node(matrix: Ints, ranks_per_node: int) -> Ints:
    """[S, S] between ranks → [nodes, nodes]."""
    starts = np.arange(0, len(matrix), ranks_per_node)
    return np.asarray(np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1))
