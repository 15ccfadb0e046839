"""DeepEP V1's low-latency kernels. T tokens, H hidden, K top-k, E local slots, S ranks, C capacity of a rank.

A call sends; its hook, called later, waits for what the others sent. The next call's send clears the counters that an
open receive still reads, so a call that is still open is received first.
Calls take turns between two buffers. A step makes an even number of them, so a replayed graph meets the buffer that it
was captured with.
The order of a slot's rows is arbitrary; combine finds them by their origin, so results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.dispatch.base import DispatchStep, PaddedRows
from moe_runtime.dispatch.deep_ep.legacy_sizes import MAX_IN_FLIGHT
from moe_runtime.dispatch.deep_ep.width import narrowed, widened
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import PhysicalRouting

TOLERANCE = 1e-5
"""The experts' bf16 rows are summed in fp32 at the token's home, in top-k order; product and sum may be fused, which
differs by 2^-24 of each of K terms from two roundings (7e-7 at K = 11). The rest allows for terms that cancel."""


@dataclass(frozen=True, slots=True)
class LowLatencyHandle:
    number: int
    """Of the dispatch, from 0."""
    native: Any
    expert_ids: Tensor
    weights: Tensor


class LowLatency:
    """Dispatch and combine through one `Buffer`; both may be captured."""

    def __init__(self, buffer: Any, spec: DispatchSpec, *, ids: torch.dtype, capacity: int, width: int) -> None:
        """`ids`: the library's type of slot numbers; `capacity` tokens of a rank, of `width` >= H columns, in all
        calls (another one would move the areas that a slower rank still reads)."""
        self._buffer = buffer
        self._spec = spec
        self._ids = ids
        self._capacity = capacity
        self._width = width
        self._open: _Receiving | None = None
        self._dispatched = 0
        self._combined = 0

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> _Dispatching:
        agreed = step.capacity
        assert agreed <= self._capacity, f"a step of {agreed} tokens exceeds low latency's capacity {self._capacity}"
        under_way = self._dispatched - self._combined
        assert under_way < MAX_IN_FLIGHT, f"{under_way} dispatches wait for their combine; the third overwrites results"
        self._settle()
        ids = routing.expert_ids.to(self._ids).contiguous()
        received, counts, native, _, hook = self._buffer.low_latency_dispatch(
            widened(x, self._width),
            ids,
            self._capacity,
            self._spec.num_physical,
            use_fp8=self._spec.rows.quantize,
            round_scale=self._spec.rows.quantize and self._spec.rows.ue8m0,
            async_finish=False,
            return_recv_hook=True,
        )
        handle = LowLatencyHandle(self._dispatched, native, ids, routing.weights.contiguous())
        self._dispatched += 1
        self._open = _Receiving(hook)
        # Spread evenly, S·C·K assignments over S·E slots.
        mean = max(1, -(-step.capacity * self._spec.top_k // self._spec.rows.num_slots))
        data, scales = received if isinstance(received, tuple) else (received, None)
        return _Dispatching(self._open, data, scales, counts, mean, self._spec.hidden, handle)

    def combine_begin(self, y: Tensor, handle: LowLatencyHandle) -> _Combining:
        assert handle.number >= self._dispatched - MAX_IN_FLIGHT, f"dispatch {handle.number} has been overwritten"
        self._settle()
        tokens = handle.expert_ids.shape[0]
        # Memory of our own, so that a result outlives the library's next calls.
        out = torch.empty(tokens, self._width, dtype=torch.bfloat16, device=y.device)
        _, _, hook = self._buffer.low_latency_combine(
            widened(y, self._width),
            handle.expert_ids,
            handle.weights,
            handle.native,
            async_finish=False,
            return_recv_hook=True,
            out=out,
        )
        self._combined += 1
        self._open = _Receiving(hook)
        return _Combining(self._open, out, self._spec.hidden)

    def _settle(self) -> None:
        if self._open is not None:
            self._open.receive()
            self._open = None


@dataclass(slots=True)
class _Receiving:
    """A call whose data are on their way."""

    hook: Callable[[], None] | None

    def receive(self) -> None:
        hook, self.hook = self.hook, None
        if hook is not None:
            hook()


@dataclass(frozen=True, slots=True)
class _Dispatching:
    receiving: _Receiving
    data: Tensor
    scales: Tensor | None
    counts: Tensor
    mean: int
    hidden: int
    handle: LowLatencyHandle

    def wait(self) -> tuple[PaddedRows, LowLatencyHandle]:
        self.receiving.receive()
        data, scales = narrowed(self.data, self.scales, self.hidden)
        return PaddedRows(data.contiguous(), self.counts, scales, expected_rows=self.mean), self.handle


@dataclass(frozen=True, slots=True)
class _Combining:
    receiving: _Receiving
    out: Tensor
    hidden: int

    def wait(self) -> Tensor:
        self.receiving.receive()
        return self.out[:, : self.hidden].contiguous()
