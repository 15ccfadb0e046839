"""Dispatch within one rank that holds all slots: no communication; the oracle of the other backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Rows
from moe_runtime.dispatch.rows import RowLayout, send_order, wire_order
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.types import Done, PhysicalRouting


@dataclass(frozen=True, slots=True)
class LocalHandle:
    row_of: Tensor
    weights: Tensor
    position: Tensor | None


class LocalDispatcher:
    """`Dispatcher[LocalHandle]` for ep=1."""

    def __init__(self, rows: RowLayout, *, device: torch.device | str = "cpu", ep: int = 1) -> None:
        """ConfigError where `ep` is not 1."""
        if ep != 1:
            raise ConfigError(f"dispatch=local with ep={ep}: local needs ep=1. Use dispatch=all_to_all or set ep=1.")
        self._rows = rows
        self._bounds = torch.arange(rows.num_slots + 1, device=device)
        self._stays = rows.stays_on(self._bounds.device)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=True,
            tolerance=0.0,
            layouts=tuple(Layout),
            counts_on_host=not self._stays,
            graph_safe=self._stays,
        )

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Done[tuple[Rows, LocalHandle]]:
        step.check(x)
        if self._stays:
            rows, row_of = self._rows.sort(x, routing.expert_ids)
            return Done((rows, LocalHandle(row_of, routing.weights, None)))
        return self._with_host_counts(x, routing)

    def _with_host_counts(self, x: Tensor, routing: PhysicalRouting) -> Done[tuple[Rows, LocalHandle]]:
        order = send_order(routing.expert_ids, self._bounds)
        wire = x.index_select(0, order.token_of)
        rows, position = self._rows.lay_out(wire, order.counts.unsqueeze(0))
        return Done((rows, LocalHandle(order.row_of, routing.weights, position)))

    def combine_begin(self, y: Tensor, handle: LocalHandle) -> Done[Tensor]:
        return Done(unpermute(wire_order(y, handle.position), handle.row_of, handle.weights))

    def close(self) -> None: ...


def buffer_bytes(spec: DispatchSpec) -> int:
    """Nothing crosses a wire; what counts are the sorted rows."""
    return spec.rows.worst_bytes(spec.max_tokens, min(spec.top_k, spec.rows.num_slots), spec.row_bytes)
