"""What stands for a process group of NCCL in doubles of fabrics: a group of ranks over any communicator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator


@dataclass(frozen=True)
class FabricGroup:
    """`backend` is what the real group's device backend would be."""

    ep: Communicator
    backend: str = "nccl"

    def rank(self) -> int:
        return self.ep.rank

    def size(self) -> int:
        return self.ep.size

    def scatter_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """`rows[r] [n_r, ...]` to each rank r; what each rank sent here, in rank order. Any dtype, collective."""
        received = [counts[self.ep.rank] for counts in self.ep.exchange([len(block) for block in rows])]
        wire = self.ep.all_to_all(torch.cat(rows), [len(block) for block in rows], received)
        return list(torch.split(wire, received))
