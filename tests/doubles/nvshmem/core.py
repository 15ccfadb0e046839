"""`nvshmem.core` of one rank. Signals are seen when they are issued, data when its signal is waited for."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from tests.doubles.clauses import Clauses
from tests.doubles.nvshmem.clauses import nvshmem_clauses
from tests.doubles.nvshmem.memory import Allocation, Buffer, Put, Wire, garbage_, share_addresses

_UNSIGNED = 2**64 - 1
_KNOWN = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)


class Status(IntEnum):
    STATUS_NOT_INITIALIZED = 0
    STATUS_IS_BOOTSTRAPPED = 1
    STATUS_IS_INITIALIZED = 2
    STATUS_LIMITED_MPG = 3
    STATUS_FULL_MPG = 4


class Operation(IntEnum):
    SIGNAL_SET = 9
    SIGNAL_ADD = 10


class Comparison(IntEnum):
    CMP_EQ = 0
    CMP_NE = 1
    CMP_GT = 2
    CMP_LE = 3
    CMP_LT = 4
    CMP_GE = 5


COMPARE: dict[int, Callable[[int, int], bool]] = {
    0: int.__eq__,
    1: int.__ne__,
    2: int.__gt__,
    3: int.__le__,
    4: int.__lt__,
    5: int.__ge__,
}


class NvshmemInvalid(Exception):  # noqa: N818 - the library's name
    """As the library's."""


class NvshmemError(Exception):
    """As the library's."""


class NvshmemStream:
    def __init__(self, pt_stream: Any) -> None:
        self.handle = pt_stream.cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


class UniqueID:
    """128 bytes."""

    def __init__(self) -> None:
        self._data = ctypes.create_string_buffer(128)
        self.ptr = ctypes.addressof(self._data)


@dataclass(frozen=True)
class NvshmemKernelObject:
    handle: int

    @staticmethod
    def from_handle(handle: int) -> NvshmemKernelObject:
        return NvshmemKernelObject(handle)


class Core:
    """What `import nvshmem.core` gives the process of one rank.

    `reach(rank)`: whether its memory is mapped here. `running`: what NVSHMEM is once it runs.
    """

    InitStatus: type[Status] = Status
    SignalOp: type[Operation] = Operation
    ComparisonType: type[Comparison] = Comparison
    NvshmemStream = NvshmemStream
    NvshmemError = NvshmemError
    NvshmemKernelObject = NvshmemKernelObject

    def __init__(
        self,
        ep: Communicator,
        clauses: Clauses | None = None,
        *,
        reach: Callable[[int], bool] = lambda rank: True,
        running: Status = Status.STATUS_IS_INITIALIZED,
    ) -> None:
        self.clauses = clauses or nvshmem_clauses()
        self.bytes_put = 0
        self.modules: list[int] = []
        self.allocations: list[Allocation] = []
        self._at: dict[int, Allocation] = {}
        self._ep = ep
        self._reach = reach
        self._running = running
        self._wire = Wire(ep)
        self._came: list[Put] = []
        self._status = Status.STATUS_NOT_INITIALIZED
        self._freed: set[int] = set()
        self._known: set[tuple[int, int]] = set()
        self._capturing = False

    def get_version(self) -> Any:
        return SimpleNamespace(libnvshmem_version="3.4.5", nvshmem4py_version="0.4.1", openshmem_spec_version="1.3")

    def get_unique_id(self, empty: bool = False) -> UniqueID:
        uid = UniqueID()
        if not empty:
            ctypes.memmove(uid.ptr, bytes([self._ep.rank + 1]) * 128, 128)
        return uid

    def init_status(self) -> Status:
        return self._status

    def init(
        self,
        device: Any = None,
        uid: UniqueID | None = None,
        rank: int | None = None,
        nranks: int | None = None,
        mpi_comm: Any = None,
        initializer_method: str = "",
    ) -> None:
        self.clauses.require("init_method", initializer_method in ("mpi", "uid", "emulated_mpi"), initializer_method)
        given = uid is not None and rank is not None and nranks is not None and not mpi_comm
        self.clauses.require("init_uid", given, (uid, rank, nranks, mpi_comm))
        stamp = zlib.crc32(ctypes.string_at(uid.ptr, 128)) if uid is not None else -1
        blank = zlib.crc32(bytes(128))
        stamps = {row[0] for row in self._ep.exchange([stamp])}
        self.clauses.require("one_uid", len(stamps) == 1 and blank not in stamps, f"unique ids {stamps}")
        self._status = self._running

    def finalize(self) -> None:
        self.clauses.require("finalize_once", self._status is self._running, self._status.name)
        left = [a.number for a in self.allocations if a.number not in self._freed]
        self.clauses.require("free_all", not left, f"allocations {left} are left at finalize")
        self._status = Status.STATUS_IS_BOOTSTRAPPED

    def module_init(self, mod: Any) -> None:
        self._not_captured("module_init")
        self.clauses.require("init_first", self._status is self._running, self._status.name)
        self.modules.append(mod.handle)

    def my_pe(self) -> int:
        return self._ep.rank

    def n_pes(self) -> int:
        return self._ep.size

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        release: bool = False,
        morder: str = "C",
        except_on_del: bool = True,
    ) -> Tensor:
        self._not_captured("tensor")
        self.clauses.require("init_first", self._status is self._running, self._status.name)
        self.clauses.require("no_fp8", dtype in _KNOWN, dtype)
        size = prod(shape) * dtype.itemsize
        if not size:
            raise NvshmemError(f"Failed to allocate memory of bytes {size}")
        memory = torch.zeros(size, dtype=torch.uint8)
        if self.clauses.on("nothing_zeroed"):
            garbage_(memory)
        sizes, peers = share_addresses(self._ep, memory)
        self.clauses.require("same_size", len(set(sizes)) == 1, f"sizes {sizes}")
        self.allocations.append(Allocation(len(self.allocations), memory, peers))
        self._at[memory.data_ptr()] = self.allocations[-1]
        return memory.view(dtype).view(shape)

    def tensor_get_buffer(self, tensor: Tensor) -> tuple[Buffer, int, str]:
        view, address = tensor.numel() * tensor.element_size(), tensor.data_ptr()
        exact = self._at.get(address)
        for allocation in self.allocations if exact is None else (exact,):
            offset = address - allocation.address
            if offset == 0 or (0 < offset < allocation.size and not self.clauses.on("base_pointer")):
                used = allocation.number not in self._freed
                self.clauses.require("no_use_after_free", used, f"allocation {allocation.number}")
                size = allocation.size if offset == 0 else view
                return Buffer(allocation, offset, size, view), view, str(tensor.dtype)
            self.clauses.require("base_pointer", not 0 < offset < allocation.size, f"a tensor {offset} bytes into one")
        raise NvshmemInvalid("Tried to retrieve buffer from Tensor not tracked by nvshmem")

    def get_peer_tensor(self, tensor: Tensor, peer_pe: int) -> Tensor:
        self._not_captured("get_peer_tensor")
        allocation = self.tensor_get_buffer(tensor)[0].allocation
        memory = allocation.part(peer_pe)
        out_of_reach = memory is None or (self.clauses.on("mapped") and not self._reach(peer_pe))
        if out_of_reach:
            raise NvshmemError("Failed to retrieve peer buffer")
        assert memory is not None
        if peer_pe == self._ep.rank and self.clauses.on("own_view"):
            allocation.references += 1
        return memory.view(tensor.dtype).view(tensor.shape)

    def free_tensor(self, tensor: Tensor) -> None:
        self._not_captured("free_tensor")
        found = self._at.get(tensor.data_ptr())
        number = -1 if found is None else found.number
        self.clauses.require("freed_once", number >= 0 and number not in self._freed, f"allocation {number}")
        seen = {row[0] for row in self._ep.exchange([number])}
        self.clauses.require("same_free", len(seen) == 1, f"allocations {seen}")
        if found is not None:
            found.references -= 1
            if not found.references:
                self._freed.add(number)
                garbage_(found.memory)

    def put_signal(
        self,
        dst: Tensor,
        src: Tensor,
        signal_var: Buffer,
        signal_val: int,
        signal_op: Operation,
        remote_pe: int = -1,
        stream: Any = None,
    ) -> None:
        self._on_stream(stream, "put_signal")
        target, source = self.tensor_get_buffer(dst)[0], self.tensor_get_buffer(src)[0]
        signal = self._signal(signal_var)
        size = min(target.size, source.size)
        if not self.clauses.on("whole_allocation"):
            size = min(target.view, source.view)
        data = source.allocation.memory[source.offset : source.offset + size].clone()
        self.bytes_put += size
        number = signal_val
        peer, cell = (buffer.allocation.part(remote_pe) for buffer in (target, signal))
        if peer is not None and cell is not None:
            landing = peer[target.offset : target.offset + size]
            if not self.clauses.on("late_data"):
                landing.copy_(data)
            elif self.clauses.on("in_flight"):
                garbage_(landing)
            number = _signal_(cell[signal.offset : signal.offset + 8], signal_val, signal_op)
        put = Put(target.allocation.number, target.offset, signal.place, number, data)
        self._wire.issue(put, remote_pe)

    def signal_wait(self, signal_var: Buffer, signal_val: int, signal_op: Comparison, stream: Any = None) -> None:
        self._on_stream(stream, "signal_wait")
        shared = self._status is Status.STATUS_LIMITED_MPG
        self.clauses.require("limited_mpg", not shared, self._status.name)
        signal, holds = self._signal(signal_var), COMPARE[int(signal_op)]
        cell = signal.allocation.memory[signal.offset : signal.offset + 8].view(torch.int64)
        early = int(cell) & _UNSIGNED
        self._flush()
        self._known.update((put.signal, put.number) for put in self._came)
        if holds(early, signal_val) and (signal.place, early) not in self._known:
            return  # it went on at once, on a number that nobody sent
        seen = int(cell) & _UNSIGNED
        text = f"rank {self._ep.rank} waits for {signal_val} where {seen} is"
        self.clauses.require("signal_comes", holds(seen, signal_val), text)
        self._deliver([put for put in self._came if put.signal == signal.place and put.number <= seen])

    def barrier_all(self, stream: Any = None) -> None:
        self._not_captured("barrier_all")
        stream.__cuda_stream__()
        self._flush()
        self._deliver(list(self._came))
        self._ep.barrier()

    def _flush(self) -> None:
        for source, put in self._wire.flush():
            self._came.append(put)
            signal, offset = self.allocations[put.signal >> 32], put.signal & 0xFFFFFFFF
            if signal.peers[source] is None:
                signal.memory[offset : offset + 8].view(torch.int64).fill_(put.number)

    def _deliver(self, puts: list[Put]) -> None:
        for put in puts:
            self._came.remove(put)
            if not self.clauses.on("late_data") and None not in self.allocations[put.target].peers:
                continue
            landing = self.allocations[put.target].memory[put.offset : put.offset + put.data.numel()]
            # A later one is on its way to the same place: what is there now is a mixture.
            mixed = any(other.target == put.target and other.offset == put.offset for other in self._came)
            if mixed and self.clauses.on("in_flight"):
                garbage_(landing)
            else:
                landing.copy_(put.data)

    def _signal(self, given: Buffer | Tensor) -> Buffer:
        is_signal = isinstance(given, Buffer) and given.size >= 8
        self.clauses.require("signal_buffer", is_signal, type(given).__name__)
        return given if isinstance(given, Buffer) else self.tensor_get_buffer(given)[0]

    def _on_stream(self, stream: Any, what: str) -> None:
        self.clauses.require("stream", stream is not None, f"{what} with stream=None")
        if stream is not None:
            stream.__cuda_stream__()
        self.clauses.require("frozen_numbers", not self._capturing, f"{what} while a graph is captured")

    def _not_captured(self, what: str) -> None:
        self.clauses.require("no_capture", not self._capturing, f"{what} while a graph is captured")

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within the block a CUDA graph is being captured."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False


def _signal_(cell: Tensor, value: int, operation: Operation) -> int:
    """Set or add to `cell [8] uint8`; what it holds then."""
    number = cell.view(torch.int64)
    number.fill_(value if operation is Operation.SIGNAL_SET else int(number) + value)
    return int(number)
