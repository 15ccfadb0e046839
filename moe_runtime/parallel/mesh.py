"""ProcessMesh: who is who in pp × dp × tp, with ep = dp·tp. Frozen integers, no communication."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_runtime.errors import ConfigError

Axis = Literal["world", "pp", "dp", "tp", "ep"]
AXES: tuple[Axis, ...] = ("world", "pp", "dp", "tp", "ep")


@dataclass(frozen=True, slots=True)
class ProcessMesh:
    """One rank's place: `rank = (pp_i·dp + dp_i)·tp + tp_i`; a pipeline stage's dp·tp ranks form its ep group."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    rank: int = 0
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "tp", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1. Set {name}=1 or more.")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank={self.rank}: must lie in 0..{self.world - 1} (world = pp·dp·tp = {self.world}).")

    @classmethod
    def enumerate(cls, *, pp: int = 1, dp: int = 1, tp: int = 1, ranks_per_node: int = 8) -> Iterator[ProcessMesh]:
        """The mesh as seen from each of its ranks, in rank order."""
        for rank in range(pp * dp * tp):
            yield cls(pp=pp, dp=dp, tp=tp, rank=rank, ranks_per_node=ranks_per_node)

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def ep(self) -> int:
        return self.dp * self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.ep

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        return -(-self.world // self.ranks_per_node)

    def ranks(self, axis: Axis) -> tuple[int, ...]:
        """World ranks of this rank's group along `axis`, in group order."""
        stage = self.pp_rank * self.ep
        match axis:
            case "world":
                return tuple(range(self.world))
            case "pp":
                return tuple(range(self.ep_rank, self.world, self.ep))
            case "dp":
                return tuple(range(stage + self.tp_rank, stage + self.ep, self.tp))
            case "tp":
                return tuple(range(self.rank - self.tp_rank, self.rank - self.tp_rank + self.tp))
            case "ep":
                return tuple(range(stage, stage + self.ep))

    def rank_in_group(self, axis: Axis) -> int:
        """This rank's index within `ranks(axis)`."""
        match axis:
            case "world":
                return self.rank
            case "pp":
                return self.pp_rank
            case "dp":
                return self.dp_rank
            case "tp":
                return self.tp_rank
            case "ep":
                return self.ep_rank
