"""What `detect.Calls` names, for one rank. Rows are fetched by their receiver, as the kernels do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from tests.doubles.clauses import Clauses
from tests.doubles.symm_mem.clauses import symm_mem_clauses

GARBAGE = 255
"""In every byte: NaN as a float, -1 as an integer."""
INTRA_NODE, BLOCKS, FEW_BLOCKS = 8, 64, 8
"""Ranks up to which an operation has up to BLOCKS blocks, beyond FEW_BLOCKS."""


@dataclass
class Allocation:
    number: int
    memory: Tensor
    """[bytes] uint8."""
    backend: str
    groups: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Reading:
    """Rows of a rank's input that other ranks are fetching."""

    rows: Tensor
    before: Tensor


class SymmMem:
    """torch's symmetric memory in the process of one rank."""

    def __init__(self, ep: Communicator, clauses: Clauses | None = None) -> None:
        self.clauses = clauses or symm_mem_clauses()
        self._ep = ep
        self._backend = "CUDA"
        self._allocations: dict[int, Allocation] = {}
        self._reading: list[Reading] = []
        self._in_use: int | None = None
        self._capturing = False

    def set_backend(self, name: str) -> None:
        if name not in ("NVSHMEM", "CUDA", "NCCL"):
            raise RuntimeError(f"SymmetricMemory does not find allocation backend {name}")
        if name != self._backend and self._allocations:
            raise RuntimeError("Backend can not be changed after use.")
        self._backend = name

    def empty(self, *size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        self.clauses.require("no_capture", not self._capturing, "empty while a graph is captured")
        shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else tuple(size)
        made = torch.zeros(shape, dtype=dtype)
        memory = made.view(-1).view(torch.uint8)
        if self.clauses.on("nothing_zeroed"):
            memory.fill_(GARBAGE)
        sizes = [row[0] for row in self._ep.exchange([memory.numel()])]
        self.clauses.require("same_size", len(set(sizes)) == 1, f"sizes {sizes}")
        number = len(self._allocations)
        self._allocations[made.untyped_storage().data_ptr()] = Allocation(number, memory, self._backend)
        return made

    def rendezvous(self, tensor: Tensor, group: Any) -> None:
        found = self._allocations.get(tensor.untyped_storage().data_ptr())
        self.clauses.require("symmetric", found is not None, f"a tensor {tuple(tensor.shape)} from elsewhere")
        name = group if isinstance(group, str) else group.group_name
        if found is None or name in found.groups:
            return
        self.clauses.require("no_capture", not self._capturing, "a first rendezvous while a graph is captured")
        numbers = [row[0] for row in self._ep.exchange([found.number])]
        self.clauses.require("same_order", len(set(numbers)) == 1, f"allocations {numbers}")
        found.groups.add(name)

    def all_to_all_vdev_2d(
        self,
        x: Tensor,
        out: Tensor,
        in_splits: Tensor,
        out_splits_offsets: Tensor,
        group_name: str,
        major_align: int | None = None,
    ) -> None:
        ranks, require = self._ep.size, self.clauses.require
        self._enter((x, out, in_splits, out_splits_offsets), group_name)
        require("ranks_out", ranks <= 32, ranks)
        align = 1 if major_align is None else major_align
        require("align", align > 0, align)
        shapes = tuple(in_splits.shape), tuple(out_splits_offsets.shape)
        fits = len(shapes[1]) == 2 and shapes[1] == (2, *shapes[0]) and in_splits.numel() % ranks == 0
        require("two_rows", fits, f"shapes {shapes}")
        require("slots_out", in_splits.numel() // ranks <= 16, in_splits.numel() // ranks)
        splits = in_splits.view(-1)
        require("not_negative", bool((splits >= 0).all()), splits.tolist())
        require("fits", int(splits.sum()) <= x.shape[0], f"{int(splits.sum())} rows of {x.shape[0]}")
        offsets = splits.cumsum(0) - splits
        slots = splits.numel() // ranks
        # By rank, then slot, as the peers have them.
        asked = torch.stack((splits, offsets), dim=1)
        came = self._ep.all_to_all(asked, [slots] * ranks, [slots] * ranks)
        by_slot = came.view(ranks, slots, 2).transpose(0, 1).reshape(-1, 2)
        sources = list(range(ranks)) * slots
        self._fetch(x, out, by_slot, sources, out_splits_offsets, minor=ranks, align=max(align, 1))

    def all_to_all_vdev_2d_offset(
        self, x: Tensor, out: Tensor, in_splits_offsets: Tensor, out_splits_offsets: Tensor, group_name: str
    ) -> None:
        tensors, ranks, require = (
            (x, out, in_splits_offsets, out_splits_offsets),
            self._ep.size,
            self.clauses.require,
        )
        self._enter(tensors, group_name)
        require("ranks_home", ranks <= 16, ranks)
        shape = tuple(in_splits_offsets.shape)
        fits = len(shape) == 2 and shape[0] == 2 and shape[1] % ranks == 0
        require("two_rows", fits, f"shape {shape}")
        given = in_splits_offsets.reshape(2, -1)
        slots = given.shape[1] // ranks
        require("slots_home", slots <= 32, slots)
        require("not_negative", bool((given[0] >= 0).all()), given[0].tolist())
        asked = given.view(2, slots, ranks).permute(2, 1, 0).reshape(-1, 2)
        came = self._ep.all_to_all(asked, [slots] * ranks, [slots] * ranks)
        sources = [rank for rank in range(ranks) for _ in range(slots)]
        self._fetch(x, out, came, sources, out_splits_offsets, minor=slots, align=0)

    def _enter(self, tensors: tuple[Tensor, ...], group_name: str) -> None:
        """The checks of both operations, and what begins with their barrier."""
        x, out, splits, result = tensors
        require = self.clauses.require
        for tensor in tensors:
            self.rendezvous(tensor, group_name)
            found = self._allocations.get(tensor.untyped_storage().data_ptr())
            backend = "NVSHMEM" if found is None else found.backend
            require("backend", backend == "NVSHMEM", f"memory of {backend}")
        require("contiguous", all(t.is_contiguous() for t in tensors), [t.stride() for t in tensors])
        alike = x.dtype == out.dtype and x.stride(0) == out.stride(0)
        seen = f"{x.dtype} {x.stride()}, {out.dtype} {out.stride()}"
        require("same_rows", alike, seen)
        require("int64", splits.dtype == result.dtype == torch.int64, (splits.dtype, result.dtype))
        changed = [reading for reading in self._reading if not torch.equal(reading.rows, reading.before)]
        require("no_exit", not changed, f"rank {self._ep.rank} wrote where others were reading")
        self._reading.clear()
        require("offsets_in_use", result.data_ptr() != self._in_use, "the offsets of the operation before")
        self._in_use = result.data_ptr()

    def _fetch(
        self, x: Tensor, out: Tensor, came: Tensor, sources: list[int], result: Tensor, *, minor: int, align: int
    ) -> None:
        """`came [P, 2]`: rows of each split and where their source has them, in order of the output."""
        counts, wanted = came[:, 0].tolist(), came[:, 1].tolist()
        places = self._places(counts, minor, align)
        end = max((place + count for place, count in zip(places, counts, strict=True)), default=0)
        self.clauses.require("room", end <= out.shape[0], f"{end} rows into {out.shape[0]}")
        if self.clauses.on("late_block"):
            blocks = min(len(counts), FEW_BLOCKS if self._ep.size > INTRA_NODE else BLOCKS)
            for split in range(len(counts)):
                if split % blocks and (split >= blocks or not counts[0]):
                    wanted[split] = places[split]
        rows = self._pull(_as_bytes(x), counts, wanted, sources)
        target = _as_bytes(out)
        if self.clauses.on("gaps"):
            target.fill_(GARBAGE)
        for place, part in zip(places, rows, strict=True):
            fitting = part[: max(0, target.shape[0] - place)]
            target[place : place + fitting.shape[0]] = fitting
        result[0] = torch.tensor(counts)
        result[1] = torch.tensor(places)

    def _places(self, counts: list[int], minor: int, align: int) -> list[int]:
        """Where each split begins in the output; `minor` splits to a tile, tiles aligned."""
        places, start = [], 0
        for tile in range(0, len(counts), minor):
            at = start
            for count in counts[tile : tile + minor]:
                places.append(at)
                at += count
            length = -(-(at - start) // align) * align if align else at - start
            start += max(length, align) if self.clauses.on("empty_slot") else length
        return places

    def _pull(self, memory: Tensor, counts: list[int], wanted: list[int], sources: list[int]) -> list[Tensor]:
        """Rows of the splits, from their sources' `memory [rows, bytes]`; beyond its end is garbage."""
        ranks = self._ep.size
        order = sorted(range(len(counts)), key=lambda split: sources[split])
        per_rank = len(counts) // ranks
        asked = torch.tensor([[counts[split], wanted[split]] for split in order], dtype=torch.int64).view(-1, 2)
        requests = self._ep.all_to_all(asked, [per_rank] * ranks, [per_rank] * ranks).tolist()
        served, sent = [memory[:0]], [0] * ranks
        for index, (count, offset) in enumerate(requests):
            part = memory[offset : offset + count] if offset >= 0 else memory[:0]
            self._reading.append(Reading(part, part.clone()))
            missing = part.new_full((count - part.shape[0], memory.shape[1]), GARBAGE)
            served += [part, missing]
            sent[index // per_rank] += count
        received = [sum(counts[split] for split in order if sources[split] == rank) for rank in range(ranks)]
        wire = self._ep.all_to_all(torch.cat(served), sent, received)
        parts = dict(zip(order, torch.split(wire, [counts[split] for split in order]), strict=True))
        return [parts[split] for split in range(len(counts))]

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within the block a CUDA graph is being captured."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False


def _as_bytes(x: Tensor) -> Tensor:
    """`x [rows, …]` as [rows, bytes] uint8, the same memory where it is contiguous."""
    flat = x.view(x.shape[0], -1) if x.is_contiguous() else x.contiguous().view(x.shape[0], -1)
    return flat.view(torch.uint8)
