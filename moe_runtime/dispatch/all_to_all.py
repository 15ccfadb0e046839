"""Dispatch by variable all-to-all: counts first, then rows; unweighted rows come back and are summed at home.

T tokens, H hidden, K top-k, R received rows, S = ep sources, E local slots, P = S·E physical slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Rows
from moe_runtime.dispatch.local import rows_bytes
from moe_runtime.dispatch.rows import lay_out, send_order, wire_order
from moe_runtime.types import Pending, PhysicalRouting


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    row_of: Tensor
    weights: Tensor
    sent: Sequence[int]
    """Rows per destination rank."""
    received: Sequence[int]
    """Rows per source rank."""
    position: Tensor | None


class AllToAllDispatcher:
    """`Dispatcher[AllToAllHandle]` over any communicator; bitwise equal to `local`."""

    def __init__(
        self,
        ep: Communicator,
        num_slots: int,
        *,
        layout: Layout = Layout.GROUPED,
        alignment: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """`num_slots`: local slots of each rank."""
        self._ep = ep
        self._slots = num_slots
        self._layout = layout
        self._alignment = alignment
        self._bounds = torch.arange(ep.size * num_slots + 1, device=device)
        self._even = [num_slots] * ep.size

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=True, tolerance=0.0, layouts=tuple(Layout), counts_on_host=True, graph_safe=False
        )

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, AllToAllHandle]]:
        """Returns with the rows on their way: their counts are exchanged while the rows are sorted."""
        assert x.shape[0] <= step.capacity, f"{x.shape[0]} tokens exceed the agreed capacity {step.capacity}"
        order = send_order(routing.expert_ids, self._bounds)
        counting = self._ep.all_to_all_begin(order.counts, self._even, self._even)
        sent = self._per_rank(order.counts)
        rows = x.index_select(0, order.token_of)
        counts = counting.wait()
        received = self._per_rank(counts)
        wire = self._ep.all_to_all_begin(rows, sent, received)
        return _Arriving(self, wire, counts, order.row_of, routing.weights, sent, received)

    def combine_begin(self, y: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        wire = self._ep.all_to_all_begin(wire_order(y, handle.position), handle.received, handle.sent)
        return _Returning(wire, handle)

    def receive_bytes(self, step: DispatchStep, hidden: int, itemsize: int, top_k: int) -> int:
        """All tokens of all ranks come here, each as often as it can: counts, wire rows and, where these are regrouped
        by slot, the regrouped rows beside them."""
        tokens = self._ep.size * step.capacity
        per_token = min(top_k, self._slots)
        row_bytes = hidden * itemsize
        total = self._bounds.itemsize * self._ep.size * self._slots + tokens * per_token * row_bytes
        if self._slots == 1 and self._layout is Layout.GROUPED and self._alignment == 1:
            return total
        return total + rows_bytes(tokens, per_token, self._slots, row_bytes, self._layout, self._alignment)

    def close(self) -> None: ...

    def _per_rank(self, counts: Tensor) -> list[int]:
        per_rank: list[int] = (counts if self._slots == 1 else counts.view(-1, self._slots).sum(1)).tolist()
        return per_rank

    def _regroup(self, wire: Tensor, counts: Tensor) -> tuple[Rows, Tensor | None]:
        return lay_out(wire, counts.view(-1, self._slots), self._layout, alignment=self._alignment)


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Rows on their way to the experts."""

    dispatcher: AllToAllDispatcher
    wire: Pending[Tensor]
    counts: Tensor
    row_of: Tensor
    weights: Tensor
    sent: list[int]
    received: list[int]

    def wait(self) -> tuple[Rows, AllToAllHandle]:
        rows, position = self.dispatcher._regroup(self.wire.wait(), self.counts)
        return rows, AllToAllHandle(self.row_of, self.weights, self.sent, self.received, position)


@dataclass(frozen=True, slots=True)
class _Returning:
    """Rows on their way home."""

    wire: Pending[Tensor]
    handle: AllToAllHandle

    def wait(self) -> Tensor:
        return unpermute(self.wire.wait(), self.handle.row_of, self.handle.weights)
