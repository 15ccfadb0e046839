"""Dispatch by torch's `all_to_all_vdev_2d` and its way back, `all_to_all_vdev_2d_offset`.

T tokens, C capacity, H hidden, K top-k, N = T·K, S ranks, E local slots, P = S·E, R room for rows, B bytes of a row.

A rank sorts its assignments by physical slot into symmetric memory, one row each, and says on the device how many each
slot gets; every rank then fetches its rows, by slot, then source rank. Outputs are put in the rows' place and fetched
back to where their tokens' rows were, and summed there in top-k order: the bits of `local`. Splits never leave the
device and no shape depends on the routing, so that decode steps can be captured.

What the operators leave to their callers, and what is done about it:
* They return while other ranks may still be fetching; the entrance of the next operation is the barrier. So a dispatch
  is combined before the next one of its micro-batch begins, and all calls stand on one stream.
* Block 0 writes the offsets of what came over those that other blocks fetch by, and no barrier is between. Every split
  therefore has a block of its own, which reads its offset first (`sizes.MAX_SPLITS`), and the first split never is
  empty (`sizes.HEAD_ROWS`). Should a block still be late, rows come from the wrong place: each carries its slot and its
  number within it, and an assertion on the device ends the run instead of wrong sums.
* A slot without rows still takes one, and what no row was put in holds anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from moe_kernels.permute import unpermute
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Rows
from moe_runtime.dispatch.nvshmem.packing import Packing
from moe_runtime.dispatch.rows import wire_order
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.dispatch.symm_mem.sizes import HEAD_ROWS, Room
from moe_runtime.errors import ConfigError
from moe_runtime.types import NOWHERE, Pending, PhysicalRouting


@dataclass(slots=True)
class _Lane:
    """Symmetric memory of one micro-batch, and how far it has come."""

    home: Tensor
    """[bytes]: rows on their way out, then outputs that came back."""
    away: Tensor
    """[bytes]: rows that came, then outputs on their way home."""
    splits: Tensor
    """[P] int64: rows to each slot."""
    arrived: Tensor
    """[2, E*S] int64: rows that came, by slot, then source; and where they begin."""
    returned: Tensor
    """[2, P] int64: outputs that came back, and where they begin."""
    begun: int = 0
    combined: int = 0


@dataclass(frozen=True, slots=True)
class SymmMemHandle:
    lane: _Lane
    place: Tensor
    """[T, K] int64: home row of each assignment, -1 for none."""
    stamps: Tensor
    """[N, 2] int32: slot of each assignment and its number within it."""
    weights: Tensor
    """[T, K] fp32."""
    away_stamps: Tensor
    """[R, 2] int32, of what came."""
    row_of: Tensor | None
    """[R] int64: row of the experts' outputs for each that came; where rows are sorted on the device."""
    real: Tensor | None
    """Else [rows] int64: which rows are real."""
    position: Tensor | None


class SymmMemDispatcher:
    """`Dispatcher[SymmMemHandle]`; bitwise equal to `local`."""

    def __init__(
        self,
        ep: Communicator,
        spec: DispatchSpec,
        *,
        library: Any,
        group: Any,
        device: torch.device | str = "cpu",
    ) -> None:
        """`library`: `detect.Calls`; `group`: the process group of `ep`. Collective over all processes of the run, with
        equal sizes. ConfigError where symmetric memory already works on something else than NVSHMEM."""
        self._ep, self._spec, self._library = ep, spec, library
        self._group_name = group.group_name
        self._device = torch.device(device)
        self._stays = spec.rows.stays_on(self._device)
        self._room = Room(spec, self._stays)
        try:
            library.set_backend("NVSHMEM")
        except RuntimeError as error:
            raise ConfigError(
                f"dispatch=symm_mem: torch's symmetric memory does not take NVSHMEM ({str(error).splitlines()[0]}). "
                "Leave its choice to us, before anything else allocates symmetric memory, or use dispatch=all_to_all."
            ) from error
        physical = spec.num_physical
        self._bounds = torch.arange(physical + 1, device=self._device)
        heads = torch.zeros(spec.ep, physical, dtype=torch.int64, device=self._device)
        heads[0, :: spec.rows.num_slots] = HEAD_ROWS  # on every rank the first split came from rank 0 …
        heads[:, 0] = HEAD_ROWS  # … and comes back from slot 0
        self._heads = heads[ep.rank]
        first = ep.rank * spec.rows.num_slots
        self._heads_away = heads[:, first : first + spec.rows.num_slots].t().reshape(-1)
        self._num_heads_away = HEAD_ROWS * (spec.ep if ep.rank == 0 else 1)
        self._lanes = [self._lane() for _ in range(spec.in_flight)]

    def _lane(self) -> _Lane:
        room, tokens, physical = self._room, max(self._spec.max_tokens, 1), self._spec.num_physical
        return _Lane(
            self._allocate((room.home_rows(tokens) * room.row_bytes,), torch.uint8),
            self._allocate((room.away_rows(tokens) * room.row_bytes,), torch.uint8),
            self._allocate((physical,), torch.int64),
            self._allocate((2, physical), torch.int64),
            self._allocate((2, physical), torch.int64),
        )

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Made known to all ranks now, which no capture may do."""
        tensor: Tensor = self._library.empty(shape, dtype=dtype, device=self._device)
        self._library.rendezvous(tensor, self._group_name)
        return tensor

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=True,
            tolerance=0.0,
            layouts=tuple(Layout),
            counts_on_host=not self._stays,
            graph_safe=self._stays,
        )

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, SymmMemHandle]]:
        step.check(x)
        lane, spec = self._lanes[step.micro_batch], self._spec
        assert step.capacity <= max(spec.max_tokens, 1), (
            f"{step.capacity} tokens, the buffers are for {spec.max_tokens}"
        )
        assert x.dtype is spec.dtype, f"x is {x.dtype}, the buffers are for {spec.dtype}"
        assert lane.combined == lane.begun, "the dispatch before this one was not combined, its memory is still read"
        lane.begun += 1
        wire = _rows(lane.home, self._room.sent)
        place, stamps = self._sort(lane, routing.expert_ids, nowhere=wire.shape[0] - 1)
        row = torch.where(place >= 0, place, wire.shape[0] - 1).view(-1)
        packed = self._pack(x).unsqueeze(1).expand(*place.shape, wire.shape[1])
        wire.index_copy_(0, row, packed.reshape(-1, wire.shape[1]))
        self._room.sent.routes(wire).index_copy_(0, row, stamps)
        inbox = _rows(lane.away, self._room.sent)
        self._library.all_to_all_vdev_2d(wire, inbox, lane.splits, lane.arrived, self._group_name, 1)
        # Spread evenly, S·C·K assignments over S·E slots; the room says little of it.
        mean = max(1, -(-step.capacity * spec.top_k // spec.rows.num_slots))
        return _Arriving(self, lane, place, stamps, routing.weights, step.capacity, mean)

    def _pack(self, x: Tensor) -> Tensor:
        """`x [T, H]` as rows of the wire, `[T, B] uint8`, stamps apart."""
        packing = self._room.sent
        wire = torch.empty(x.shape[0], packing.num_bytes, dtype=torch.uint8, device=x.device)
        target = packing.tokens(wire)
        if isinstance(target, BlockScaled):
            quantized = quantize_rows(x, ue8m0=self._spec.rows.ue8m0)
            target.data.copy_(quantized.data)
            target.scale.copy_(quantized.scale)
        else:
            target.copy_(x)
        return wire

    def _sort(self, lane: _Lane, ids: Tensor, *, nowhere: int) -> tuple[Tensor, Tensor]:
        """The home row of each assignment of `ids [T, K]`, `[T, K]`, and its stamp, `[N, 2] int32`."""
        num_physical = self._spec.num_physical
        by_slot, order = torch.where(ids >= 0, ids, num_physical).view(-1).sort(stable=True)
        begins = torch.searchsorted(by_slot, self._bounds)
        splits = begins.diff() + self._heads
        lane.splits.copy_(splits)
        starts = splits.cumsum(0) - splits + self._heads
        number = torch.arange(order.numel(), device=ids.device) - begins.index_select(0, by_slot)
        slot = by_slot.clamp(max=num_physical - 1)
        row = torch.where(by_slot < num_physical, starts.index_select(0, slot) + number, NOWHERE)
        place = torch.empty_like(order).scatter_(0, order, row)
        stamps = torch.empty(order.numel(), 2, dtype=torch.int32, device=ids.device)
        stamps.index_copy_(0, order, torch.stack((by_slot, number), dim=1).to(torch.int32))
        return place.view(ids.shape), stamps

    def _receive(self, arriving: _Arriving) -> tuple[Rows, SymmMemHandle]:
        spec, lane, packing = self._spec, arriving.lane, self._room.sent
        num_slots = spec.rows.num_slots
        room = self._room.away_rows(arriving.capacity) - self._room.heads + self._num_heads_away
        wire = _rows(lane.away, packing)[:room]
        counts, starts = lane.arrived[0], lane.arrived[1]
        at = torch.arange(room, device=wire.device)
        split = torch.searchsorted(starts.contiguous(), at, right=True) - 1
        number = at - starts.index_select(0, split)
        heads = self._heads_away.index_select(0, split)
        real = (number >= heads) & (number < counts.index_select(0, split))
        slot = torch.div(split, spec.ep, rounding_mode="floor")
        stamps = torch.stack((slot + self._ep.rank * num_slots, number - heads), dim=1).to(torch.int32)
        _check(packing.routes(wire), stamps, real, "rows")
        mine = torch.where(real, slot, NOWHERE)
        tokens = packing.tokens(wire)
        rest = (arriving.weights, stamps)
        if self._stays:
            rows, row_of = spec.rows.sort(tokens, mine.unsqueeze(1), expected_rows=arriving.expected_rows)
            # What is no row is sent as any row: nobody fetches it.
            found = row_of.view(-1).clamp_(min=0)
            return rows, SymmMemHandle(lane, arriving.place, arriving.stamps, *rest, found, None, None)
        assert isinstance(tokens, Tensor), "rows in fp8 are sorted on the device"
        index = real.nonzero().view(-1)
        per_slot = torch.bincount(mine.index_select(0, index), minlength=num_slots).unsqueeze(0)
        laid_out, position = spec.rows.lay_out(tokens.index_select(0, index), per_slot)
        return laid_out, SymmMemHandle(lane, arriving.place, arriving.stamps, *rest, None, index, position)

    def combine_begin(self, y: Tensor, handle: SymmMemHandle) -> Pending[Tensor]:
        lane, packing = handle.lane, self._room.back
        wire = _rows(lane.away, packing)
        data = packing.tokens(wire)
        assert isinstance(data, Tensor), "outputs are never in fp8"
        if handle.row_of is not None:
            data[: handle.row_of.shape[0]].copy_(y.index_select(0, handle.row_of))
        elif handle.real is not None:
            data.index_copy_(0, handle.real, wire_order(y, handle.position))
        packing.routes(wire)[: handle.away_stamps.shape[0]].copy_(handle.away_stamps)
        inbox = _rows(lane.home, packing)
        self._library.all_to_all_vdev_2d_offset(wire, inbox, lane.arrived, lane.returned, self._group_name)
        lane.combined = lane.begun
        return _Returning(self, handle)

    def _sum(self, handle: SymmMemHandle) -> Tensor:
        packing = self._room.back
        wire = _rows(handle.lane.home, packing)
        data = packing.tokens(wire)
        assert isinstance(data, Tensor), "outputs are never in fp8"
        place = handle.place.view(-1)
        found = packing.routes(wire).index_select(0, place.clamp(min=0))
        _check(found, handle.stamps, place >= 0, "outputs")
        return unpermute(data, handle.place, handle.weights)

    def close(self) -> None:
        """Collective: lets go of all memory."""
        self._lanes.clear()


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Rows that are there in stream order."""

    dispatcher: SymmMemDispatcher
    lane: _Lane
    place: Tensor
    stamps: Tensor
    weights: Tensor
    capacity: int
    expected_rows: int

    def wait(self) -> tuple[Rows, SymmMemHandle]:
        return self.dispatcher._receive(self)


@dataclass(frozen=True, slots=True)
class _Returning:
    """Outputs that are home in stream order."""

    dispatcher: SymmMemDispatcher
    handle: SymmMemHandle

    def wait(self) -> Tensor:
        return self.dispatcher._sum(self.handle)


def _rows(memory: Tensor, packing: Packing) -> Tensor:
    """As many rows `[rows, B]` as `memory [bytes]` holds."""
    width = packing.num_bytes
    rows = memory.numel() // width
    return memory[: rows * width].view(rows, width)


def _check(found: Tensor, expected: Tensor, real: Tensor, what: str) -> None:
    """Assert on the device that the stamps `found [n, 2]` of `real` rows are those expected."""
    right = (found == expected).all(dim=1) | ~real
    torch._assert_async(right.all(), f"dispatch=symm_mem: torch's all-to-all fetched {what} from the wrong place")
