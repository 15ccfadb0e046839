"""An all-to-all of equal blocks: every rank has room for all rows of every other, so the host needs no counts.

T tokens, C capacity, H hidden, K top-k, S ep ranks, E local slots, J = min(K, E) rows of a token for one rank at most.
The block from one rank to another has C·J rows: row t·J + j holds token t for the j-th of its slots there. What no
token took is sent as it is and marked as going nowhere. The way home has no parts: nobody knows which rows of a block
are of which slots, so each part would be as long as the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.permute import unpermute
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, Rows
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import NOWHERE, Pending, PhysicalRouting


def step_bytes(spec: DispatchSpec) -> int:
    """What a rank sends in the largest decode step: J rows of every token to every rank, and back."""
    return 2 * spec.ep * spec.max_decode_tokens * min(spec.top_k, spec.rows.num_slots) * spec.row_bytes


@dataclass(frozen=True, slots=True)
class EqualSplitHandle:
    place: Tensor
    """[T, K] int64: wire row of each assignment at its token's home, -1 where it goes nowhere."""
    weights: Tensor
    """[T, K] fp32."""
    row_of: Tensor
    """[S*C*J] int64: row of the experts' outputs for each wire row received."""
    block: int
    """C·J."""


@dataclass(frozen=True, slots=True)
class EqualSplit:
    """Dispatch and combine of one rank; bitwise equal to `local`."""

    ep: Communicator
    rows: RowLayout

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, EqualSplitHandle]]:
        ids, (tokens, top_k) = routing.expert_ids, routing.expert_ids.shape
        width = min(top_k, self.rows.num_slots)
        block = step.capacity * width
        size = self.ep.size * block
        place = _places(ids, num_slots=self.rows.num_slots, width=width, block=block)
        # One row more takes what goes nowhere, so that no shape depends on the routing.
        row = torch.where(ids >= 0, place, size).view(-1)
        slots = torch.full((size + 1,), NOWHERE, dtype=torch.int32, device=ids.device)
        slots.scatter_(0, row, (ids % self.rows.num_slots).to(torch.int32).view(-1))

        def send(data: Tensor) -> Pending[Tensor]:
            wire = data.new_empty(size + 1, data.shape[1])
            wire.index_copy_(0, row, data.unsqueeze(1).expand(tokens, top_k, data.shape[1]).reshape(-1, data.shape[1]))
            return self._exchange(wire[:size], block)

        quantized = quantize_rows(x, ue8m0=self.rows.ue8m0) if self.rows.quantizes(x) else None
        parts = (x,) if quantized is None else (quantized.data.view(torch.uint8), quantized.scale)
        wires = tuple([send(part) for part in parts])
        mean = max(1, -(-step.capacity * top_k // self.rows.num_slots))
        return _Arriving(self, wires, self._exchange(slots[:size], block), place, routing.weights, block, mean)

    def combine_begin(self, y: Tensor, handle: EqualSplitHandle) -> Pending[Tensor]:
        return _Returning(self._exchange(y.index_select(0, handle.row_of), handle.block), handle)

    def _exchange(self, x: Tensor, block: int) -> Pending[Tensor]:
        even = [block] * self.ep.size
        return self.ep.all_to_all_begin(x, even, even)


def _places(ids: Tensor, *, num_slots: int, width: int, block: int) -> Tensor:
    """[T, K] int64: the wire row of each assignment of `ids [T, K]`, -1 for NOWHERE."""
    home = torch.div(ids, num_slots, rounding_mode="floor")
    place = home * block + torch.arange(ids.shape[0], device=ids.device).mul_(width).unsqueeze(1)
    if width > 1:
        place += (home.unsqueeze(2) == home.unsqueeze(1)).tril(-1).sum(2)  # the token's earlier ones on that rank
    return place.masked_fill_(ids < 0, NOWHERE)


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Rows on their way to the experts, and the slot of each."""

    split: EqualSplit
    wires: tuple[Pending[Tensor], ...]
    slots: Pending[Tensor]
    place: Tensor
    weights: Tensor
    block: int
    expected_rows: int

    def wait(self) -> tuple[Rows, EqualSplitHandle]:
        parts = [wire.wait() for wire in self.wires]
        data = BlockScaled(parts[0].view(torch.float8_e4m3fn), parts[1]) if len(parts) > 1 else parts[0]
        slots = self.slots.wait().to(torch.int64).unsqueeze(1)
        rows, row_of = self.split.rows.sort(data, slots, expected_rows=self.expected_rows)
        # What went nowhere comes back as any row: nobody reads it.
        return rows, EqualSplitHandle(self.place, self.weights, row_of.view(-1).clamp_(min=0), self.block)


@dataclass(frozen=True, slots=True)
class _Returning:
    """Outputs on their way home, unweighted."""

    wire: Pending[Tensor]
    handle: EqualSplitHandle

    def wait(self) -> Tensor:
        return unpermute(self.wire.wait(), self.handle.place, self.handle.weights)
