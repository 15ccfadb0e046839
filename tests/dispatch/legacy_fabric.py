"""DeepEP V1's adapter over its double, for the programs of contract.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import Layout, Phase
from moe_runtime.dispatch.deep_ep.legacy import LegacyDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from tests.dispatch.contract import Backend, Case, make_case
from tests.doubles.deep_ep.legacy import Library
from tests.doubles.fabric_group import FabricGroup


@dataclass(frozen=True)
class Fabric(Backend):
    """Buffers for `case`; `capacity` of decode steps, where it is not the case's."""

    name: str = "deep_ep V1"
    layout: Layout = Layout.GROUPED
    case: Case = field(kw_only=True)
    library: Library = field(kw_only=True, default_factory=Library)
    quantize: bool = False
    ue8m0: bool = False
    ranks_per_node: int = 8

    def __str__(self) -> str:
        return f"{self.name}, {self.case.phase}"

    def rows(self, slots: int) -> RowLayout:
        return RowLayout(slots, self.layout, self.alignment, quantize=self.quantize, ue8m0=self.ue8m0)

    def spec(self, ep: int, slots: int) -> DispatchSpec:
        return DispatchSpec(
            ep=ep,
            rows=self.rows(slots),
            hidden=self.case.x[0].shape[1],
            dtype=torch.bfloat16,
            top_k=self.case.routing[0].expert_ids.shape[1],
            max_tokens=max(1, self.case.capacity),
            max_decode_tokens=max(1, self.case.capacity),
            in_flight=2,
        )

    def make(self, ep: Communicator, slots: int) -> LegacyDispatcher:
        return LegacyDispatcher(
            ep,
            self.spec(ep.size, slots),
            library=self.library,
            group=FabricGroup(ep),
            ranks_per_node=self.ranks_per_node,
        )


def on_ranks(size: int, program: Callable[[Communicator], object]) -> list[object]:
    """`program` on every rank of a virtual ep group."""
    with VirtualCluster(size, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=size)
        return cluster.run(lambda rank: program(groups[rank].ep))


def bf16_case(size: int, phase: Phase, *, slots: int = 2, top_k: int = 2, tokens: int = 3, hidden: int = 16) -> Case:
    """A few tokens on each rank, of which the last goes nowhere."""
    case = make_case(
        ep=size,
        slots=slots,
        top_k=top_k,
        tokens=[tokens] * size,
        hidden=hidden,
        padding=1,
        dtype=torch.bfloat16,
    )
    return replace(case, phase=phase)
