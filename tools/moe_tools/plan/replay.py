"""Routes run through the project's own placement and replica choice; every rank's rows and copies counted exactly.

S ep ranks, E slots of a rank, P = S·E slots, T tokens, K experts of a token, M nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.balance.replay import distinct
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector
from moe_runtime.types import LogicalRouting


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What one layer's dispatch moves."""

    slot_rows: Tensor
    """[S, E] int64: rows that each slot receives"""
    copies: Tensor
    """[S, S] int64: assignments from home rank to serving rank"""
    rank_copies: Tensor
    """[S, S] int64: tokens of which a rank receives at least one assignment"""
    node_copies: Tensor
    """[S, M] int64: the same for nodes"""

    @property
    def rows(self) -> Tensor:
        """[S] int64: rows that each rank receives."""
        return self.slot_rows.sum(1)

    @property
    def active(self) -> Tensor:
        """[S] int64: slots with any row, whose weights are read."""
        return (self.slot_rows > 0).sum(1)

    @property
    def imbalance(self) -> float:
        """Rows of the busiest rank over the mean."""
        rows = self.rows.double()
        return float(rows.max() / rows.mean()) if rows.sum() else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A placement with the selectors of all its ranks."""

    placement: ExpertPlacement
    ranks_per_node: int
    selectors: tuple[ReplicaSelector, ...]

    @classmethod
    def of(cls, placement: ExpertPlacement, *, choice: str, ranks_per_node: int) -> Replay:
        kind = ReplicaChoice(choice)
        ranks = range(placement.ep)
        made = [placement.selector(rank, choice=kind, ranks_per_node=ranks_per_node) for rank in ranks]
        return cls(placement, ranks_per_node, tuple(made))

    def count(self, layer: int, batches: Sequence[Tensor]) -> Counts:
        """One dispatch of placement layer `layer`: `batches[rank] [T, K] int64` logical ids of each rank's tokens."""
        ranks = self.placement.ep
        slots = [self._slots(rank, layer, ids) for rank, ids in enumerate(batches)]
        tokens = torch.tensor([len(own) for own in slots])
        home = torch.arange(ranks).repeat_interleave(tokens).unsqueeze(1)
        return self._counts(torch.cat(slots), home)

    def count_even(self, layer: int, ids: Tensor) -> Counts:
        """`ids [T, K]` in equal parts on all ranks; ranks take them in order, the first ones one more where needed."""
        return self.count(layer, torch.tensor_split(ids, self.placement.ep))

    def _slots(self, rank: int, layer: int, ids: Tensor) -> Tensor:
        routing = LogicalRouting(ids, torch.empty(0))  # weights have no say in where a token goes
        return self.selectors[rank].to_physical(layer, routing).expert_ids

    def _counts(self, slots: Tensor, home: Tensor) -> Counts:
        ranks, per_rank = self.placement.ep, self.placement.num_local
        nodes = -(-ranks // self.ranks_per_node)
        real = slots >= 0
        serving = torch.where(real, slots // per_rank, ranks)  # one column more takes what goes nowhere
        by_slot = torch.bincount(slots[real], minlength=ranks * per_rank).view(ranks, per_rank)
        pairs = torch.bincount((home * (ranks + 1) + serving).flatten(), minlength=ranks * (ranks + 1))
        node = torch.where(real, serving // self.ranks_per_node, nodes)
        return Counts(
            slot_rows=by_slot,
            copies=pairs.view(ranks, ranks + 1)[:, :ranks].contiguous(),
            rank_copies=distinct(home, serving, ranks, ranks),
            node_copies=distinct(home, node, ranks, nodes),
        )
