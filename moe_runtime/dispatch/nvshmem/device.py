"""Dispatch by our own kernels, which store rows into other ranks' memory and load outputs from there.

T tokens, C capacity, H hidden, K top-k, S ranks, E local slots, P = S·E, J = min(K, E), R room for rows.

Every rank has one block of symmetric memory for each micro-batch (`moe_kernels.put_rows`, which also says why nobody
overwrites what another still reads). A row is put where the experts read it, once for each of its slots, in order of
slot, source rank and token; outputs take the rows' place and are read from there by the tokens' homes, which sum them
in top-k order: the bits of `local`. The host waits for nothing and no shape depends on the routing, so steps of any
phase can be captured as CUDA graphs: the number of a dispatch is kept and counted on the device.

Ranks of one NVLink domain address each other's memory. Where some do not, the kernels are linked with NVSHMEM's device
library, which carries those rows through staging memory of the block, unquantised; without the library that is refused.
Rows are views of the block, valid until their combine has begun. All calls of a micro-batch belong on one stream, or on
streams that wait for each other.
Waits stand on the stream: a kernel gives up after about a minute with an assertion (NVSHMEM's own waits never do, and
come after that), and whatever the communicators have behind it is what the run's clock (`comm/overdue.py`) finds
overdue and names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from moe_kernels import put_rows
from moe_kernels.put_rows import BITCODE, MAX_SLOTS, Block, Far, Peers, Spans, find_bitcode
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import num_blocks
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.torch_dist import TorchCommunicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, GroupedRows, Layout, PaddedRows, Rows
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.nvshmem.heap import Heap
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.types import Pending, PhysicalRouting

_LAST_ROW: Final = 2**31 - 1
"""Rows are numbered in int32."""
_PROBE_BYTES: Final = 8
_ALIGNED: Final = 16
"""Bytes at multiples of which every block begins; the kernels rely on it."""


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    peers: Peers
    slots: Tensor
    """[T, K] int64."""
    row_of: Tensor
    """[T, K] int64: row of each assignment at the rank that has its slot, -1 for none."""
    weights: Tensor
    """[T, K] fp32."""
    ends: Tensor
    """[E] int32, of this rank's slots."""
    spans: Spans
    expected_rows: int
    """Of a slot, were they spread evenly."""


class DeviceDispatcher:
    """`Dispatcher[DeviceHandle]`; bitwise equal to `local` on Triton."""

    def __init__(
        self,
        ep: Communicator,
        spec: DispatchSpec,
        *,
        library: Any,
        group: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`library`: `nvshmem.core`; `group` is not needed. Collective. ConfigError: see `Heap`, and where a rank's
        memory has no address and NVSHMEM's device library is not installed."""
        self._spec = spec
        self._heap = Heap(ep, library, device=device)
        # Ranks of one process share its stream: nobody may stand on it before all have put there what it waits for.
        self._one_stream = not isinstance(ep, TorchCommunicator)
        self._far = self._reach()
        self._lanes = [self._lane() for _ in range(spec.in_flight)]
        self._heap.settle()

    def _reach(self) -> Far | None:
        """How kernels reach ranks whose memory has no address here; None where all have one."""
        heap = self._heap
        missing = [rank for rank, address in enumerate(heap.addresses(heap.allocate(_PROBE_BYTES))) if not address]
        bitcode = find_bitcode()
        reports = heap.ep.exchange([len(missing), int(bitcode is not None)])
        if not any(count for count, _ in reports):
            return None
        without = [rank for rank, (_, found) in enumerate(reports) if not found]
        if without or bitcode is None:
            raise ConfigError(
                f"dispatch=nvshmem: rank {heap.ep.rank} has no address for the memory of ranks {missing} (no NVLink), "
                f"and ranks {without} have no {BITCODE} to reach others without one. "
                "Install nvidia-nvshmem-cu13==3.4.5, choose an ep within one NVLink domain, or set dispatch=all_to_all."
            )
        return Far(bitcode, heap.prepare)

    def _lane(self) -> Peers:
        heap, block = self._heap, block_of(self._spec, apart=self._far is not None)
        own = heap.allocate(block.num_bytes)
        own[: block.counts_at].zero_()
        found = heap.addresses(own)
        assert not any(address % _ALIGNED for address in found), f"the kernels move {_ALIGNED} bytes at once: {found}"
        addresses = torch.tensor(found, dtype=torch.int64, device=heap.device)
        step = torch.zeros(1, dtype=torch.int64, device=heap.device)
        return Peers(block, heap.ep.rank, own, addresses, step, self._far)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=True, tolerance=0.0, layouts=tuple(Layout), counts_on_host=False, graph_safe=True
        )

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, DeviceHandle]]:
        step.check(x)
        most = self._spec.max_tokens
        assert step.capacity <= most, f"a dispatch of {step.capacity} tokens, the blocks were made for {most}"
        assert x.dtype is self._spec.dtype, f"x is {x.dtype}, the blocks were made for {self._spec.dtype}"
        peers, rows, slots = self._lanes[step.micro_batch], self._spec.rows, routing.expert_ids.contiguous()
        announced = put_rows.announce(peers, slots)
        padded = rows.layout is Layout.PADDED
        spans = Spans(room=self._spec.ep * step.capacity) if padded else Spans(rows.alignment)
        fp8 = rows.quantizes(x) and self._far is None
        tokens = quantize_rows(x, ue8m0=rows.ue8m0) if fp8 else x
        room = room_for(rows, ep=self._spec.ep, tokens=step.capacity, top_k=self._spec.top_k)
        mean = max(1, -(-step.capacity * self._spec.top_k // rows.num_slots))
        self._meet()
        strides = (peers.block.groups, 1) if padded else (1, _up_to_4(room))
        row_of, ends = put_rows.place(peers, tokens, slots, announced, spans=spans, scale_strides=strides)
        handle = DeviceHandle(peers, slots, row_of, routing.weights.contiguous(), ends, spans, mean)
        return _Arriving(self, handle, room, fp8)

    def combine_begin(self, y: Tensor, handle: DeviceHandle) -> Pending[Tensor]:
        put_rows.publish(handle.peers, y.contiguous(), handle.ends, spans=handle.spans)
        return _Returning(self, handle, y.shape[-1], y.dtype)

    def close(self) -> None:
        """Collective: gives all memory back."""
        self._heap.close()

    def _meet(self) -> None:
        if self._one_stream:
            self._heap.ep.barrier()

    def _receive(self, handle: DeviceHandle, room: int, fp8: bool) -> tuple[Rows, DeviceHandle]:
        self._meet()
        put_rows.arrive(handle.peers)
        spec, own, block = self._spec, handle.peers.own, handle.peers.block
        num_slots, padded = spec.rows.num_slots, handle.spans.room
        data = _view(own, block.data_at, (room, spec.hidden), torch.float8_e4m3fn if fp8 else spec.dtype)
        scales = None
        if padded:
            if fp8:
                scales = _view(own, block.scales_at, (room, block.groups), torch.float32)
                scales = scales.view(num_slots, padded, block.groups)
            data = data.view(num_slots, padded, spec.hidden)
            return PaddedRows(data, handle.ends, scales, expected_rows=handle.expected_rows), handle
        if fp8:
            scales = _view(own, block.scales_at, (block.groups, _up_to_4(room)), torch.float32).t()[:room]
        rows = GroupedRows(data, handle.ends, spec.rows.alignment, scales, expected_rows=handle.expected_rows)
        return rows, handle

    def _sum(self, handle: DeviceHandle, hidden: int, dtype: torch.dtype) -> Tensor:
        self._meet()
        return put_rows.pull(handle.peers, handle.slots, handle.row_of, handle.weights, hidden=hidden, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Rows on their way to all ranks."""

    dispatcher: DeviceDispatcher
    handle: DeviceHandle
    room: int
    fp8: bool

    def wait(self) -> tuple[Rows, DeviceHandle]:
        return self.dispatcher._receive(self.handle, self.room, self.fp8)


@dataclass(frozen=True, slots=True)
class _Returning:
    """Outputs that all ranks are putting out to be read."""

    dispatcher: DeviceDispatcher
    handle: DeviceHandle
    hidden: int
    dtype: torch.dtype

    def wait(self) -> Tensor:
        return self.dispatcher._sum(self.handle, self.hidden, self.dtype)


def _view(own: Tensor, start: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return own[start : start + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def _up_to_4(rows: int) -> int:
    return -(-rows // 4) * 4


def room_for(rows: RowLayout, *, ep: int, tokens: int, top_k: int) -> int:
    """R: most rows of a rank where each of `ep` ranks brings `tokens`."""
    return rows.worst_bytes(ep * tokens, min(top_k, rows.num_slots), 1)


def block_of(spec: DispatchSpec, *, apart: bool = False) -> Block:
    """The block of one micro-batch; `apart`: some ranks have no address for each other's memory."""
    tokens = max(spec.max_tokens, 1)
    rows = room_for(spec.rows, ep=spec.ep, tokens=tokens, top_k=spec.top_k)
    fp8 = spec.rows.quantize and spec.dtype is torch.bfloat16 and not apart
    groups, staged = num_blocks(spec.hidden) if fp8 else 0, tokens if apart else 0
    return Block(spec.ep, spec.rows.num_slots, rows, spec.row_bytes, groups, staged, spec.top_k)


def buffer_bytes(spec: DispatchSpec) -> int:
    """Bytes of a rank: the blocks of all micro-batches, where some ranks are beyond NVLink (else there is no room for
    C·(1 + K) rows on their way, but maybe for scales). Rows and outputs lie in them, no others are made."""
    block = max(block_of(spec, apart=apart).num_bytes for apart in (False, True))
    return spec.in_flight * block + _PROBE_BYTES


def unfit(spec: DispatchSpec) -> Missing | None:
    """Why the device path cannot serve `spec`, or None. Any hidden size and top-k will do."""
    if spec.num_physical > MAX_SLOTS:
        most = MAX_SLOTS // spec.ep
        return Missing(
            f"{spec.ep} ranks of {spec.rows.num_slots} slots, and the kernels count in {MAX_SLOTS} bins",
            f"Lower placement.num_redundant_experts: at most {most} slots per rank, or set dispatch=all_to_all",
        )
    return None


def max_capacity(spec: DispatchSpec) -> int | None:
    """Most tokens per rank of one dispatch: as many rows as int32 can number."""
    rows = spec.rows
    if rows.layout is Layout.PADDED:
        return _LAST_ROW // (rows.num_slots * spec.ep)
    gaps = rows.num_slots * (rows.alignment - 1)
    return (_LAST_ROW - gaps) // (spec.ep * min(spec.top_k, rows.num_slots))
