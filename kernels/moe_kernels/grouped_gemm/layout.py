"""Where each slot's rows are, and their cut into blocks of equal height. E slots, R rows, B blocks, C rows each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

_MOST_ROWS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows of slot e: `starts[e] .. starts[e] + counts[e]` of `rows` in all; it owns `spans[e]` rows with its gap.

    `[E] int64` each.
    """

    starts: Tensor
    counts: Tensor
    spans: Tensor
    rows: int

    def total(self) -> int:
        """Rows that are real (waits for the device)."""
        return int(self.counts.sum())

    def slot_of_rows(self) -> Tensor:
        """`[R] int64`: the slot that owns each row or the gap it is in; the last one for rows past the end."""
        ends = self.starts + self.spans
        places = torch.arange(self.rows, device=ends.device)
        return torch.searchsorted(ends, places, right=True).clamp_(max=ends.shape[0] - 1)

    def segments(self) -> list[tuple[int, int, int]]:
        """`(slot, start, count)` of every slot that has rows."""
        starts, counts = self.starts.tolist(), self.counts.tolist()
        return [(slot, starts[slot], count) for slot, count in enumerate(counts) if count]


def ragged_rows(psum: Tensor, rows: int, *, alignment: int) -> SlotRows:
    """Rows of slot e lie from `psum[e-1]` rounded up to `alignment` to `psum[e]`."""
    ends = psum.long()
    nexts = ends
    if alignment > 1:
        nexts = (ends + (alignment - 1)).div_(alignment, rounding_mode="floor").mul_(alignment)
    starts = torch.cat((ends.new_zeros(1), nexts[:-1]))
    counts = ends - starts
    return SlotRows(starts, counts, counts if alignment == 1 else nexts - starts, rows)


def padded_rows(counts: Tensor, capacity: int) -> SlotRows:
    """Slot e owns rows `e * capacity .. (e + 1) * capacity`."""
    slots = counts.shape[0]
    spans = torch.full((slots,), capacity, device=counts.device)
    return SlotRows(torch.arange(slots, device=counts.device) * capacity, counts.long(), spans, slots * capacity)


@cache
def every_row(device: torch.device) -> Tensor:
    """`[1] int32`: the row mark of an only slot that owns whatever rows there are, on `torch` and `triton`.

    The same tensor at every call, so that a product costs no launch to say how many rows it has; never write to it.
    """
    return torch.full((1,), _MOST_ROWS, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class RowMarks:
    """Where the slots' rows are, on the device: `marks [E] int32`.

    End offsets of ragged rows, whose slots start at multiples of `alignment` (`capacity` None), or the counts of real
    rows among `capacity` per slot.
    """

    marks: Tensor
    capacity: int | None
    alignment: int = 1

    def mean(self, rows: int) -> int:
        """Rows per slot to choose tiles for: the mean of `rows` ragged ones, or the capacity."""
        return -(-rows // self.marks.shape[0]) if self.capacity is None else self.capacity

    def located(self, rows: int) -> SlotRows:
        """As starts and counts; `rows` in all."""
        if self.capacity is None:
            return ragged_rows(self.marks, rows, alignment=self.alignment)
        return padded_rows(self.marks, self.capacity)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows cut into blocks of `height` rows of one slot each; a slot with more rows takes several blocks.

    `slots [B]`; `gather [B * height]` picks the blocks' rows out of the R rows (a short block is filled with whatever
    rows follow: their products are thrown away); `back [R]` picks each row's result out of the blocks' results.
    Both are None where the blocks are the rows as they lie.
    """

    slots: Tensor
    gather: Tensor | None
    back: Tensor | None
    height: int

    def collect(self, x: Tensor) -> Tensor:
        """`x [R, K]` -> `[B * height, K]`."""
        return x if self.gather is None else x.index_select(0, self.gather)

    def bring_back(self, y: Tensor) -> Tensor:
        """`y [B * height, N]` -> `[R, N]`."""
        return y if self.back is None else y.index_select(0, self.back)


def cut(rows: SlotRows, height: int) -> Blocks:
    """Cut every slot's rows into blocks of `height`, a power of two. At least one row must be there."""
    device = rows.counts.device
    per_slot = rows.counts + (height - 1) >> height.bit_length() - 1
    before = per_slot.cumsum(0).sub_(per_slot)
    shift = rows.starts - before.mul_(height)
    slots = torch.repeat_interleave(per_slot)
    total = slots.shape[0] * height
    gather = torch.arange(total, device=device).view(-1, height).add_(shift.index_select(0, slots).unsqueeze(1))
    back = torch.arange(rows.rows, device=device)
    owned = torch.repeat_interleave(shift, rows.spans)[: rows.rows]
    back[: owned.shape[0]].sub_(owned)
    return Blocks(slots, gather.view(-1).clamp_(max=rows.rows - 1), back.clamp_(0, total - 1), height)
