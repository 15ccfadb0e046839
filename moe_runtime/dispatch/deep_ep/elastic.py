"""Dispatch over DeepEP V2, `ElasticBuffer`. T tokens, H hidden, K top-k, S ranks, E local slots, R rows, C capacity.

A token crosses once to every rank that has some of its slots, and is spread there to one row per slot, sorted by slot
with starts at multiples of the alignment: `GroupedRows` as the library lays them out. The experts multiply weights in,
and combine is the library's plain sum.

With prompt tokens the host waits for the counts and R is what arrived. Without, it waits for nothing: there is room for
S·C·min(K, E) rows, and `psum` on the device says which are real. The library's other form, one row per token, would
need these rows as well, ours to sort into, and the unsorted ones beside them; with m slots of this rank a token would
be moved 2m + 4 times instead of 2m, by five launches more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from moe_kernels.quant import quantize_rows
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, GroupedRows, Layout, Phase, Rows
from moe_runtime.dispatch.deep_ep.elastic_sizes import (
    buffer_bytes,
    capacities,
    hybrid,
    max_capacity,
    padded_hidden,
    unfit,
)
from moe_runtime.dispatch.deep_ep.width import SCALE_BLOCK, narrowed, widened
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.types import Pending, PhysicalRouting

__all__ = ["TOLERANCE", "ElasticDispatcher", "ElasticHandle", "buffer_bytes", "max_capacity", "unfit"]

TOLERANCE: Final = 2.0**-6
"""Every term of a token's sum is rounded to bf16 up to three times on its way, by half a unit in the last place
(2^-9) each: weighted, summed with its rank's, summed with its node's. The result's own rounding is not counted here.
The rest allows for terms that cancel to a third of their sizes. Each sum runs in top-k order, so the same terms give
the same bits wherever their rows stood."""


@dataclass(frozen=True, slots=True)
class ElasticHandle:
    inner: Any
    """The library's, for combine."""


class ElasticDispatcher:
    """`Dispatcher[ElasticHandle]`. One buffer, made here for the largest dispatch of the run, serves all layers."""

    def __init__(
        self, ep: Communicator, spec: DispatchSpec, *, library: Any, group: Any, device: torch.device | str = "cpu"
    ) -> None:
        """Collective, and not inside a capture. `library` is deep_ep, `group` the NCCL process group of `ep`.

        ConfigError where the sizes do not fit.
        """
        assert ep.size == spec.ep, f"spec for {spec.ep} ranks, group of {ep.size}"
        if problem := unfit(spec):
            raise ConfigError(f"dispatch=deep_ep: {problem}")
        self._spec = spec
        self._library = library
        self._device = torch.device(device)
        self._mixed_capacity, self._decode_capacity = capacities(spec)
        self._width = padded_hidden(spec.hidden)
        nodes, ranks_per_node = library.get_physical_domain_size(group)
        self._buffer = library.ElasticBuffer(
            group,
            num_max_tokens_per_rank=max(self._mixed_capacity, self._decode_capacity),
            hidden=self._width,
            num_topk=spec.top_k,
            use_fp8_dispatch=spec.rows.quantize,
            allow_hybrid_mode=hybrid(nodes, ranks_per_node, spec.rows.num_slots),
            # Its host wait holds Python's lock, so no clock of ours can ring meanwhile.
            num_cpu_timeout_secs=math.ceil(spec.deadline_s),
            num_gpu_timeout_secs=math.ceil(spec.deadline_s),
            explicitly_destroy=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=False,
            tolerance=TOLERANCE,
            layouts=(Layout.GROUPED,),
            counts_on_host=True,
            graph_safe=True,
            dedups_per_rank=True,
            keeps_order=False,
        )

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, ElasticHandle]]:
        step.check(x)
        spec, mixed = self._spec, step.phase is Phase.MIXED
        capacity = self._mixed_capacity if mixed else self._decode_capacity
        assert step.capacity <= capacity, f"a step of {step.capacity} tokens, a buffer for {capacity}"
        assert x.dtype is spec.dtype, f"x is {x.dtype}, and the buffer was made for {spec.dtype}"
        tokens = self._payload(x)
        ids = routing.expert_ids.to(self._library.topk_idx_t).contiguous()
        arrived, _, weights, inner, event = self._buffer.dispatch(
            tokens,
            topk_idx=ids,
            topk_weights=routing.weights.contiguous(),
            num_experts=spec.num_physical,
            num_max_tokens_per_rank=capacity,
            expert_alignment=spec.rows.alignment,
            # After the last of the inputs: the communication stream waits for nothing later.
            previous_event=self._library.ElasticBuffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            do_cpu_sync=mixed,
            do_expand=True,
            use_tma_aligned_col_major_sf=spec.rows.quantize,
        )
        mean = None if mixed else max(1, -(-step.capacity * spec.ep * spec.top_k // spec.num_physical))
        return _Arriving(spec, arrived, weights, ElasticHandle(inner), event, mean)

    def combine_begin(self, y: Tensor, handle: ElasticHandle) -> Pending[Tensor]:
        """`y [R, H]` bf16, weighted."""
        assert y.dtype is torch.bfloat16, f"the experts gave {y.dtype}; DeepEP V2 sums bf16"
        summed, _, event = self._buffer.combine(
            widened(y, self._width),
            handle=handle.inner,
            previous_event=self._library.ElasticBuffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        return _Returning(summed, event, self._spec.hidden)

    def close(self) -> None:
        """Collective."""
        self._buffer.destroy()

    def _payload(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """`x [T, H]` as it travels: with columns of zeros where the library wants them, fp8 where the experts do."""
        x = widened(x, self._width)
        if not self._spec.rows.quantize:
            return x
        quantized = quantize_rows(x, group=SCALE_BLOCK, ue8m0=self._spec.rows.ue8m0)
        return quantized.data, quantized.scale


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Tokens on their way to the experts."""

    spec: DispatchSpec
    arrived: Tensor | tuple[Tensor, Tensor]
    weights: Tensor
    handle: ElasticHandle
    event: Any
    mean: int | None

    def wait(self) -> tuple[Rows, ElasticHandle]:
        self.event.current_stream_wait()
        data, scales = self.arrived if isinstance(self.arrived, tuple) else (self.arrived, None)
        data, scales = narrowed(data, scales, self.spec.hidden)
        rows = GroupedRows(
            data.contiguous(),
            self.handle.inner.psum_num_recv_tokens_per_expert,
            self.spec.rows.alignment,
            scales=scales,
            weights=self.weights,
            expected_rows=self.mean,
        )
        return rows, self.handle


@dataclass(frozen=True, slots=True)
class _Returning:
    """Sums on their way home."""

    summed: Tensor
    event: Any
    hidden: int

    def wait(self) -> Tensor:
        self.event.current_stream_wait()
        return self.summed[:, : self.hidden].contiguous()
