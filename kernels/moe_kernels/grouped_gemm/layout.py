"""Where each slot's rows are, and their cut into blocks of equal height. E slots, R rows, B blocks, C rows each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows of slot e: `starts[e] .. starts[e] + counts[e]`, of `rows` rows in all; slot e owns `spans[e]` rows with its
    gap. All `[E] int64`."""

    starts: Tensor
    counts: Tensor
    spans: Tensor
    rows: int

    def segments(self) -> list[tuple[int, int, int]]:
        """`(slot, start, count)` of every slot that has rows."""
        starts, counts = self.starts.tolist(), self.counts.tolist()
        return [(slot, starts[slot], count) for slot, count in enumerate(counts) if count]


def ragged_rows(psum: Tensor, rows: int, *, alignment: int) -> SlotRows:
    """Rows of slot e lie from `psum[e-1]` rounded up to `alignment` to `psum[e]`."""
    ends = psum.long()
    nexts = ends if alignment == 1 else (ends + (alignment - 1)).div_(alignment, rounding_mode="floor").mul_(alignment)
    starts = torch.cat((ends.new_zeros(1), nexts[:-1]))
    return SlotRows(starts, ends - starts, nexts - starts, rows)


def padded_rows(counts: Tensor, capacity: int) -> SlotRows:
    """Slot e owns rows `e * capacity .. (e + 1) * capacity`."""
    slots = counts.shape[0]
    starts = torch.arange(0, slots * capacity, capacity, device=counts.device) if capacity else counts.long() * 0
    return SlotRows(starts, counts.long(), torch.full_like(starts, capacity), slots * capacity)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows cut into blocks of `height` rows of one slot each; a slot with more rows takes several blocks.

    `slots [B]`; `gather [B * height]` picks the blocks' rows out of the R rows (a short block is filled with whatever
    rows follow: their products are thrown away); `back [R]` picks each row's result out of the blocks' results.
    """

    slots: Tensor
    gather: Tensor
    back: Tensor
    height: int


def cut(rows: SlotRows, height: int) -> Blocks:
    """Cut every slot's rows into blocks of `height`. At least one row must be there."""
    device = rows.counts.device
    per_slot = (rows.counts + (height - 1)).div_(height, rounding_mode="floor")
    ends = per_slot.cumsum(0)
    shift = rows.starts - (ends - per_slot) * height
    slots = torch.repeat_interleave(per_slot)
    total = slots.shape[0] * height
    gather = torch.arange(total, device=device).view(-1, height).add_(shift.index_select(0, slots).unsqueeze(1))
    back = torch.repeat_interleave(shift, rows.spans).neg_()
    if back.shape[0] < rows.rows:
        back = torch.cat((back, back.new_zeros(rows.rows - back.shape[0])))
    back = back.add_(torch.arange(rows.rows, device=device)).clamp_(0, total - 1)
    return Blocks(slots, gather.view(-1).clamp_(max=rows.rows - 1), back, height)
