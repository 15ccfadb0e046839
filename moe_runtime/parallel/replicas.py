"""The replica that a token goes to, from device tables of one rank.

L layers, E logical experts, R replicas of the most replicated one, T tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from moe_kernels.gate import Replicas
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.types import NOWHERE, LogicalRouting, PhysicalRouting

if TYPE_CHECKING:
    from moe_runtime.parallel.placement import ExpertPlacement


class ReplicaChoice(StrEnum):
    """How a rank picks one of an expert's replicas."""

    STATIC = "static"
    """Always the same one, by a hash of the source rank."""
    ROUND_ROBIN = "round_robin"
    """In turn, by token index and k."""
    NEAREST = "nearest"
    """On the same rank, else on the same node, else as static."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaSelector:
    """One rank's tables. All have one entry more than there are experts: the last one is where id -1 lands."""

    ep_rank: int
    identity: tuple[bool, ...]
    """Layers in which slot i holds expert i and nothing else: ids pass through."""
    fixed: Tensor
    """[L, E+1] int64: the replica of every expert where it does not depend on the token."""
    rotating: tuple[Tensor | None, ...]
    """Per layer `[E+1, R] int64` where replicas take turns; None where `fixed` holds."""
    replica_counts: Tensor
    """[L, E+1] int64."""

    @classmethod
    def build(
        cls,
        placement: ExpertPlacement,
        ep_rank: int,
        *,
        choice: ReplicaChoice,
        ranks_per_node: int,
        device: torch.device | str,
    ) -> ReplicaSelector:
        if not 0 <= ep_rank < placement.ep:
            raise ConfigError(f"ep_rank={ep_rank}: must lie in 0..{placement.ep - 1}.")
        fixed = _pad_last(_fixed_replicas(placement, ep_rank, ranks_per_node, choice), NOWHERE)
        turns = choice is ReplicaChoice.ROUND_ROBIN
        spare = (placement.logcnt > 1).any(dim=1).tolist()
        order = torch.arange(placement.num_physical)
        same = (placement.phy2log == order).all(dim=1) & (placement.num_physical == placement.num_logical)
        log2phy = torch.cat([placement.log2phy, torch.full_like(placement.log2phy[:, :1], NOWHERE)], dim=1)
        return cls(
            ep_rank=ep_rank,
            identity=tuple(same.tolist()),
            fixed=fixed.to(device),
            rotating=tuple(log2phy[i].to(device) if turns and spare[i] else None for i in range(len(spare))),
            replica_counts=_pad_last(placement.logcnt, 1).to(device),
        )

    def replicas(self, layer: int) -> Replicas | None:
        """What `to_physical` reads, for a kernel that places tokens itself; None where ids pass through."""
        if self.identity[layer]:
            return None
        table = self.rotating[layer]
        if table is None:
            return Replicas(self.fixed[layer].unsqueeze(1))
        return Replicas(table, self.replica_counts[layer], self.ep_rank)

    def to_physical(self, layer: int, routing: LogicalRouting) -> PhysicalRouting:
        """Replace logical by physical ids; NOWHERE stays."""
        ids = routing.expert_ids
        if self.identity[layer]:
            return PhysicalRouting(ids, routing.weights)
        table = self.rotating[layer]
        if table is None:
            # `take` wraps negative indices: -1 reads the last entry, which is NOWHERE.
            return PhysicalRouting(torch.take(self.fixed[layer], ids), routing.weights)
        tokens, top_k = ids.shape
        turn = torch.arange(self.ep_rank, self.ep_rank + tokens, device=ids.device)
        turn = turn.unsqueeze(1) + torch.arange(top_k, device=ids.device)
        replica = turn % torch.take(self.replica_counts[layer], ids)
        return PhysicalRouting(torch.take(table, torch.add(replica, ids, alpha=table.shape[1])), routing.weights)


def _fixed_replicas(placement: ExpertPlacement, ep_rank: int, ranks_per_node: int, choice: ReplicaChoice) -> Tensor:
    """[L, E] int64: of each expert's replicas the closest class, and within it the first from the rank's turn on."""
    slots = placement.log2phy
    if slots.shape[2] == 1:
        return slots[:, :, 0].contiguous()
    count = placement.logcnt.unsqueeze(2)
    # Fibonacci hashing: ranks at any constant stride (the first of each tp group) spread evenly over the replicas.
    turn = (ep_rank * 2654435761 % 2**32 * count) >> 32
    behind = (torch.arange(slots.shape[2]) - turn) % count
    if choice is ReplicaChoice.NEAREST:
        owners = slots // placement.num_local
        far = (owners != ep_rank).long() + (owners // ranks_per_node != ep_rank // ranks_per_node).long()
        behind = behind + far * placement.num_physical
    behind = behind.masked_fill(slots == NOWHERE, torch.iinfo(torch.int64).max)
    return slots.gather(2, behind.argmin(dim=2, keepdim=True)).squeeze(2)


def _pad_last(table: Tensor, value: int) -> Tensor:
    return torch.nn.functional.pad(table, (0, 1), value=value)
