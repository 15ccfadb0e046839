"""Dispatch by NVSHMEM's host calls, which move whole allocations in stream order.

T tokens, C capacity, H hidden, K top-k, S ranks, E local slots, B bytes of a token with its routing.

A put moves the smaller of its two allocations, all of it, however few rows are real: one packed for its destination
costs as many bytes as all tokens of this rank. So every rank sends its tokens to every rank, `[C, B]`, takes from what
it received the rows of its slots, and sends back fp32 sums of its share, `[C, H]`, which are added at home in rank
order. Unweighted rows instead would make the sums bitwise those of `local`, for min(K, E) rows of a token where a sum
takes two of bf16.

Allocations of a micro-batch: an outbox for prompt and one for decode steps, the size of which decides what a step
moves; an inbox from each rank, in which the share for that rank is put together as well; a reply from each rank, again
of two sizes; two signals from each rank. Memory of a rank grows with S, that of all with S squared, and so do the
calls, 4·S for each layer and rank: hence MAX_RANKS.

Nothing is buffered twice. Rank s writes its inbox on rank d again only in its next dispatch, which follows its reading
of d's reply, which d sent after reading that inbox; and d writes its reply on s again only after s's next dispatch
arrived. Signals carry the number of the dispatch and only grow. This needs a combine after each dispatch, and the calls
of one micro-batch on one stream or on streams that wait for each other.

Waits stand on the stream, where no host waits: a rank that does not come leaves the stream standing, and the next
operation of the communicators behind it is what the run's clock (`comm/overdue.py`) finds overdue and names.
The numbers are arguments of the host: no captured graph can replay them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch import all_gather
from moe_runtime.dispatch.all_gather import AllGatherDispatcher
from moe_runtime.dispatch.base import Capabilities, DispatchStep, Rows
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.nvshmem.heap import Heap, Signal
from moe_runtime.dispatch.nvshmem.packing import SUM_BYTES, Packing, allocations, packing, sizes
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.types import Pending, PhysicalRouting

MAX_RANKS: Final = 32
"""128 calls for each layer, some 0.5 ms of the host, by reasoning; not measured on hardware."""
_SIGNAL_BYTES: Final = 8


@dataclass(slots=True)
class _Lane:
    """The allocations of one micro-batch."""

    outboxes: list[Tensor]
    """Of each size, [C*B]."""
    inboxes: list[Tensor]
    """From each rank: the tokens that came, then this rank's share of their sums, which goes back."""
    replies: list[list[Tensor]]
    """Of each size, from each rank, [C*H*4]."""
    came: list[Signal]
    """From each rank: the number of its latest dispatch that is here."""
    returned: list[Signal]
    """From each rank: the number of its latest reply."""
    step: int = 0
    combined: int = 0


@dataclass(frozen=True, slots=True)
class HostHandle:
    lane: _Lane
    size: int
    """Index of the outbox."""
    capacity: int
    num_tokens: int
    inner: all_gather.Handle


class HostDispatcher:
    """`Dispatcher[HostHandle]`; every rank's calls in the same order."""

    def __init__(
        self,
        ep: Communicator,
        spec: DispatchSpec,
        *,
        library: Any,
        group: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`library`: `nvshmem.core`; `group` is not needed. Collective. ConfigError: see `Heap`, and where ranks share
        a GPU without MPS."""
        self._spec = spec
        self._share = AllGatherDispatcher(ep, spec.rows, device=device)
        self._heap = Heap(ep, library, device=device)
        # Each rank knows of its own GPU alone, and what follows is for all of them.
        shared = library.init_status() == library.InitStatus.STATUS_LIMITED_MPG
        if any(row[0] for row in ep.exchange([int(shared)])):
            self._heap.close()
            raise ConfigError(
                "dispatch=nvshmem: several ranks share a GPU, and NVSHMEM's waits do not work there. "
                "Start CUDA's MPS on this machine, give each rank a GPU, or set dispatch=all_to_all."
            )
        self._packing = packing(spec, stays=spec.rows.stays_on(self._heap.device))
        self._lanes = [self._lane() for _ in range(spec.in_flight)]
        self._heap.settle()

    def _lane(self) -> _Lane:
        heap, spec, ranks = self._heap, self._spec, range(self._heap.ep.size)
        inbox, outboxes, replies = allocations(spec, self._packing)
        return _Lane(
            [heap.allocate(num_bytes) for num_bytes in outboxes],
            [heap.allocate(inbox) for _ in ranks],
            [[heap.allocate(num_bytes) for _ in ranks] for num_bytes in replies],
            [heap.signal() for _ in ranks],
            [heap.signal() for _ in ranks],
        )

    @property
    def capabilities(self) -> Capabilities:
        inner = self._share.capabilities
        return Capabilities(
            sums_at_home=False,
            tolerance=inner.tolerance,
            layouts=inner.layouts,
            counts_on_host=inner.counts_on_host,
            graph_safe=False,
            dedups_per_rank=True,
        )

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, HostHandle]]:
        step.check(x)
        most = self._spec.max_tokens
        assert step.capacity <= most, f"a dispatch of {step.capacity} tokens, the buffers were made for {most}"
        lane, heap = self._lanes[step.micro_batch], self._heap
        assert lane.combined == lane.step, "the dispatch before this one was not combined, its memory is still read"
        size = next(i for i, tokens in enumerate(sizes(self._spec)) if step.capacity <= tokens)
        outbox = lane.outboxes[size]
        wire = outbox.view(-1, self._packing.num_bytes)[: step.capacity]
        self._packing.write(wire, x, routing, ue8m0=self._spec.rows.ue8m0)
        lane.step += 1
        for peer in self._others_first():
            self._put(lane.inboxes[heap.ep.rank], outbox, lane.came[heap.ep.rank], lane.step, peer)
        return _Arriving(self, lane, size, step.capacity, x.shape[0])

    def combine_begin(self, y: Tensor, handle: HostHandle) -> Pending[Tensor]:
        lane, rank, count = handle.lane, self._heap.ep.rank, handle.capacity * self._spec.hidden
        shares = self._share.partial_sums(y, handle.inner).view(self._heap.ep.size, count)
        reply = lane.replies[handle.size][rank]
        for peer in self._others_first():
            # Its tokens have been copied out; what went in this place comes back from it.
            inbox = lane.inboxes[peer]
            inbox[: count * SUM_BYTES].view(torch.float32).copy_(shares[peer])
            self._put(reply, inbox, lane.returned[rank], lane.step, peer)
        return _Returning(self, handle, y.dtype)

    def close(self) -> None:
        """Collective: gives all memory back."""
        self._heap.close()

    def _others_first(self) -> list[int]:
        """Ranks in an order that differs on each, so that not all send to the same one."""
        rank, size = self._heap.ep.rank, self._heap.ep.size
        return [(rank + distance) % size for distance in range(1, size + 1)]

    def _put(self, target: Tensor, source: Tensor, signal: Signal, number: int, peer: int) -> None:
        library = self._heap.library
        operation = library.SignalOp.SIGNAL_SET
        library.put_signal(target, source, signal.buffer, number, operation, remote_pe=peer, stream=self._heap.stream)

    def _await(self, signals: list[Signal], number: int) -> None:
        library = self._heap.library
        for signal in signals:
            library.signal_wait(signal.buffer, number, library.ComparisonType.CMP_GE, stream=self._heap.stream)

    def _receive(self, lane: _Lane, size: int, capacity: int, num_tokens: int) -> tuple[Rows, HostHandle]:
        self._await(lane.came, lane.step)
        width = self._packing.num_bytes
        wire = torch.cat([inbox[: capacity * width].view(capacity, width) for inbox in lane.inboxes])
        rows, inner = self._share.select(self._packing.tokens(wire), self._packing.routes(wire), capacity, num_tokens)
        return rows, HostHandle(lane, size, capacity, num_tokens, inner)

    def _sum(self, handle: HostHandle, dtype: torch.dtype) -> Tensor:
        lane, hidden, tokens = handle.lane, self._spec.hidden, handle.num_tokens
        self._await(lane.returned, lane.step)
        sums = [
            reply[: tokens * hidden * SUM_BYTES].view(torch.float32).view(tokens, hidden)
            for reply in lane.replies[handle.size]
        ]
        total = sums[0].clone()
        for share in sums[1:]:
            total += share
        lane.combined = lane.step
        return total.to(dtype)


@dataclass(frozen=True, slots=True)
class _Arriving:
    """All ranks' tokens on their way."""

    dispatcher: HostDispatcher
    lane: _Lane
    size: int
    capacity: int
    num_tokens: int

    def wait(self) -> tuple[Rows, HostHandle]:
        return self.dispatcher._receive(self.lane, self.size, self.capacity, self.num_tokens)


@dataclass(frozen=True, slots=True)
class _Returning:
    """All ranks' shares on their way home."""

    dispatcher: HostDispatcher
    handle: HostHandle
    dtype: torch.dtype

    def wait(self) -> Tensor:
        return self.dispatcher._sum(self.handle, self.dtype)


def symmetric_bytes(spec: DispatchSpec, packed: Packing) -> int:
    """Of the allocations of one micro-batch."""
    inbox, outboxes, replies = allocations(spec, packed)
    return sum(outboxes) + spec.ep * (inbox + sum(replies) + 2 * _SIGNAL_BYTES)


def buffer_bytes(spec: DispatchSpec) -> int:
    """Bytes of a rank: its allocations, and while a dispatch is under way the tokens of all ranks side by side, the
    rows of its slots, a second copy of these where there are gaps, and its share of the sums; per micro-batch."""
    packed = max((packing(spec, stays=stays) for stays in (False, True)), key=lambda found: found.num_bytes)
    symmetric = symmetric_bytes(spec, packed)
    rows, tokens = spec.rows, spec.ep * spec.max_tokens
    per_token = min(spec.top_k, rows.num_slots)
    received = tokens * (packed.num_bytes + per_token * spec.row_bytes + spec.hidden * SUM_BYTES)
    gaps = 0 if rows.dense else rows.worst_bytes(tokens, per_token, spec.row_bytes)
    return spec.in_flight * (symmetric + received + gaps)


def unfit(spec: DispatchSpec) -> Missing | None:
    """Why the host path cannot serve `spec`, or None. Any hidden size, top-k and number of slots will do."""
    if spec.ep > MAX_RANKS:
        return Missing(
            f"ep={spec.ep}, and the host path makes 4 calls per rank and layer: at most {MAX_RANKS} ranks",
            f"Set ep={MAX_RANKS}, or dispatch=all_to_all",
        )
    return None


def max_capacity(spec: DispatchSpec) -> int | None:
    """Most tokens per rank of one dispatch: as many as there is memory for."""
    return None
