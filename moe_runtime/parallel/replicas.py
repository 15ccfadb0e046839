"""The replica that a token goes to, from device tables of one rank.

L layers, E logical experts, R replicas of the most replicated one, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from moe_kernels.gate import Replicas
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.waterfill import Waterfill
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
    WATERFILL = "waterfill"
    """By the step's own counts: what a rank sends evens out over ranks."""


@dataclass(frozen=True, slots=True)
class TableRule:
    """How a rank's tables follow from a placement."""

    ep: int
    ep_rank: int
    num_logical: int
    choice: ReplicaChoice
    ranks_per_node: int


LayerTables = tuple[Tensor, ...]
"""One layer's tables: `fixed`, `replica_counts`, then `rotating` and those of `waterfill` where there are such."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaSelector:
    """One rank's tables. All have one entry more than there are experts: the last one is where id -1 lands.

    Those made to be rewritten (`rule`) have shapes that hold any placement of the same slots: no layer passes ids
    through, and R is P - E + 1, which is as many replicas as an expert can have. What a captured graph reads of them
    stays where it is.
    """

    ep_rank: int
    identity: tuple[bool, ...]
    """Layers in which slot i holds expert i and nothing else: ids pass through."""
    fixed: Tensor
    """[L, E+1] int64: the replica of every expert where it does not depend on the token."""
    rotating: tuple[Tensor | None, ...]
    """Per layer `[E+1, R] int64` where replicas take turns; None where `fixed` holds."""
    replica_counts: Tensor
    """[L, E+1] int64."""
    rule: TableRule | None = None
    """Where the tables can be rewritten."""
    waterfill: Waterfill | None = None
    """Where the step's counts choose."""

    @classmethod
    def build(
        cls,
        placement: ExpertPlacement,
        ep_rank: int,
        *,
        choice: ReplicaChoice,
        ranks_per_node: int,
        device: torch.device | str,
        rewritable: bool = False,
    ) -> ReplicaSelector:
        if not 0 <= ep_rank < placement.ep:
            raise ConfigError(f"ep_rank={ep_rank}: must lie in 0..{placement.ep - 1}.")
        fixed = _pad_last(_fixed_replicas(placement, ep_rank, ranks_per_node, choice), NOWHERE)
        turns = choice is ReplicaChoice.ROUND_ROBIN
        spare = (placement.logcnt > 1).any(dim=1).tolist()
        order = torch.arange(placement.num_physical)
        same = (placement.phy2log == order).all(dim=1) & (placement.num_physical == placement.num_logical)
        log2phy = torch.cat([placement.log2phy, torch.full_like(placement.log2phy[:, :1], NOWHERE)], dim=1)
        if rewritable:
            missing = placement.num_physical - placement.num_logical + 1 - log2phy.shape[2]
            log2phy = torch.nn.functional.pad(log2phy, (0, missing), value=NOWHERE)
            same, spare = torch.zeros_like(same), [log2phy.shape[2] > 1] * len(spare)
        levels = None
        if choice is ReplicaChoice.WATERFILL and any(spare):
            levels = Waterfill.build(placement, ep_rank, num_replicas=log2phy.shape[2], device=device)
        return cls(
            ep_rank=ep_rank,
            identity=tuple(same.tolist()),
            fixed=fixed.to(device),
            rotating=tuple(log2phy[i].to(device) if turns and spare[i] else None for i in range(len(spare))),
            replica_counts=_pad_last(placement.logcnt, 1).to(device),
            rule=TableRule(placement.ep, ep_rank, placement.num_logical, choice, ranks_per_node)
            if rewritable
            else None,
            waterfill=levels,
        )

    def tables(self, placement: ExpertPlacement) -> LayerTables:
        """What `write_` puts in place for the only layer of `placement`; on CPU."""
        rule = self._rule
        assert (placement.num_layers, placement.num_logical, placement.ep) == (1, rule.num_logical, rule.ep)
        made = ReplicaSelector.build(
            placement,
            rule.ep_rank,
            choice=rule.choice,
            ranks_per_node=rule.ranks_per_node,
            device="cpu",
            rewritable=True,
        )
        return made.of_layer(0)

    def of_layer(self, layer: int) -> LayerTables:
        """A layer's tables where they are in memory."""
        rotating = self.rotating[layer]
        turns = () if rotating is None else (rotating,)
        levels = () if self.waterfill is None else tuple([table[layer] for table in self.waterfill.tables])
        return (self.fixed[layer], self.replica_counts[layer], *turns, *levels)

    def write_(self, layer: int, tables: LayerTables) -> None:
        """Rewrite a layer's tables, in place: steps that begin afterwards read the new ones, captured ones too."""
        assert self.rule is not None, "these tables were not made to be rewritten"
        for mine, new in zip(self.of_layer(layer), tables, strict=True):
            mine.copy_(new)

    @property
    def addresses(self) -> Sequence[int]:
        """Where the tables are."""
        levels = () if self.waterfill is None else self.waterfill.tables
        tables = (self.fixed, self.replica_counts, *self.rotating, *levels)
        return [table.data_ptr() for table in tables if table is not None]

    @property
    def _rule(self) -> TableRule:
        assert self.rule is not None, "these tables were not made to be rewritten"
        return self.rule

    @property
    def by_counts(self) -> bool:
        """Replicas depend on all of a step's tokens: `to_physical` chooses them, no kernel that places one by one."""
        return self.waterfill is not None

    def replicas(self, layer: int) -> Replicas | None:
        """What `to_physical` reads, for a kernel that places tokens itself; None where it is to leave the ids as they
        are: where slots are experts, and where `by_counts` holds."""
        if self.identity[layer] or self.by_counts:
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
        if self.waterfill is not None:
            return PhysicalRouting(self.waterfill.choose(layer, ids), routing.weights)
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
