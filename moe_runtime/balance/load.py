"""LoadRecorder: tokens per logical expert and rows per rank, counted where they occur. L layers, E logical experts."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from moe_runtime.balance.routes import RouteBuffer
from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Phase, Rows
from moe_runtime.types import LogicalRouting

PHASES: Final = (Phase.DECODE, Phase.MIXED)
"""Counted apart, in this order."""

_LATE: Final = 16384
_LATE_CALL: Final = 128
"""Assignments that wait to be counted on a CPU, where counting many at once saves two thirds of the time. A call counts
for so many more: the memory of its tensor object."""


class LoadRecorder:
    """Counts on the device, of one rank's real tokens; sum over ranks for the whole load.

    Counting adds in place at fixed addresses, so it can be captured. `routes`: where the routes themselves are kept.
    """

    def __init__(
        self,
        num_layers: int,
        num_logical: int,
        *,
        device: torch.device | str = "cpu",
        routes: RouteBuffer | None = None,
    ) -> None:
        # One entry more than experts: padding rows carry id -1, which wraps to it. Rows start at multiples of 16 bytes:
        # a kernel is compiled once for aligned addresses and once more for others.
        entries, rows = num_logical + 1, len(PHASES) * num_layers
        self._num_layers = num_layers
        self._counts = torch.zeros(rows, entries + entries % 2, dtype=torch.int64, device=device)[:, :entries]
        self._received = torch.zeros(rows, dtype=torch.int64, device=device)
        self._on_cpu = torch.device(device).type == "cpu"
        self._late: list[list[Tensor]] = [[] for _ in range(rows)]
        self._num_late = 0
        self._received_on_host = [0] * rows
        self.routes = routes

    def record(self, layer: int, routing: LogicalRouting, phase: Phase = Phase.MIXED, *, micro_batch: int = 0) -> None:
        """Count the assignments of `routing` for MoE layer `layer`. Its ids must not be written to afterwards."""
        ids = routing.expert_ids
        row = layer if phase is Phase.DECODE else self._num_layers + layer
        if self._on_cpu:
            self._late[row].append(ids)
            self._num_late += ids.numel() + _LATE_CALL
            if self._num_late > _LATE:
                self._catch_up()
        else:
            self._counts[row].put_(ids, torch.ones_like(ids), accumulate=True)
        if self.routes is not None:
            self.routes.of(layer, micro_batch)[: len(ids)].copy_(ids)

    def counts_of(self, layer: int, phase: Phase = Phase.MIXED) -> Tensor:
        """[E+1] int64: MoE layer `layer`'s own row, for a kernel that adds to it; the last entry is no expert's."""
        return self._counts[layer if phase is Phase.DECODE else self._num_layers + layer]

    def routes_of(self, layer: int, *, micro_batch: int = 0) -> Tensor | None:
        """[T, K] int16 for the step's logical ids; None where routes are not kept."""
        return None if self.routes is None else self.routes.of(layer, micro_batch)

    def record_received(self, layer: int, rows: Rows, phase: Phase = Phase.MIXED, *, captured: bool = False) -> None:
        """Count the rows that this rank's slots received for MoE layer `layer`; waits for no device.

        `captured`: what is done here may be captured, so all of it must happen on the device.
        """
        row = layer if phase is Phase.DECODE else self._num_layers + layer
        if self._on_cpu and not captured:
            self._received_on_host[row] += int(_num_rows(rows))
        else:
            self._received[row].add_(_num_rows(rows))

    def received(self) -> Tensor:
        """[L] int64: rows received by this rank, a copy."""
        return self.received_by_phase().sum(0)

    def counts(self) -> Tensor:
        """[L, E] int64, a copy."""
        return self.counts_by_phase().sum(0)

    def copy_counts_(self, out: Tensor) -> None:
        """`counts` into `out` [L, E] int64. Takes no memory for itself, but on a CPU for what waits to be counted."""
        self._catch_up()
        torch.add(*self._counts[:, :-1].view(len(PHASES), *out.shape), out=out)

    def received_by_phase(self) -> Tensor:
        """[PHASES, L] int64, a copy."""
        received = self._received
        if self._on_cpu:
            received = received + torch.tensor(self._received_on_host)
        return received.view(len(PHASES), self._num_layers).clone()

    def counts_by_phase(self) -> Tensor:
        """[PHASES, L, E] int64, a copy."""
        self._catch_up()
        return self._counts[:, :-1].reshape(len(PHASES), self._num_layers, -1).clone()

    def _catch_up(self) -> None:
        if self._num_late:
            for counts, late in zip(self._counts, self._late, strict=True):
                if late:
                    ids = torch.cat(late)
                    counts.put_(ids, torch.ones_like(ids), accumulate=True)
                    late.clear()
            self._num_late = 0


def _num_rows(rows: Rows) -> int | Tensor:
    match rows:
        case GroupedRows(exact=True):
            return rows.data.shape[0]
        case GroupedRows(alignment=1):
            return rows.psum[-1]
        case GroupedRows():
            starts = torch.nn.functional.pad(-(-rows.psum[:-1] // rows.alignment) * rows.alignment, (1, 0))
            return (rows.psum - starts).sum()
        case PaddedRows():
            return rows.counts.sum()
