"""Rows in wire order and in canonical layout.

T tokens, K top-k, N assignments, R rows, S sources, E local slots, P physical slots, H hidden.
Wire order at a token's home: by physical slot, then token, then k; so blocks per destination rank are contiguous.
Wire order at the receiver: by source rank, then local slot: S·E blocks, regrouped here to slot-major.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels import backends
from moe_kernels.permute import permute
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, Layout, PaddedRows, Rows


@dataclass(frozen=True, slots=True)
class SendOrder:
    """The assignments of `expert_ids [T, K]` in wire order."""

    token_of: Tensor
    """[N] int64: the token of each wire row."""
    row_of: Tensor
    """[T, K] int64: the wire row of each assignment, -1 for NOWHERE."""
    counts: Tensor
    """[P] int64: rows per slot."""


def send_order(expert_ids: Tensor, slot_bounds: Tensor) -> SendOrder:
    """Sort `expert_ids [T, K] int64` (−1 = nowhere) by slot; `slot_bounds` is `arange(P + 1)`.

    Waits for the device once (the number of assignments that go nowhere).
    """
    tokens, top_k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    slots, order = flat.sort(stable=True)
    ends = torch.searchsorted(slots, slot_bounds)
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    if nowhere := int(ends[0]):
        row_of = (row_of - nowhere).clamp_(min=-1)
        order = order[nowhere:]
    # torch.div, since `//` on tensors goes through Python (3 us more; a rank of 320 spends 90 us on a whole dispatch).
    token_of = torch.div(order, top_k, rounding_mode="floor")
    return SendOrder(token_of, row_of.view(tokens, top_k), ends.diff())


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How a rank lays out the rows of its `num_slots` slots; grouped, a slot starts at a multiple of `alignment`.

    `quantize`: the experts multiply in fp8, so bf16 rows that are sorted by a kernel become fp8 on the way (the experts
    would do it to the same bytes, but for all the room there is); `ue8m0`: with scales that are powers of two.
    """

    num_slots: int
    layout: Layout = Layout.GROUPED
    alignment: int = 1
    quantize: bool = False
    ue8m0: bool = False

    def quantizes(self, x: Tensor) -> bool:
        """Whether rows like `x` become fp8."""
        return self.quantize and x.dtype is torch.bfloat16

    @property
    def dense(self) -> bool:
        """Whether slot follows slot without a gap."""
        return self.layout is Layout.GROUPED and self.alignment == 1

    def stays_on(self, device: torch.device) -> bool:
        """Whether rows are sorted without the host's knowledge of their number, in room for the worst case: grouped
        rows on Triton. A padded layout with room for the worst case would hold as many tokens for every slot."""
        return self.layout is Layout.GROUPED and backends.default_backend(device) == "triton"

    def sort(
        self, x: Tensor | BlockScaled, slots: Tensor, *, expected_rows: int | None = None
    ) -> tuple[GroupedRows, Tensor]:
        """Where rows stay on the device: `x [T, H]` to `slots [T, K] int64` of this rank (others go nowhere), and the
        row of each assignment, `[T, K] int64`, -1 for none. What came in fp8 stays so."""
        quantize = isinstance(x, Tensor) and self.quantizes(x)
        layout = "mn" if quantize or isinstance(x, BlockScaled) else "row"
        found = permute(
            x,
            slots,
            self.num_slots,
            alignment=self.alignment,
            quantize=quantize,
            ue8m0=self.ue8m0,
            scale_layout=layout,
        )
        rows = GroupedRows(found.data, found.psum, self.alignment, scales=found.scale, expected_rows=expected_rows)
        return rows, found.row_of

    def lay_out(self, wire: Tensor, counts: Tensor) -> tuple[Rows, Tensor | None]:
        """`wire [R, H]` in `counts [S, E] int64` blocks -> rows in this layout, and where each wire row went.

        The position `[R] int64` indexes the rows' data viewed as `[-1, H]`; None where wire rows stayed as they are.
        Padding rows are zero. Waits for the device once where there is padding.
        """
        sources, slots = counts.shape
        if slots == 1 and self.dense:
            ends = torch.full((1,), wire.shape[0], dtype=torch.int32, device=wire.device)
            return GroupedRows(wire, ends, exact=True), None
        per_slot = counts.sum(0)
        if self.dense:
            ends = per_slot.cumsum(0)
            if sources == 1:
                return GroupedRows(wire, ends.to(torch.int32), exact=True), None
            position = positions(counts, ends - per_slot, wire.shape[0])
            data = torch.empty_like(wire).index_copy_(0, position, wire)
            return GroupedRows(data, ends.to(torch.int32), exact=True), position
        if self.layout is Layout.GROUPED:
            spans = (per_slot + (self.alignment - 1)) // self.alignment * self.alignment
            starts = spans.cumsum(0) - spans
            position = positions(counts, starts, wire.shape[0])
            data = wire.new_zeros(int(spans.sum()), wire.shape[1]).index_copy_(0, position, wire)
            return GroupedRows(data, (starts + per_slot).to(torch.int32), self.alignment), position
        capacity = int(per_slot.max())
        position = positions(counts, torch.arange(slots, device=wire.device) * capacity, wire.shape[0])
        data = wire.new_zeros(slots * capacity, wire.shape[1]).index_copy_(0, position, wire)
        return PaddedRows(data.view(slots, capacity, wire.shape[1]), per_slot.to(torch.int32)), position

    def worst_bytes(self, tokens: int, per_token: int, row_bytes: int) -> int:
        """Most bytes of the rows' data where each of `tokens` brings up to `per_token` rows to this rank."""
        if self.layout is Layout.PADDED:
            return self.num_slots * tokens * row_bytes
        return (tokens * per_token + self.num_slots * (self.alignment - 1)) * row_bytes


def wire_order(y: Tensor, position: Tensor | None) -> Tensor:
    """Inverse of `RowLayout.lay_out`: the experts' outputs `y` (shaped as the rows' data) in wire order `[R, H]`."""
    return y if position is None else y.reshape(-1, y.shape[-1]).index_select(0, position)


def positions(counts: Tensor, starts: Tensor, num_rows: int) -> Tensor:
    """[R] int64: where each wire row goes if slot e's rows begin at `starts[e]`, sources in order within a slot."""
    earlier_sources = counts.cumsum(0) - counts
    flat = counts.reshape(-1)
    wire_starts = flat.cumsum(0) - flat
    shift = (earlier_sources + starts).reshape(-1) - wire_starts
    return torch.arange(num_rows, device=counts.device).add_(torch.repeat_interleave(shift, flat, output_size=num_rows))
