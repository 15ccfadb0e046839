"""torch's symmetric memory dispatcher over its double, as the contract's programs take backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Layout
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.dispatch.symm_mem.dispatcher import SymmMemDispatcher
from tests.dispatch.contract import Case
from tests.doubles.fabric_group import FabricGroup
from tests.doubles.symm_mem import SymmMem, symm_mem_clauses


@dataclass(frozen=True)
class NamedGroup(FabricGroup):
    group_name: str = "ep"


@dataclass(frozen=True)
class Symmetric:
    """For the sizes of `case`; `without` names clauses that are off."""

    case: Case
    layout: Layout = Layout.GROUPED
    alignment: int = 1
    in_flight: int = 1
    quantize: bool = False
    ue8m0: bool = False
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"symm_mem-{self.layout}-{self.alignment}"

    def spec(self, ep: int) -> DispatchSpec:
        return DispatchSpec(
            ep=ep,
            rows=RowLayout(self.case.slots, self.layout, self.alignment, self.quantize, self.ue8m0),
            hidden=self.case.x[0].shape[1],
            dtype=self.case.x[0].dtype,
            top_k=self.case.routing[0].expert_ids.shape[1],
            max_tokens=max(1, self.case.capacity),
            max_decode_tokens=max(1, self.case.capacity // 2),
            in_flight=self.in_flight,
        )

    def library(self, ep: Communicator) -> SymmMem:
        """A process's library, the clauses of `without` off for good."""
        clauses = symm_mem_clauses()
        clauses._off.update(self.without)
        return SymmMem(ep, clauses)

    def make(self, ep: Communicator, slots: int) -> SymmMemDispatcher:
        return self.make_with(self.library(ep), ep)

    def make_with(self, library: Any, ep: Communicator) -> SymmMemDispatcher:
        device = torch.device("cpu")
        return SymmMemDispatcher(ep, self.spec(ep.size), library=library, group=NamedGroup(ep), device=device)
