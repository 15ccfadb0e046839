"""What all calls of DeepEP V1's double share: its configurations, its stream, its wire. R ranks, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.doubles.clauses import Clauses
from tests.doubles.deep_ep.events import Capture, EventHandle, EventOverlap, garbage_
from tests.doubles.fabric_group import FabricGroup

PEERS, WORKSPACE_SMS, ALIGNMENT, INT_MAX = 8, 132, 128, 2**31 - 1
_DISPATCH = {2: (24, 256, 6), 4: (6, 256, 6), 8: (6, 256, 6), 16: (36, 288, 20)}
_DISPATCH |= dict.fromkeys((24, 32, 48, 64), (32, 288, 8))
_DISPATCH |= {96: (20, 480, 12), 128: (20, 560, 12), 144: (32, 720, 12), 160: (28, 720, 12)}
_COMBINE = {2: (10, 256, 6), 4: (9, 256, 6), 8: (4, 256, 6), 16: (4, 288, 12)}
_COMBINE |= dict.fromkeys((24, 32, 48, 64), (1, 288, 8))
_COMBINE |= {96: (1, 480, 8), 128: (1, 560, 8), 144: (2, 720, 8), 160: (2, 720, 8)}


@dataclass(frozen=True)
class Config:
    """csrc/legacy/config.hpp:24-100."""

    num_sms: int
    nvl_send: int
    nvl_recv: int
    rdma_send: int
    rdma_recv: int

    @property
    def rdma_queue(self) -> int:
        return -(-self.rdma_recv // self.rdma_send) * self.rdma_send

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        nodes, peers, channels = max(num_ranks // PEERS, 1), min(num_ranks, PEERS), self.num_sms // 2
        size = channels * peers * (2 * nodes + 3) * 4
        for per_row in (hidden_bytes, 8, 128 * 8, 128 * 4, 128 * 4):
            size += channels * peers * self.nvl_recv * per_row
        return (size + 127) // 128 * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= PEERS:
            return 0
        nodes, channels = num_ranks // PEERS, self.num_sms // 2
        size = channels * nodes * (PEERS * 2 + 2) * 2 * 4
        for per_row in (hidden_bytes, 8, 128 * 8, 128 * 4, 128 * 4, 16):
            size += channels * nodes * self.rdma_queue * per_row * 2
        return (size + 127) // 128 * 128


def low_latency_total(tokens: int, hidden: int, num_experts: int) -> int:
    """csrc/legacy/config.hpp:131-166."""
    scales = hidden // 128
    dispatched, combined = 16 + max(hidden * 2, hidden + scales * 4), scales * 4 + hidden * 2
    send = max(tokens * dispatched, num_experts * tokens * combined)
    receive = max(num_experts * tokens * dispatched, num_experts * tokens * combined)
    return 2 * (send + receive + (num_experts * 4 + 127) // 128 * 128)


class Late(EventHandle):
    """The event of a call on the library's stream: with it all earlier ones have happened."""

    def __init__(self, results: Sequence[tuple[Tensor, Tensor]], earlier: Late | None) -> None:
        super().__init__(results)
        self._earlier = earlier

    def current_stream_wait(self) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            earlier.current_stream_wait()
        super().current_stream_wait()

    def value_of(self, x: Tensor) -> Tensor:
        """`x` as the library's own stream sees it."""
        for target, value in self._results:
            if target is x:
                return value
        return x if self._earlier is None else self._earlier.value_of(x)


class Core:
    """A rank's buffer. `library` is set on a class of its own for every double."""

    library: ClassVar[Any]
    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: FabricGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
    ) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.num_qps_per_rank = num_qps_per_rank
        self.nvshmem_qp_depth: int = self.library.qp_depth
        self.dirty = False
        self._destroyed = False
        self._last: Late | None = None
        size = self.group_size
        sizes = f"{num_nvl_bytes} and {num_rdma_bytes} bytes"
        self.require("made_outside_capture", not self.capturing.active, "a buffer is made")
        self.require("buffer_aligned", num_nvl_bytes % ALIGNMENT == 0 and num_rdma_bytes % ALIGNMENT == 0, sizes)
        self.require("nvlink_counted", num_nvl_bytes <= INT_MAX or num_rdma_bytes == 0, sizes)
        self.require("rdma_counted", num_rdma_bytes // 16 < INT_MAX, sizes)
        self.require("whole_nodes", size < PEERS or size % PEERS == 0, f"{size} ranks")
        with_rdma = size > PEERS or low_latency_mode
        self.require("rdma_needs_nodes", num_rdma_bytes == 0 or with_rdma, f"{sizes} for {size} ranks")
        group.ep.barrier()

    @property
    def rules(self) -> Clauses:
        rules: Clauses = self.library.clauses
        return rules

    @property
    def capturing(self) -> Capture:
        capturing: Capture = self.library.capturing
        return capturing

    @property
    def nodes(self) -> int:
        return max(1, self.group_size // PEERS)

    def require(self, name: str, holds: bool, seen: object) -> None:
        self.rules.require(name, holds, seen)

    def alive(self) -> None:
        self.require("not_used_after_destroy", not self._destroyed, "a call after destroy()")

    def unfilled(self) -> None:
        filled = torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self.require("no_deterministic_fill", not filled, "torch.use_deterministic_algorithms(True)")

    def destroy(self) -> None:
        self.require("destroy_if_explicit", self.explicitly_destroy, "destroy() without explicitly_destroy")
        self.alive()
        self._destroyed = True
        self.group.ep.barrier()

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        cls.library.clauses.require("known_configuration", num_ranks in _DISPATCH, f"{num_ranks} ranks")
        return Config(cls.num_sms, *_DISPATCH.get(num_ranks, (6, 720, 6)), 128)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        cls.library.clauses.require("known_configuration", num_ranks in _COMBINE, f"{num_ranks} ranks")
        return Config(cls.num_sms, *_COMBINE.get(num_ranks, (4, 720, 6)), 128)

    @staticmethod
    def get_low_latency_rdma_size_hint(tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        """csrc/legacy/config.hpp:185-188."""
        return (low_latency_total(tokens, hidden, num_experts) + ALIGNMENT) // ALIGNMENT * ALIGNMENT

    def on_stream(self, x: Tensor) -> Tensor:
        """`x` for a kernel on the library's stream, which ran after all that it was given before."""
        return x if self._last is None else self._last.value_of(x)

    def begin(self, previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> None:
        """Anything but an EventOverlap counts as no event (legacy.py:317)."""
        given = getattr(previous_event, "event", None) is not None
        seen = f"previous event: {given}, async_finish: {async_finish}"
        self.require("event_with_comm_stream", not allocate_on_comm_stream or (given and async_finish), seen)

    def finish(self, results: Sequence[Tensor | None], async_finish: bool) -> EventOverlap:
        """What a call on the library's stream gives, now or with its event."""
        if not async_finish:
            return LooseEvent(self.rules)
        there = [x for x in results if x is not None]
        if not self.rules.on("arrives_with_event"):
            return EventOverlap(EventHandle())
        hidden = [(x, x.clone()) for x in there]
        for x in there:
            garbage_(x)
        self._last = Late(hidden, self._last)
        return EventOverlap(self._last)


class LooseEvent(EventOverlap):
    """Of a call that was not asynchronous."""

    def __init__(self, rules: Clauses) -> None:
        super().__init__(None)
        self._rules = rules

    def current_stream_wait(self, release_handle: bool = False) -> None:
        self._rules.require("event_if_async", False, "current_stream_wait()")


def packed(*columns: Tensor) -> Tensor:
    """Columns `[n, w]` of any dtype as rows of bytes `[n, B]`."""
    return torch.cat([fresh(column).view(torch.uint8) for column in columns], dim=1)


def unpacked(rows: Tensor, *forms: tuple[torch.dtype, int]) -> list[Tensor]:
    """The inverse, for columns of these dtypes and widths."""
    parts = torch.split(rows, [width * dtype.itemsize for dtype, width in forms], dim=1)
    return [fresh(part).view(dtype) for part, (dtype, _) in zip(parts, forms, strict=True)]


def fresh(x: Tensor) -> Tensor:
    """A copy whose strides and address suit a view of any dtype, also where it has a row or none."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


Hook = Callable[[], None]
