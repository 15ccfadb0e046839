"""Dispatchers with one rank on a GPU: compared with `local`, then timed. T tokens, H hidden, K top-k, E slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.process import host_store, init_process
from moe_runtime.comm.torch_dist import torch_dist_groups
from moe_runtime.dispatch.base import Dispatcher, DispatchStep, PaddedRows, Phase, Rows
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.local import LocalDispatcher
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.launch.env import gloo_on_loopback
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.types import PhysicalRouting
from moe_tools.bench.fabric.clock import TURNS, by_events
from moe_tools.bench.fabric.parts import Measured
from moe_tools.bench.timing import measure

DEADLINE_S: Final = 40.0
_STEP: Final = 2.0**-5


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one dispatch; experts chosen at random, K of all ranks' for each token."""

    phase: Phase
    tokens: int
    hidden: int = 7168
    top_k: int = 8
    slots: int = 32
    dtype: torch.dtype = torch.bfloat16
    ep: int = 1

    @property
    def payload(self) -> int:
        """Bytes of the rows that go to the experts and come back, each assignment once each way."""
        return 2 * self.tokens * self.top_k * self.hidden * self.dtype.itemsize

    @property
    def spec(self) -> DispatchSpec:
        return DispatchSpec(
            ep=self.ep, rows=RowLayout(self.slots), hidden=self.hidden, dtype=self.dtype, top_k=self.top_k,
            max_tokens=self.tokens, max_decode_tokens=self.tokens,
        )  # fmt: skip

    def named(self, backend: str) -> dict[str, int | str]:
        return {"dispatch": backend, "phase": self.phase.value, "tokens": self.tokens}


DECODE: Final = Shape(Phase.DECODE, 128)
PREFILL: Final = Shape(Phase.MIXED, 4096)
SHAPES: Final = (DECODE, PREFILL)


@dataclass(frozen=True, slots=True)
class Work:
    """One dispatch and combine with experts that scale by slot."""

    shape: Shape
    x: Tensor
    routing: PhysicalRouting
    first_slot: int = 0

    @staticmethod
    def random(shape: Shape, device: torch.device | str, *, rank: int = 0) -> Work:
        """Other tokens on each rank."""
        generator = torch.Generator().manual_seed(rank)
        scores = torch.rand(shape.tokens, shape.ep * shape.slots, generator=generator)
        weights = torch.rand(shape.tokens, shape.top_k, generator=generator)
        ids = scores.topk(shape.top_k, dim=1).indices
        x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(shape.dtype)
        routing = PhysicalRouting(ids.to(device), weights.to(device))
        return Work(shape, x.to(device), routing, first_slot=rank * shape.slots)

    def through(self, dispatcher: Dispatcher[Any], *, first_slot: int | None = None) -> Tensor:
        """`[T, H]`."""
        step = DispatchStep(self.shape.tokens, self.shape.phase)
        rows, handle = dispatcher.dispatch_begin(self.x, self.routing, step).wait()
        first = self.first_slot if first_slot is None else first_slot
        return dispatcher.combine_begin(scaled_by_slot(rows, first), handle).wait()

    def check(self, dispatcher: Dispatcher[Any]) -> str:
        """Compare with `local`, to the bit where the backend promises it; says how. AssertionError where it differs."""
        local = LocalDispatcher(RowLayout(self.shape.ep * self.shape.slots), device=self.x.device)
        found, expected = self.through(dispatcher), self.through(local, first_slot=0)
        capabilities = dispatcher.capabilities
        if capabilities.sums_at_home:
            differ = int((found != expected).sum())
            assert not differ, f"{differ} of {found.numel()} values differ from local's"
            return "bits of local"
        away = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
        bound = capabilities.tolerance + torch.finfo(found.dtype).eps
        assert away <= bound, f"{away:.3g} away from local, at most {bound:.3g}"
        return f"{away:.1g} away from local"


def scaled_by_slot(rows: Rows, first_slot: int = 0) -> Tensor:
    """Outputs shaped as the rows' data, another factor for each slot, weighted where the backend wants it; the host
    waits for nothing."""
    data = rows.data
    if isinstance(rows, PaddedRows):
        slot = torch.arange(data.shape[0], device=data.device).view(-1, 1, 1)
    else:
        starts = (rows.psum[:-1] + rows.alignment - 1).div(rows.alignment, rounding_mode="floor") * rows.alignment
        slot = torch.searchsorted(
            starts, torch.arange(data.shape[0], device=data.device, dtype=torch.int32), right=True
        )
        slot = slot.view(-1, 1)
    out = data.float() * (1 + (first_slot + slot) * _STEP)
    return (out if rows.weights is None else out * rows.weights.unsqueeze(-1)).to(data.dtype)


def exercise(name: str, dispatcher: Dispatcher[Any], shape: Shape) -> Measured:
    """Checked twice, so that what one dispatch leaves behind is seen, and timed on the current CUDA device: as a graph
    where the backend says that decode steps can be captured."""
    with torch.inference_mode():
        work = Work.random(shape, "cuda")
        checked = [work.check(dispatcher) for _ in range(2)][-1]
        if dispatcher.capabilities.graph_safe:
            timing = measure({name: lambda: work.through(dispatcher)}, turns=TURNS)[name]
            us, graph = (timing.us, timing.low_us, timing.high_us), timing.graph
        else:
            us, graph = by_events(lambda: work.through(dispatcher)), False
    return Measured("dispatch, scale, combine", *us, shape.payload, shape.named(name), graph=graph, checked=checked)


@contextmanager
def one_rank() -> Iterator[Communicator]:
    """An ep group of this process alone, on NCCL."""
    torch.cuda.set_device(0)
    store = host_store(deadline_s=DEADLINE_S)
    with gloo_on_loopback():
        process = init_process(0, 1, store=store, backend="nccl", deadline_s=DEADLINE_S, device="cuda:0")
        try:
            yield torch_dist_groups(ProcessMesh(), process).ep
        finally:
            process.close()


def collectives() -> Iterator[Measured]:
    """NCCL's dispatchers, prompt and decode steps."""
    with one_rank() as ep:
        for name in ("all_to_all", "all_gather"):
            for shape in SHAPES:
                yield exercise(name, make_dispatcher(name, ep, shape.spec, device="cuda:0"), shape)
                torch.cuda.empty_cache()


def nvshmem() -> Iterator[Measured]:
    """Both paths with one PE."""
    from moe_runtime.dispatch.nvshmem.detect import find
    from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
    from moe_runtime.dispatch.nvshmem.heap import Heap
    from moe_runtime.dispatch.nvshmem.host import HostDispatcher

    library = find()
    assert not isinstance(library, Missing), library
    with one_rank() as ep:
        heap = Heap(ep, library.module, device="cuda:0")  # NVSHMEM runs until its end: it may not start twice
        for shape in SHAPES:
            device = DeviceDispatcher(ep, shape.spec, library=library.module, device="cuda:0")
            yield exercise("nvshmem device", device, shape)
            device.close()
            host = HostDispatcher(ep, shape.spec, library=library.module, device="cuda:0")
            yield exercise("nvshmem host", host, shape)
            host.close()
        heap.close()


def torch_splits() -> Iterator[Measured]:
    """torch's all-to-all of expert splits; it takes 16 slots of a rank."""
    from moe_runtime.dispatch import symm_mem

    with one_rank() as ep:
        for phase, tokens in ((Phase.DECODE, 128), (Phase.MIXED, 1024)):
            shape = Shape(phase, tokens, slots=16)
            dispatcher = symm_mem.make(ep, shape.spec, device="cuda:0")
            yield exercise("symm_mem", dispatcher, shape)
            dispatcher.close()


def deep_ep() -> Iterator[Measured]:
    """DeepEP's V2."""
    from moe_runtime.dispatch import deep_ep as fabric

    with one_rank() as ep:
        for shape in SHAPES:
            dispatcher = fabric.make(ep, shape.spec, device="cuda:0")
            yield exercise("deep_ep", dispatcher, shape)
            dispatcher.close()
