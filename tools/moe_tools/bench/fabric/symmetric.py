"""torch's symmetric memory between processes that share one GPU: put, get, signal and barrier by its own handles, and
our own dispatch kernels over it.

Copies go within one device's memory, and kernels of several processes take turns on it, so that a wait may last for
as long as another process has the device: what is measured is that it works and what the path costs, not NVLink.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, Final

import torch
import torch.distributed as dist

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.process import host_store, init_process, join_store
from moe_runtime.comm.torch_dist import torch_dist_groups
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
from moe_runtime.launch.env import child_environment, gloo_on_loopback
from moe_runtime.parallel.mesh import ProcessMesh
from moe_tools.bench.fabric.clock import by_events, by_host
from moe_tools.bench.fabric.exercise import Shape, Work
from moe_tools.bench.fabric.parts import Measured
from moe_tools.bench.fabric.shared import SharedMemory

DEADLINE_S: Final = 50.0
DEVICE: Final = "cuda:0"
SIZES: Final = (8, 64 << 10, 1 << 20, 64 << 20)
DISPATCHED: Final = Shape(Phase.DECODE, tokens=128, slots=8)
WAIT_MS: Final = 10_000
"""After which a wait on the device ends its kernel."""
_NEEDED: Final = ("get_buffer", "barrier", "put_signal", "wait_signal")


def lacks() -> str | None:
    """Why this torch cannot, GPU or not."""
    try:
        import_module("torch.distributed._symmetric_memory")
        handle = import_module("torch._C._distributed_c10d")._SymmetricMemory
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no symmetric memory"
    missing = [name for name in _NEEDED if not hasattr(handle, name)]
    return f"torch {torch.__version__}: its symmetric memory lacks {', '.join(missing)}" if missing else None


def run(world: int) -> Iterator[Measured]:
    """As rank 0, with `world - 1` other processes."""
    store = host_store(deadline_s=DEADLINE_S)
    command = [sys.executable, "-P", "-m", "moe_tools.bench.fabric.symmetric"]
    others = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(store.port)], stdin=subprocess.PIPE, env=child_environment()
        )
        for rank in range(1, world)
    ]
    try:
        yield from measure(0, world, store)
        for other in others:
            assert not other.wait(timeout=DEADLINE_S), f"a process ended with exit code {other.returncode}"
    finally:
        for other in others:
            other.kill()


def measure(rank: int, world: int, store: Any) -> Iterator[Measured]:
    """What this rank saw; every rank goes through all of it."""
    torch.cuda.set_device(DEVICE)
    with gloo_on_loopback():
        process = init_process(rank, world, store=store, backend="gloo", deadline_s=DEADLINE_S)
        ep = torch_dist_groups(ProcessMesh(dp=world, rank=rank), process).ep
    try:
        memory = import_module("torch.distributed._symmetric_memory")
        memory.set_backend("CUDA")
        buffer = memory.empty(SIZES[-1], dtype=torch.uint8, device=DEVICE).fill_(rank)
        handle = _rendezvous(memory, buffer)
        for size in SIZES:
            yield from _copies(handle, buffer, size, rank, world)
        yield _signals(handle, rank, world)
        yield _barriers(handle, world)
        yield _dispatch(ep, memory)
        _all_here()
    finally:
        process.close()


def _dispatch(ep: Communicator, memory: Any) -> Measured:
    """Decode steps by our kernels, which put rows into the other processes' memory and read outputs from there."""
    library = SharedMemory(ep, memory, dist.group.WORLD, device=DEVICE)
    shape = replace(DISPATCHED, ep=ep.size)
    dispatcher = DeviceDispatcher(ep, shape.spec, library=library, device=DEVICE)
    with torch.inference_mode():
        work = Work.random(shape, DEVICE, rank=ep.rank)
        checked = [work.check(dispatcher) for _ in range(2)][-1]
        us = by_host(lambda: work.through(dispatcher), before=_all_here)
    dispatcher.close()
    named = {**shape.named("nvshmem device"), "processes": ep.size}
    return Measured("dispatch, scale, combine", *us, shape.payload, named, checked=checked)


def _rendezvous(memory: Any, buffer: torch.Tensor) -> Any:
    group: Any = dist.group.WORLD
    try:
        return memory.rendezvous(buffer, group)
    except (RuntimeError, TypeError):
        # Before 2.9 a group had to be told, and was named.
        memory.enable_symm_mem_for_group(group.group_name)
        return memory.rendezvous(buffer, group.group_name)


def _copies(handle: Any, buffer: torch.Tensor, size: int, rank: int, world: int) -> Iterator[Measured]:
    """Rank 0 to the last one and back, while the others wait on the host; what arrived is compared."""
    peer, mark = world - 1, 100 + size.bit_length()
    theirs = handle.get_buffer(peer, (size,), torch.uint8)
    mine = torch.full((size,), mark, dtype=torch.uint8, device=DEVICE)
    put = by_events(lambda: theirs.copy_(mine)) if rank == 0 else None
    _all_here()
    if rank == peer:
        assert bool((buffer[:size] == mark).all()), f"{size} bytes were put and are not there"
        buffer[:size].fill_(mark + 1)
    _all_here()
    get = by_events(lambda: mine.copy_(theirs)) if rank == 0 else None
    _all_here()
    if put is not None and get is not None:
        assert bool((mine == mark + 1).all()), f"{size} bytes were got and are others"
        shape = {"processes": world, "bytes": size}
        yield Measured("put into get_buffer", *put, size, shape, checked="bytes compared")
        yield Measured("get from get_buffer", *get, size, shape, checked="bytes compared")


def _signals(handle: Any, rank: int, world: int) -> Measured:
    """A signal from rank 0 to the last one and one back."""
    peer = world - 1

    def round_trip() -> None:
        if rank == 0:
            handle.put_signal(peer, 0, WAIT_MS)
            handle.wait_signal(peer, 1, WAIT_MS)
        elif rank == peer:
            handle.wait_signal(0, 0, WAIT_MS)
            handle.put_signal(0, 1, WAIT_MS)

    return Measured("signal and answer", *by_host(round_trip, before=_all_here), 0, {"processes": world})


def _barriers(handle: Any, world: int) -> Measured:
    return Measured("barrier", *by_host(lambda: handle.barrier(0, WAIT_MS), before=_all_here), 0, {"processes": world})


def _all_here() -> None:
    torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    from moe_tools.bench.fabric.child import watch_parent

    watch_parent()
    rank_, world_, port_ = (int(word) for word in sys.argv[1:])
    for _ in measure(rank_, world_, join_store("127.0.0.1", port_, deadline_s=DEADLINE_S)):
        pass
