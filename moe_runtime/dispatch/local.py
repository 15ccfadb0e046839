"""Dispatch within one rank that holds all slots: no communication; the oracle of the other backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Rows
from moe_runtime.dispatch.rows import lay_out, send_order, wire_order
from moe_runtime.errors import ConfigError
from moe_runtime.types import Done, PhysicalRouting


@dataclass(frozen=True, slots=True)
class LocalHandle:
    row_of: Tensor
    weights: Tensor
    position: Tensor | None


class LocalDispatcher:
    """`Dispatcher[LocalHandle]` for ep=1."""

    def __init__(
        self,
        num_slots: int,
        *,
        layout: Layout = Layout.GROUPED,
        alignment: int = 1,
        device: torch.device | str = "cpu",
        ep: int = 1,
    ) -> None:
        if ep != 1:
            raise ConfigError(f"dispatch=local with ep={ep}: local needs ep=1. Use dispatch=all_to_all or set ep=1.")
        self._layout = layout
        self._alignment = alignment
        self._bounds = torch.arange(num_slots + 1, device=device)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=True, tolerance=0.0, layouts=tuple(Layout), counts_on_host=True, graph_safe=False
        )

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Done[tuple[Rows, LocalHandle]]:
        assert x.shape[0] <= step.capacity, f"{x.shape[0]} tokens exceed the agreed capacity {step.capacity}"
        order = send_order(routing.expert_ids, self._bounds)
        wire = x.index_select(0, order.token_of)
        rows, position = lay_out(wire, order.counts.unsqueeze(0), self._layout, alignment=self._alignment)
        return Done((rows, LocalHandle(order.row_of, routing.weights, position)))

    def combine_begin(self, y: Tensor, handle: LocalHandle) -> Done[Tensor]:
        return Done(unpermute(wire_order(y, handle.position), handle.row_of, handle.weights))

    def receive_bytes(self, step: DispatchStep, hidden: int, itemsize: int, top_k: int) -> int:
        """Nothing crosses a wire; what counts are the sorted rows, held twice where the layout pads them."""
        slots = self._bounds.numel() - 1
        return rows_bytes(step.capacity, min(top_k, slots), slots, hidden * itemsize, self._layout, self._alignment)

    def close(self) -> None: ...


def rows_bytes(tokens: int, per_token: int, slots: int, row_bytes: int, layout: Layout, alignment: int) -> int:
    """Most bytes of the rows' data where each of `tokens` brings up to `per_token` rows to a rank of `slots` slots."""
    if layout is Layout.PADDED:
        return slots * tokens * row_bytes
    return (tokens * per_token + slots * (alignment - 1)) * row_bytes
