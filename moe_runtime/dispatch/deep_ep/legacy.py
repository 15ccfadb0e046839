"""DeepEP V1 (`deep_ep.Buffer`): normal kernels for steps with prompt tokens, low-latency ones for the others.

T tokens, H hidden, K top-k, E local slots, R received tokens, N rows.
Written to the contract in the library's sources and tested against a double that enforces it; not yet run on hardware.
Low latency needs NVSHMEM with IBGDA, so an RDMA adapter, within a node too.

One `Buffer` in low-latency mode serves both, for all layers: NVSHMEM is set up once per process, with the ranks of that
mode, and destroying one buffer ends it for the other. Between nodes both kinds of kernels write the same memory, and
low-latency ones want their counters zero: whenever the last normal combine has come home they are cleaned, at once and
not before the next decode step, because a captured step runs no code of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from moe_kernels.permute import permute, unpermute
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, GroupedRows, Layout, Phase, Rows
from moe_runtime.dispatch.deep_ep.legacy_low_latency import TOLERANCE as LOW_LATENCY_TOLERANCE
from moe_runtime.dispatch.deep_ep.legacy_low_latency import LowLatency, LowLatencyHandle
from moe_runtime.dispatch.deep_ep.legacy_sizes import (
    NODE,
    QUEUE_DEPTH,
    buffer_bytes,
    low_latency_capacity,
    low_latency_hidden,
    max_capacity,
    normal_hidden,
    normal_unfit,
    unfit,
)
from moe_runtime.dispatch.deep_ep.width import narrowed, widened
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.types import Pending, PhysicalRouting

__all__ = ["LegacyDispatcher", "buffer_bytes", "max_capacity", "normal_unfit", "unfit"]

NORMAL_TOLERANCE = 2**-6
"""A rank's share of a token is summed in fp32 and rounded to bf16 (by 2^-9 of it); shares are added in fp32 in order of
ranks, between nodes those of a node first, whose sum is rounded once more. So 2·2^-9 of the sizes of all shares, which
may cancel to a quarter of their sum. The last rounding to the tokens' dtype is not in it."""


@dataclass(frozen=True, slots=True)
class NormalHandle:
    native: Any
    row_of: Tensor
    """[R, K] int64: the row of each received assignment, -1 for those of other ranks."""
    weights: Tensor
    """[R, K] fp32."""


Handle = NormalHandle | LowLatencyHandle


class LegacyDispatcher:
    """`Dispatcher[Handle]`. Without normal kernels for its size, steps of every phase go by low latency."""

    def __init__(
        self,
        ep: Communicator,
        spec: DispatchSpec,
        *,
        library: Any,
        group: Any,
        device: torch.device | str = "cpu",
        ranks_per_node: int = NODE,
    ) -> None:
        """Collective. `library`: the module `deep_ep`; `group`: the ranks' process group. `device` is where tokens are;
        the library takes the process's current one.

        ConfigError where V1 does not fit `spec`, or NVSHMEM's queues are too short for its decode steps.
        """
        assert ep.size == spec.ep == group.size(), f"{ep.size} ranks, a group of {group.size()}, ep={spec.ep}"
        if (missing := unfit(spec)) is not None:
            raise ConfigError(f"dispatch=deep_ep: {missing}")
        capacity, width = low_latency_capacity(spec), low_latency_hidden(spec)
        normal = normal_unfit(spec, ranks_per_node=ranks_per_node) is None
        nvlink, rdma = _library_bytes(library.Buffer, spec, capacity, normal)
        self._buffer = library.Buffer(
            group,
            num_nvl_bytes=nvlink,
            num_rdma_bytes=rdma,
            low_latency_mode=True,
            # A queue pair for each local slot; normal kernels between nodes want one for each multiprocessor.
            num_qps_per_rank=max(spec.rows.num_slots, library.Buffer.num_sms if normal and spec.ep > NODE else 1),
            explicitly_destroy=True,
        )
        self._closed = False
        depth = getattr(self._buffer, "nvshmem_qp_depth", QUEUE_DEPTH)
        if depth < 2 * (capacity + 1):
            self.close()
            raise ConfigError(
                f"dispatch=deep_ep: NVSHMEM_QP_DEPTH={depth}; decode steps of {capacity} tokens per rank need "
                f"{2 * (capacity + 1)}. Unset it, or let ranks decode at most {depth // 2 - 1} tokens."
            )
        self._low_latency = LowLatency(self._buffer, spec, ids=library.topk_idx_t, capacity=capacity, width=width)
        self._normal: Normal | None = None
        if normal:
            sizes = (capacity, width, spec.num_physical)
            clean = (lambda: self._buffer.clean_low_latency_buffer(*sizes)) if spec.ep > NODE else None
            self._normal = Normal(self._buffer, spec, ids=library.topk_idx_t, clean=clean)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=False,
            tolerance=LOW_LATENCY_TOLERANCE if self._normal is None else NORMAL_TOLERANCE,
            layouts=(Layout.PADDED,) if self._normal is None else (Layout.GROUPED, Layout.PADDED),
            counts_on_host=self._normal is not None,
            graph_safe=True,
            dedups_per_rank=False,
            keeps_order=False,
        )

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Pending[tuple[Rows, Handle]]:
        step.check(x)
        if self._normal is not None and step.phase is Phase.MIXED:
            return self._normal.dispatch_begin(x, routing)
        return self._low_latency.dispatch_begin(x, routing, step)

    def combine_begin(self, y: Tensor, handle: Handle) -> Pending[Tensor]:
        assert y.dtype is torch.bfloat16, f"the experts' rows are {y.dtype}; combine carries bf16"
        if isinstance(handle, LowLatencyHandle):
            return self._low_latency.combine_begin(y, handle)
        assert self._normal is not None, "a handle of another dispatcher"
        return self._normal.combine_begin(y, handle)

    def close(self) -> None:
        """Collective; once."""
        if not self._closed:
            self._closed = True
            self._buffer.destroy()


class Normal:
    """A token crosses once to each rank that holds some of its slots, and one row per token returns, weighted there.

    The host waits for the counts of a dispatch, so its rows have exactly the room that they need.
    """

    def __init__(self, buffer: Any, spec: DispatchSpec, *, ids: torch.dtype, clean: Callable[[], None] | None) -> None:
        """`clean` is called when no normal kernel is under way any more."""
        self._buffer = buffer
        self._spec = spec
        self._ids = ids
        self._clean = clean
        self._width = normal_hidden(spec)
        self._under_way = 0

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting) -> _Dispatching:
        buffer, ids = self._buffer, routing.expert_ids.to(self._ids).contiguous()
        tokens: Tensor | tuple[Tensor, Tensor] = widened(x, self._width)
        if self._spec.rows.quantize:
            assert isinstance(tokens, Tensor)
            scaled = quantize_rows(tokens, ue8m0=self._spec.rows.ue8m0)
            tokens = (scaled.data, scaled.scale)
        weights = routing.weights.contiguous()
        # On the library's stream, after all that this one holds until now.
        per_rank, per_node, per_slot, in_rank, event = buffer.get_dispatch_layout(
            ids,
            self._spec.num_physical,
            previous_event=buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        received, slots, factors, counts, native, event = buffer.dispatch(
            tokens,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_slot,
            topk_idx=ids,
            topk_weights=weights,
            expert_alignment=self._spec.rows.alignment,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        self._under_way += 1
        data, scales = received if isinstance(received, tuple) else (received, None)
        return _Dispatching(self._spec, event, data, scales, slots, factors, sum(counts), native)

    def combine_begin(self, y: Tensor, handle: NormalHandle) -> _Combining:
        share = widened(unpermute(y, handle.row_of, handle.weights), self._width)
        combined, _, event = self._buffer.combine(
            share,
            handle.native,
            previous_event=self._buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        return _Combining(self, event, combined, self._spec.hidden)

    def _home(self) -> None:
        self._under_way -= 1
        if self._clean is not None and not self._under_way:
            self._clean()


@dataclass(frozen=True, slots=True)
class _Dispatching:
    spec: DispatchSpec
    event: Any
    data: Tensor
    scales: Tensor | None
    slots: Tensor
    weights: Tensor
    num_rows: int
    native: Any

    def wait(self) -> tuple[Rows, Handle]:
        self.event.current_stream_wait()
        rows, alignment = self.spec.rows, self.spec.rows.alignment
        data, scales = narrowed(self.data, self.scales, self.spec.hidden)
        found = permute(
            data if scales is None else BlockScaled(data, scales),
            self.slots.to(torch.int64),
            rows.num_slots,
            alignment=alignment,
            scale_layout="mn",
            num_rows=self.num_rows,
        )
        there = found.data.shape[0]
        assert there == self.num_rows, f"{there} rows were sorted; the library counted {self.num_rows}"
        grouped = GroupedRows(found.data, found.psum, alignment, scales=found.scale)
        return grouped, NormalHandle(self.native, found.row_of, self.weights)


@dataclass(frozen=True, slots=True)
class _Combining:
    normal: Normal
    event: Any
    combined: Tensor
    hidden: int

    def wait(self) -> Tensor:
        self.event.current_stream_wait()
        self.normal._home()
        return self.combined[:, : self.hidden].contiguous()


def _library_bytes(buffer: Any, spec: DispatchSpec, capacity: int, normal: bool) -> tuple[int, int]:
    """NVLink and RDMA bytes, as the installed library sizes them."""
    rdma = buffer.get_low_latency_rdma_size_hint(capacity, low_latency_hidden(spec), spec.ep, spec.num_physical)
    if not normal:
        return 0, rdma
    row = 2 * normal_hidden(spec)
    configs = (buffer.get_dispatch_config(spec.ep), buffer.get_combine_config(spec.ep))
    nvlink = max(config.get_nvl_buffer_size_hint(row, spec.ep) for config in configs)
    return nvlink, max(rdma, *(config.get_rdma_buffer_size_hint(row, spec.ep) for config in configs))
