"""Dispatch by all-to-all; unweighted rows come back and are summed at home.

Counts first, then rows. Where the kernels are Triton's, decode steps take equal blocks instead (`equal_split.py`): more
bytes, fixed shapes, and no count on the host.

T tokens, H hidden, K top-k, R received rows, S = ep sources, E local slots, P = S·E physical slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Phase, Rows
from moe_runtime.dispatch.equal_split import EqualSplit, EqualSplitHandle
from moe_runtime.dispatch.parts import Cut, rows_per_rank
from moe_runtime.dispatch.rows import RowLayout, send_order, wire_order
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import Pending, PhysicalRouting

COUNT_BYTES = 8
"""Rows per slot travel as int64."""
SLOT_BYTES = 4
"""In equal blocks each row's slot travels as int32."""


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    row_of: Tensor
    weights: Tensor
    sent: Sequence[int]
    """Rows per destination rank."""
    received: Sequence[int]
    """Rows per source rank."""
    position: Tensor | None
    cut: Cut | None = None
    """Where the combine comes in two parts."""


Handle = AllToAllHandle | EqualSplitHandle


class AllToAllDispatcher:
    """`Dispatcher[Handle]` over any communicator; bitwise equal to `local`."""

    def __init__(
        self, ep: Communicator, rows: RowLayout, *, device: torch.device | str = "cpu", equal_blocks: bool = True
    ) -> None:
        """`rows`: those of each rank. `equal_blocks`: in decode steps, where rows stay on the device."""
        self._ep = ep
        self._rows = rows
        self._bounds = torch.arange(ep.size * rows.num_slots + 1, device=device)
        self._even = [rows.num_slots] * ep.size
        self._equal = EqualSplit(ep, rows) if equal_blocks and rows.stays_on(self._bounds.device) else None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=True,
            tolerance=0.0,
            layouts=tuple(Layout),
            counts_on_host=True,
            graph_safe=self._equal is not None,
            splits_combine=True,
        )

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Pending[tuple[Rows, Handle]]:
        """Returns with the rows on their way: their counts are exchanged while the rows are sorted."""
        step.check(x)
        if self._equal is not None and step.phase is not Phase.MIXED:
            assert not step.split_combine, "equal blocks come home as a whole"
            return self._equal.dispatch_begin(x, routing, step)
        return self._by_counts(x, routing, split=step.split_combine)

    def _by_counts(self, x: Tensor, routing: PhysicalRouting, *, split: bool) -> _Arriving:
        order = send_order(routing.expert_ids, self._bounds)
        counting = self._ep.all_to_all_begin(order.counts, self._even, self._even)
        first_sent, sent = self._per_rank(order.counts, split=split)
        rows = x.index_select(0, order.token_of)
        counts = counting.wait()
        first_received, received = self._per_rank(counts, split=split)
        wire = self._ep.all_to_all_begin(rows, sent, received)
        cut = None
        if split:
            shape = (self._ep.size, self._rows.num_slots)
            both = order.counts.view(shape), counts.view(shape)
            cut = Cut(routing.expert_ids, *both, first_sent, first_received)
        return _Arriving(self, wire, counts, order.row_of, routing.weights, sent, received, cut)

    def combine_begin(self, y: Tensor, handle: Handle) -> Pending[Tensor]:
        if isinstance(handle, EqualSplitHandle):
            assert self._equal is not None, "a handle of another dispatcher"
            return self._equal.combine_begin(y, handle)
        return _Returning(self._send_home(y, handle), handle)

    def split(self, rows: Rows, handle: Handle) -> tuple[tuple[Rows, Handle], tuple[Rows, Handle]]:
        """Of a dispatch by counts, where both sides know those of both parts."""
        assert isinstance(handle, AllToAllHandle) and handle.cut is not None, "dispatched to be combined as a whole"
        cut = handle.cut
        (first, at_first), (rest, at_rest) = cut.split(rows, handle.position)
        ours = replace(handle, sent=cut.first_sent, received=cut.first_received, position=at_first)
        theirs = replace(
            handle,
            row_of=cut.home_rows(handle.row_of),
            sent=_less(handle.sent, cut.first_sent),
            received=_less(handle.received, cut.first_received),
            position=at_rest,
        )
        return (first, ours), (rest, theirs)

    def combine_first_begin(self, y: Tensor, handle: Handle) -> Pending[Tensor]:
        assert isinstance(handle, AllToAllHandle), "equal blocks come home as a whole"
        return self._send_home(y, handle)

    def combine_rest_begin(self, y: Tensor, handle: Handle, first: Pending[Tensor]) -> Pending[Tensor]:
        assert isinstance(handle, AllToAllHandle), "equal blocks come home as a whole"
        return _Returning(self._send_home(y, handle), handle, first)

    def _send_home(self, y: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        return self._ep.all_to_all_begin(wire_order(y, handle.position), handle.received, handle.sent)

    def close(self) -> None: ...

    def _per_rank(self, counts: Tensor, *, split: bool) -> tuple[list[int], list[int]]:
        """Rows of the first part, where there is one, and of all."""
        slots = self._rows.num_slots
        if split:
            return rows_per_rank(counts.view(-1, slots))
        return [], (counts if slots == 1 else counts.view(-1, slots).sum(1)).tolist()

    def _regroup(self, wire: Tensor, counts: Tensor) -> tuple[Rows, Tensor | None]:
        return self._rows.lay_out(wire, counts.view(-1, self._rows.num_slots))


def buffer_bytes(spec: DispatchSpec) -> int:
    """All tokens of all ranks come here, each as often as it can: counts, wire rows and, where these are regrouped by
    slot, the regrouped rows beside them. Equal blocks take the same; the slots of their rows stand for the counts."""
    rows = spec.rows
    per_token = min(spec.top_k, rows.num_slots)
    wire_rows = spec.ep * spec.max_tokens * per_token
    numbers = max(COUNT_BYTES * spec.ep * rows.num_slots, SLOT_BYTES * wire_rows)
    total = numbers + wire_rows * spec.row_bytes
    if rows.num_slots == 1 and rows.dense:
        return total
    return total + rows.worst_bytes(spec.ep * spec.max_tokens, per_token, spec.row_bytes)


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
    cut: Cut | None

    def wait(self) -> tuple[Rows, AllToAllHandle]:
        rows, position = self.dispatcher._regroup(self.wire.wait(), self.counts)
        return rows, AllToAllHandle(self.row_of, self.weights, self.sent, self.received, position, self.cut)


@dataclass(frozen=True, slots=True)
class _Returning:
    """Rows on their way home, `first` before them where they are the second part."""

    wire: Pending[Tensor]
    handle: AllToAllHandle
    first: Pending[Tensor] | None = None

    def wait(self) -> Tensor:
        if self.first is None:
            return unpermute(self.wire.wait(), self.handle.row_of, self.handle.weights)
        first = self.first.wait()
        return unpermute(first, self.handle.row_of, self.handle.weights, rest=self.wire.wait())


def _less(counts: Sequence[int], others: Sequence[int]) -> list[int]:
    return [count - other for count, other in zip(counts, others, strict=True)]
