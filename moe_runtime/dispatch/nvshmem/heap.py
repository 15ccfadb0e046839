"""The symmetric heap of one process: NVSHMEM's start, its allocations, its end."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.errors import ConfigError

_UID_BYTES: Final = 128
"""Size of `nvshmemx_uniqueid_v1`."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A counter in symmetric memory, of a whole allocation, since NVSHMEM's host calls take no less."""

    cell: Tensor
    """[1] int64."""
    buffer: Any
    """What the calls want: NVSHMEM's `Buffer`."""


@dataclass(frozen=True, slots=True)
class _HostStream:
    """Stands for torch's stream where there is no GPU."""

    cuda_stream: int = 0


class Heap:
    """All of a rank's allocations. Making, settling and closing are collective over `ep`, in one order on all ranks.

    NVSHMEM starts once per process: the first heap starts it and ends it in `close`; a heap that finds it running uses
    it as it is and leaves it running.
    """

    def __init__(self, ep: Communicator, library: Any, *, device: torch.device | str = "cpu") -> None:
        """`library`: `nvshmem.core`. ConfigError where NVSHMEM already runs with other ranks than `ep`'s."""
        self.ep = ep
        self.library = library
        self.device = torch.device(device)
        self._tensors: list[Tensor] = []
        self._modules: set[int] = set()
        self._closed = False
        self._owns = self._start()
        seen, expected = (library.my_pe(), library.n_pes()), (ep.rank, ep.size)
        others = [rank for rank, (differs,) in enumerate(ep.exchange([int(seen != expected)])) if differs]
        if others:
            raise ConfigError(
                f"dispatch=nvshmem: NVSHMEM runs as PE {seen[0]} of {seen[1]}, the ep group has this process as rank "
                f"{expected[0]} of {expected[1]}; ranks {others} of the group differ so. "
                "Start NVSHMEM for the ep group alone, or leave its start to us."
            )

    def _start(self) -> bool:
        """Whether this heap started NVSHMEM."""
        library, ep = self.library, self.ep
        uid = library.get_unique_id(empty=True)  # this loads the library
        status = library.InitStatus
        running = library.init_status() in (
            status.STATUS_IS_INITIALIZED,
            status.STATUS_LIMITED_MPG,
            status.STATUS_FULL_MPG,
        )
        if len(states := {row[0] for row in ep.exchange([int(running)])}) > 1:
            raise ConfigError(
                "dispatch=nvshmem: NVSHMEM runs on some ranks and not on others. Start it on all of them, or on none."
            )
        if states == {1}:
            return False
        if ep.rank == 0:
            uid = library.get_unique_id()
        payload = ep.share(ctypes.string_at(uid.ptr, _UID_BYTES) if ep.rank == 0 else None, 0)
        ctypes.memmove(uid.ptr, payload, _UID_BYTES)
        library.init(device=_cuda_device(self.device), uid=uid, rank=ep.rank, nranks=ep.size, initializer_method="uid")
        return True

    @property
    def stream(self) -> Any:
        """The current stream, as NVSHMEM takes it; it knows no default."""
        on_gpu = self.device.type == "cuda"
        return self.library.NvshmemStream(torch.cuda.current_stream(self.device) if on_gpu else _HostStream())

    def allocate(self, num_bytes: int) -> Tensor:
        """`[num_bytes] uint8` at the same place on every rank, holding anything (fp8 is unknown to NVSHMEM).

        ConfigError where there is too little memory.
        """
        try:
            tensor: Tensor = self.library.tensor((num_bytes,), dtype=torch.uint8)
        except self.library.NvshmemError as error:
            raise ConfigError(
                f"dispatch=nvshmem: no {num_bytes} bytes of symmetric memory on rank {self.ep.rank} ({error}). "
                "Lower engine.dispatch_buffer_bytes or engine.kv_cache_bytes, or unset NVSHMEM_SYMMETRIC_SIZE."
            ) from error
        self._tensors.append(tensor)
        return tensor

    def signal(self) -> Signal:
        """A counter that is 0 once `settle` has returned."""
        cell = self.allocate(8).view(torch.int64).zero_()
        return Signal(cell, self.library.tensor_get_buffer(cell)[0])

    def settle(self) -> None:
        """On the current stream: nobody goes on before what all wrote into their own memory so far is there."""
        self.library.barrier_all(self.stream)

    def addresses(self, tensor: Tensor) -> list[int]:
        """Where this rank finds every rank's copy of an allocation: 0 for those that NVLink does not reach."""
        found = []
        for rank in range(self.ep.size):
            # A view of one's own copy would count as a second reference and keep it from being freed.
            try:
                peer = tensor if rank == self.ep.rank else self.library.get_peer_tensor(tensor, rank)
            except self.library.NvshmemError:
                found.append(0)
            else:
                found.append(peer.data_ptr())
        return found

    def prepare(self, module: int) -> None:
        """Make a kernel's module known to NVSHMEM, by its handle, so that it may call NVSHMEM's device functions."""
        if module not in self._modules:
            self.library.module_init(self.library.NvshmemKernelObject.from_handle(module))
            self._modules.add(module)

    def close(self) -> None:
        """Free everything, and end NVSHMEM if this heap started it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.settle()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for tensor in reversed(self._tensors):
            self.library.free_tensor(tensor)
        self._tensors.clear()
        if self._owns:
            self.library.finalize()


def _cuda_device(device: torch.device) -> Any:
    """What NVSHMEM binds this process to; None without a GPU."""
    if device.type != "cuda":
        return None
    core = import_module("cuda.core")
    found = core.Device if hasattr(core, "Device") else import_module("cuda.core.experimental").Device
    with torch.cuda.device(device):
        chosen = found(torch.cuda.current_device())
    chosen.set_current()
    return chosen
