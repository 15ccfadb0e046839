"""The rows of a dispatch in two parts, those of the first slots and those of the others, whose counts the host knows.

T tokens, K top-k, S ranks, E local slots, R rows. In wire order a rank's rows are by slot, so a part is a run within
each rank's block; as the experts take them all rows are by slot, so a part is one run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows, first_slots
from moe_runtime.dispatch.rows import positions

Part = tuple[Rows, Tensor | None]
"""A part's rows, and where its wire rows went, as `RowLayout.lay_out` tells of all."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank knows of the parts of a dispatch. Counts of rows are `[S, E] int64`; lists are the first part's."""

    expert_ids: Tensor
    """[T, K] int64: physical slots, -1 for NOWHERE."""
    sent: Tensor
    received: Tensor
    first_sent: list[int]
    """Per destination rank."""
    first_received: list[int]
    """Per source rank."""

    def home_rows(self, row_of: Tensor) -> Tensor:
        """Wire rows `row_of [T, K]` (-1 = nowhere) where all ranks' first parts come home before all others."""
        slots = self.sent.shape[1]
        cut = first_slots(slots)
        first, rest = self.sent[:, :cut].sum(1), self.sent[:, cut:].sum(1)
        up, down = rest - rest.cumsum(0), first.sum() - first.cumsum(0)
        in_first = torch.arange(slots, device=row_of.device) < cut
        shift = torch.where(in_first, up.unsqueeze(1), down.unsqueeze(1)).view(-1)
        moved = row_of + shift.index_select(0, self.expert_ids.clamp(min=0).view(-1)).view_as(row_of)
        return torch.where(row_of < 0, row_of, moved)

    def split(self, rows: Rows, position: Tensor | None) -> tuple[Part, Part]:
        """Views of both parts of `rows`, whose wire rows went to `position`.

        Waits for the device where slots have gaps between them, as laying them out did.
        """
        assert rows.scales is None and rows.weights is None, "rows travel plain and are weighted at home"
        slots = self.received.shape[1]
        cut, num_first = first_slots(slots), sum(self.first_received)
        match rows:
            case GroupedRows():
                starts = rows.psum - self.received.sum(0)
                begin = num_first if rows.alignment == 1 else int(starts[cut])
                first: Rows = replace(rows, data=rows.data[:begin], psum=rows.psum[:cut])
                rest: Rows = replace(rows, data=rows.data[begin:], psum=rows.psum[cut:] - begin)
            case PaddedRows():
                capacity = rows.data.shape[1]
                starts, begin = torch.arange(slots, device=rows.data.device) * capacity, cut * capacity
                first = replace(rows, data=rows.data[:cut], counts=rows.counts[:cut])
                rest = replace(rows, data=rows.data[cut:], counts=rows.counts[cut:])
        if position is None:
            return (first, None), (rest, None)
        at_first = positions(self.received[:, :cut], starts[:cut], num_first)
        at_rest = positions(self.received[:, cut:], starts[cut:] - begin, position.shape[0] - num_first)
        return (first, at_first), (rest, at_rest)


def rows_per_rank(counts: Tensor) -> tuple[list[int], list[int]]:
    """Of the first part and of both, from `counts [S, E] int64`. Waits for the device once."""
    first, every = torch.stack((counts[:, : first_slots(counts.shape[1])].sum(1), counts.sum(1))).tolist()
    return first, every
