"""NVSHMEM's dispatchers over its double, as the contract's programs take backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Layout
from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
from moe_runtime.dispatch.nvshmem.host import HostDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from tests.dispatch.contract import Case
from tests.doubles.nvshmem import Core
from tests.doubles.nvshmem.clauses import nvshmem_clauses

PATHS: dict[str, Callable[..., Any]] = {"host": HostDispatcher, "device": DeviceDispatcher}


@dataclass(frozen=True)
class Nvshmem:
    """`path` for the sizes of `case`; `without` names clauses that are off."""

    path: str
    case: Case
    layout: Layout = Layout.GROUPED
    alignment: int = 1
    in_flight: int = 1
    quantize: bool = False
    ue8m0: bool = False
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"nvshmem {self.path}-{self.layout}-{self.alignment}"

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

    def core(self, ep: Communicator) -> Core:
        """A process's library, the clauses of `without` off for good."""
        clauses = nvshmem_clauses()
        clauses._off.update(self.without)
        return Core(ep, clauses)

    def make(self, ep: Communicator, slots: int) -> Any:
        return self.make_with(self.core(ep), ep)

    def make_with(self, core: Core, ep: Communicator) -> Any:
        return partial(PATHS[self.path], library=core, group=None, device=torch.device("cpu"))(ep, self.spec(ep.size))
