"""Symmetric memory of ranks in one process or in several: allocations, and puts on their way."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator

HEAPS: deque[Tensor] = deque(maxlen=20_000)
"""Memory that peers may address lives as long as its process, whatever becomes of the objects that stand for it."""


def garbage_(memory: Tensor) -> Tensor:
    """Fill `memory [n] uint8` with what is NaN in fp32, fp16, bf16 and fp8, and as an integer large."""
    pattern = torch.tensor([0xFF, 0x7F], dtype=torch.uint8).repeat(memory.numel() // 2 + 1)
    return memory.copy_(pattern[: memory.numel()])


def memory_at(address: int, size: int) -> Tensor:
    """`[size] uint8` of this process."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


@dataclass(eq=False)
class Allocation:
    """One rank's part of a symmetric allocation."""

    number: int
    memory: Tensor
    """[size] uint8."""
    peers: list[int | None]
    """Addresses of all ranks' parts, as far as they lie in this process."""
    references: int = 1

    def part(self, rank: int) -> Tensor | None:
        """[size] uint8 of another rank, None of another process."""
        address = self.peers[rank]
        return None if address is None else memory_at(address, self.size)

    @property
    def size(self) -> int:
        return self.memory.numel()

    @property
    def address(self) -> int:
        return self.memory.data_ptr()


@dataclass(frozen=True, eq=False)
class Buffer:
    """`cuda.core.Buffer`: an address and a size. `view`: bytes of the tensor it was asked for."""

    allocation: Allocation
    offset: int
    size: int
    view: int

    @property
    def place(self) -> int:
        """The same on all ranks."""
        return self.allocation.number << 32 | self.offset


@dataclass(frozen=True, eq=False)
class Put:
    """Data on its way, to be seen by who waits for `signal` to reach `number`."""

    target: int
    """Number of the allocation."""
    offset: int
    signal: int
    """As `Buffer.place`."""
    number: int
    data: Tensor


class Wire:
    """Puts of one rank; `flush` is collective, and exchanges what all have issued. Ranks put alike between two waits:
    one that has issued nothing knows that nobody has."""

    def __init__(self, ep: Communicator) -> None:
        self._ep = ep
        self._issued: list[list[Put]] = [[] for _ in range(ep.size)]

    def issue(self, put: Put, peer: int) -> None:
        self._issued[peer].append(put)

    def flush(self) -> list[tuple[int, Put]]:
        """What came here, with its source, in order of issue per source."""
        ep, issued = self._ep, self._issued
        if not any(issued):
            return []
        self._issued = [[] for _ in range(ep.size)]
        sent = [len(puts) for puts in issued], [sum(put.data.numel() for put in puts) for puts in issued]
        rows = ep.exchange([*sent[0], *sent[1]])
        counts, sizes = ([row[start + ep.rank] for row in rows] for start in (0, ep.size))
        flat = [put for puts in issued for put in puts]
        numbers = [[p.target, p.offset, p.signal, p.number, p.data.numel()] for p in flat]
        meta = ep.all_to_all(torch.tensor(numbers, dtype=torch.int64).view(-1, 5), sent[0], counts)
        data = torch.cat([put.data for put in flat] or [torch.empty(0, dtype=torch.uint8)])
        data = ep.all_to_all(data, sent[1], sizes)
        sources = [source for source, count in enumerate(counts) for _ in range(count)]
        parts = torch.split(data, meta[:, 4].tolist())
        found = zip(sources, meta.tolist(), parts, strict=True)
        return [(source, Put(row[0], row[1], row[2], row[3], part.clone())) for source, row, part in found]


def share_addresses(ep: Communicator, memory: Tensor) -> tuple[list[int], list[int | None]]:
    """Of a new allocation, collective: all ranks' sizes, and their addresses as far as they lie in this process."""
    HEAPS.append(memory)
    rows = ep.exchange([os.getpid(), memory.data_ptr(), memory.numel()])
    return [row[2] for row in rows], [row[1] if row[0] == os.getpid() else None for row in rows]
