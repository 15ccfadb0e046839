"""What `nvshmem.core` offers of memory, over torch's symmetric memory: our own kernels then run between processes that
share one GPU, with neither NVSHMEM nor NVLink."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator


class Status(IntEnum):
    """Nothing has to be started."""

    STATUS_IS_INITIALIZED = 2
    STATUS_LIMITED_MPG = 3
    STATUS_FULL_MPG = 4


class UnmappedError(Exception):
    """Never raised: all memory is on one device."""


class SharedMemory:
    """For the ranks of `ep`; `memory` is `torch.distributed._symmetric_memory`, `group` the process group of `ep`."""

    InitStatus = Status
    NvshmemError = UnmappedError

    def __init__(self, ep: Communicator, memory: Any, group: Any, *, device: torch.device | str) -> None:
        self._ep, self._memory, self._group, self._device = ep, memory, group, torch.device(device)
        self._handles: dict[int, Any] = {}

    def get_unique_id(self, empty: bool = False) -> None:
        """None is needed."""

    def init_status(self) -> Status:
        return Status.STATUS_IS_INITIALIZED

    def my_pe(self) -> int:
        return self._ep.rank

    def n_pes(self) -> int:
        return self._ep.size

    def NvshmemStream(self, stream: Any) -> Any:  # noqa: N802 - the library's name
        return stream

    def barrier_all(self, stream: Any) -> None:
        """The host waits, too."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._ep.barrier()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made: Tensor = self._memory.empty(*shape, dtype=dtype, device=self._device)
        self._handles[made.data_ptr()] = self._memory.rendezvous(made, self._group)
        return made

    def get_peer_tensor(self, tensor: Tensor, peer: int) -> Tensor:
        found: Tensor = self._handles[tensor.data_ptr()].get_buffer(peer, tensor.shape, tensor.dtype)
        return found

    def free_tensor(self, tensor: Tensor) -> None:
        del self._handles[tensor.data_ptr()]
