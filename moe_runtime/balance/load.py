"""LoadRecorder: tokens per logical expert and rows per rank, counted where they occur. L layers, E logical experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows
from moe_runtime.types import LogicalRouting


class LoadRecorder:
    """Counts on the device, of one rank's real tokens; sum over ranks for the whole load."""

    def __init__(self, num_layers: int, num_logical: int, *, device: torch.device | str = "cpu") -> None:
        # One entry more than experts: padding rows carry id -1, which wraps to it. Rows start at multiples of 16 bytes:
        # a kernel is compiled once for aligned addresses and once more for others.
        entries = num_logical + 1
        self._counts = torch.zeros(num_layers, entries + entries % 2, dtype=torch.int64, device=device)[:, :entries]
        self._received = torch.zeros(num_layers, dtype=torch.int64, device=device)

    def record(self, layer: int, routing: LogicalRouting) -> None:
        """Count the assignments of `routing` for MoE layer `layer`."""
        ids = routing.expert_ids
        self._counts[layer].put_(ids, torch.ones_like(ids), accumulate=True)

    def counts_of(self, layer: int) -> Tensor:
        """[E+1] int64: MoE layer `layer`'s own row, for a kernel that adds to it; the last entry is no expert's."""
        return self._counts[layer]

    def record_received(self, layer: int, rows: Rows) -> None:
        """Count the rows that this rank's slots received for MoE layer `layer`; waits for no device."""
        match rows:
            case GroupedRows(alignment=1):
                self._received[layer].add_(rows.psum[-1])
            case GroupedRows():
                starts = torch.nn.functional.pad(-(-rows.psum[:-1] // rows.alignment) * rows.alignment, (1, 0))
                self._received[layer].add_((rows.psum - starts).sum())
            case PaddedRows():
                self._received[layer].add_(rows.counts.sum())

    def received(self) -> Tensor:
        """[L] int64: rows received by this rank, a copy."""
        return self._received.clone()

    def counts(self) -> Tensor:
        """[L, E] int64, a copy."""
        return self._counts[:, :-1].clone()
