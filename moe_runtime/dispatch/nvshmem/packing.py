"""How a token travels with its routing, and the bytes of the host path's allocations.

C capacity, H hidden, K top-k, S ranks, N rows, B bytes of a token with its routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled, num_blocks
from torch import Tensor

from moe_runtime.dispatch.base import Layout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import NOWHERE, PhysicalRouting

FP8: Final = torch.float8_e4m3fn
SUM_BYTES: Final = 4
_STAYS_ALIGNED: Final = 16


@dataclass(frozen=True, slots=True)
class Packing:
    """Where a token's parts lie in its B bytes: hidden values, scales if they are fp8, slots and weights."""

    hidden: int
    top_k: int
    dtype: torch.dtype
    """In which they travel."""

    @property
    def groups(self) -> int:
        return num_blocks(self.hidden) if self.dtype is FP8 else 0

    @property
    def scales_at(self) -> int:
        return -(-self.hidden * self.dtype.itemsize // 4) * 4

    @property
    def routes_at(self) -> int:
        return self.scales_at + 4 * self.groups

    @property
    def num_bytes(self) -> int:
        """B, so that rows of the wire can be read in 16 bytes at a time."""
        return -(-(self.routes_at + 8 * self.top_k) // _STAYS_ALIGNED) * _STAYS_ALIGNED

    def write(self, wire: Tensor, x: Tensor, routing: PhysicalRouting, *, ue8m0: bool) -> None:
        """`x [T, H]` with its routing into the first T of `wire [C, B] uint8`; the others go nowhere."""
        top_k, routes, tokens = self.top_k, self.routes(wire), x.shape[0]
        data = x
        if self.groups:
            scaled = quantize_rows(x, ue8m0=ue8m0)
            data = scaled.data
            self._scales(wire)[:tokens].copy_(scaled.scale)
        self._data(wire)[:tokens].copy_(data)
        routes[:tokens, :top_k] = routing.expert_ids  # slots are below 2^31
        routes[:tokens, top_k:] = routing.weights.view(torch.int32)
        routes[tokens:, :top_k] = NOWHERE

    def tokens(self, wire: Tensor) -> Tensor | BlockScaled:
        """The hidden values in `wire [N, B]`."""
        data = self._data(wire)
        return BlockScaled(data, self._scales(wire)) if self.groups else data

    def routes(self, wire: Tensor) -> Tensor:
        """`[N, 2K] int32`: slots, then weights."""
        return wire[:, self.routes_at : self.routes_at + 8 * self.top_k].view(torch.int32)

    def _data(self, wire: Tensor) -> Tensor:
        return wire[:, : self.hidden * self.dtype.itemsize].view(self.dtype)

    def _scales(self, wire: Tensor) -> Tensor:
        return wire[:, self.scales_at : self.routes_at].view(torch.float32)


def packing(spec: DispatchSpec, *, stays: bool) -> Packing:
    """In fp8 where the experts multiply in it and rows are sorted on the device (`stays`)."""
    fp8 = stays and spec.rows.quantize and spec.dtype is torch.bfloat16 and spec.rows.layout is Layout.GROUPED
    return Packing(spec.hidden, spec.top_k, FP8 if fp8 else spec.dtype)


def sizes(spec: DispatchSpec) -> tuple[int, ...]:
    """Tokens per rank for which there are outboxes and replies, ascending."""
    return tuple(sorted({min(spec.max_decode_tokens or spec.max_tokens, spec.max_tokens), spec.max_tokens}))


def allocations(spec: DispatchSpec, packed: Packing) -> tuple[int, list[int], list[int]]:
    """Bytes of an inbox, which holds a reply too, of the outbox of each size, and of a reply of each size."""
    outboxes = [tokens * packed.num_bytes for tokens in sizes(spec)]
    replies = [tokens * spec.hidden * SUM_BYTES for tokens in sizes(spec)]
    return max(outboxes[-1], replies[-1]), outboxes, replies
