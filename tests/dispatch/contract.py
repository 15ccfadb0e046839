"""The laws of dispatch/base.py as programs of one rank, for any communicator.

T tokens, H hidden, K top-k, E local slots, P physical slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import (
    Dispatcher,
    DispatchStep,
    GroupedRows,
    Layout,
    PaddedRows,
    Phase,
    Rows,
    first_slots,
    splitting,
)
from moe_runtime.dispatch.factory import buffer_bytes, make_dispatcher, most_tokens
from moe_runtime.dispatch.local import LocalDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import NOWHERE, PhysicalRouting


@dataclass(frozen=True)
class Backend:
    name: str
    layout: Layout
    alignment: int = 1

    def __str__(self) -> str:
        return f"{self.name}-{self.layout}-{self.alignment}"

    def make(self, ep: Communicator, slots: int) -> Dispatcher[Any]:
        return make_dispatcher(self.name, ep, spec_of(self.rows(slots), ep=ep.size))

    def rows(self, slots: int) -> RowLayout:
        return RowLayout(slots, self.layout, self.alignment)

    def buffer_bytes(self, ep: int, slots: int, *, tokens: int, top_k: int) -> int:
        """Worst case of one dispatch."""
        return buffer_bytes(self.name, spec_of(self.rows(slots), ep=ep, top_k=top_k, max_tokens=tokens))


def spec_of(
    rows: RowLayout,
    *,
    ep: int = 1,
    hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    top_k: int = 2,
    max_tokens: int = 100,
) -> DispatchSpec:
    """Sizes for backends that need few of them."""
    return DispatchSpec(
        ep=ep,
        rows=rows,
        hidden=hidden,
        dtype=dtype,
        top_k=top_k,
        max_tokens=max_tokens,
        max_decode_tokens=max_tokens,
    )


BACKENDS = [
    Backend(name, layout, alignment)
    for name in ("local", "all_to_all", "all_gather")
    for layout, alignment in ((Layout.GROUPED, 1), (Layout.GROUPED, 4), (Layout.PADDED, 1))
]


@dataclass(frozen=True)
class Case:
    """What every rank brings: `x[rank] [T, H]`, `routing[rank]`."""

    slots: int
    capacity: int
    x: list[Tensor]
    routing: list[PhysicalRouting]
    phase: Phase = Phase.MIXED

    @property
    def ep(self) -> int:
        return len(self.x)

    @property
    def num_physical(self) -> int:
        return self.ep * self.slots

    @property
    def step(self) -> DispatchStep:
        return DispatchStep(self.capacity, self.phase)


def make_case(
    *,
    ep: int,
    slots: int,
    top_k: int,
    tokens: Sequence[int],
    hidden: int = 16,
    seed: int = 0,
    padding: int = 0,
    spare_capacity: int = 0,
    dtype: torch.dtype = torch.float32,
    only_slot: int | None = None,
) -> Case:
    """Random distinct slots, or `only_slot` for all (top_k=1); the last `padding` rows of each rank go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    x, routing = [], []
    for count in tokens:
        scores = torch.rand(count, ep * slots, generator=generator)
        ids = scores.argsort(dim=1)[:, :top_k].contiguous()
        if only_slot is not None:
            ids.fill_(only_slot)
        ids[max(0, count - padding) :] = NOWHERE
        weights = torch.rand(count, top_k, generator=generator) + 0.1
        routing.append(PhysicalRouting(ids, weights / weights.sum(dim=1, keepdim=True)))
        x.append(torch.randn(count, hidden, generator=generator).to(dtype))
    return Case(slots, max(tokens) + spare_capacity, x, routing)


Expert = Callable[[Tensor, int], Tensor]
"""(rows of one slot, physical slot) -> rows, elementwise: a row's result cannot depend on its neighbours."""


def identity(rows: Tensor, slot: int) -> Tensor:
    return rows


def marked(rows: Tensor, slot: int) -> Tensor:
    """Different in every slot, so that a row at the wrong one is seen."""
    return rows * (1.0 + 0.37 * slot) + 0.01 * slot


def slot_rows(rows: Rows) -> list[Tensor]:
    """The real rows of each slot; checks the layout's own rules."""
    match rows:
        case GroupedRows(data=data, psum=psum, alignment=alignment):
            assert psum.dtype == torch.int32
            starts = [0] + [-(-end // alignment) * alignment for end in psum.tolist()[:-1]]
            assert all(start <= end for start, end in zip(starts, psum.tolist(), strict=True))
            assert psum.tolist()[-1] <= data.shape[0]
            return [data[start:end] for start, end in zip(starts, psum.tolist(), strict=True)]
        case PaddedRows(data=data, counts=counts):
            assert counts.dtype == torch.int32
            assert data.shape[1] >= counts.max()
            return [data[slot, :count] for slot, count in enumerate(counts.tolist())]


def run_experts(rows: Rows, expert: Expert, *, first_slot: int) -> Tensor:
    """Outputs shaped as `rows.data`, weighted where the backend wants them so; what is no real row comes back as NaN
    and must not be read."""
    out = torch.full_like(rows.data, float("nan"))
    for slot, (target, source) in enumerate(zip(slot_rows(replace(rows, data=out)), slot_rows(rows), strict=True)):
        target.copy_(expert(source, first_slot + slot))
    return out if rows.weights is None else (out.float() * rows.weights.unsqueeze(-1)).to(out.dtype)


def through(dispatcher: Dispatcher[Any], case: Case, rank: int, expert: Expert) -> Tensor:
    """This rank's result of one dispatch and combine."""
    rows, handle = dispatcher.dispatch_begin(case.x[rank], case.routing[rank], case.step).wait()
    return dispatcher.combine_begin(run_experts(rows, expert, first_slot=rank * case.slots), handle).wait()


RunPart = Callable[[Rows, int], Tensor]
"""(rows of a part, its first local slot) -> outputs."""


def through_parts(dispatcher: Dispatcher[Any], case: Case, rank: int, run: RunPart) -> Tensor:
    """`through`, where the combine comes in two parts."""
    step = replace(case.step, split_combine=True)
    rows, handle = dispatcher.dispatch_begin(case.x[rank], case.routing[rank], step).wait()
    can = splitting(dispatcher)
    (first, ours), (rest, theirs) = can.split(rows, handle)
    for part in (first, rest):
        assert part.data.untyped_storage().data_ptr() == rows.data.untyped_storage().data_ptr(), "a copy"
    on_way = can.combine_first_begin(run(first, 0), ours)
    return can.combine_rest_begin(run(rest, first_slots(case.slots)), theirs, on_way).wait()


def oracle(case: Case, rank: int, expert: Expert) -> Tensor:
    """The same through `local`, one rank with all slots."""
    local = LocalDispatcher(RowLayout(case.num_physical))
    whole = Case(case.num_physical, case.capacity, [case.x[rank]], [case.routing[rank]])
    return through(local, whole, 0, expert)


def assert_law(dispatcher: Dispatcher[Any], y: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise where the backend promises it, else within its bound (a rounding more for 16-bit results)."""
    assert y.shape == expected.shape, what
    assert y.dtype == expected.dtype, what
    capabilities = dispatcher.capabilities
    if capabilities.sums_at_home:
        differing = (y != expected).nonzero()
        at = differing[0].tolist() if len(differing) else []
        assert torch.equal(y, expected), f"{what}: {len(differing)} values differ, first at {at}"
        return
    bound = capabilities.tolerance + (2**-8 if y.dtype == torch.bfloat16 else 0.0)
    if y.numel():
        worst = (y.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        assert worst <= bound, f"{what}: {worst} > {bound}"


def check_marked_experts(ep: Communicator, backend: Backend, case: Case) -> None:
    """Equal to `local`; a second dispatch of the same object gives the same bits."""
    dispatcher, who = backend.make(ep, case.slots), f"{backend}, rank {ep.rank}"
    y = through(dispatcher, case, ep.rank, marked)
    assert_law(dispatcher, y, oracle(case, ep.rank, marked), who)
    assert torch.equal(y, through(dispatcher, case, ep.rank, marked)), f"{who}: other bits the second time"
    dispatcher.close()


def check_split_combine(ep: Communicator, backend: Backend, case: Case) -> None:
    """In two parts equal to `local`, twice through one dispatcher, with a whole combine after each."""

    def run(rows: Rows, slot: int) -> Tensor:
        return run_experts(rows, marked, first_slot=ep.rank * case.slots + slot)

    dispatcher = backend.make(ep, case.slots)
    want = oracle(case, ep.rank, marked)
    for attempt in range(2):
        what = f"{backend}, rank {ep.rank}, dispatch {attempt}"
        assert_law(dispatcher, through_parts(dispatcher, case, ep.rank, run), want, f"{what} in parts")
        assert_law(dispatcher, through(dispatcher, case, ep.rank, marked), want, what)
    dispatcher.close()


def check_identity_experts(ep: Communicator, backend: Backend, case: Case) -> None:
    """x·Σweights comes back, so x where they sum to 1; and zeros for rows that go nowhere."""
    dispatcher, x = backend.make(ep, case.slots), case.x[ep.rank]
    absent = case.routing[ep.rank].expert_ids[:, 0] == NOWHERE
    for total in (1.0, 1.5):
        routing = [PhysicalRouting(r.expert_ids, r.weights * total) for r in case.routing]
        y = through(dispatcher, replace(case, routing=routing), ep.rank, identity)
        rtol = 1e-5 if y.dtype is torch.float32 else dispatcher.capabilities.tolerance + torch.finfo(y.dtype).eps
        torch.testing.assert_close(y[~absent], (x[~absent].float() * total).to(y.dtype), rtol=rtol, atol=1e-6)
        assert not y[absent].any()
    dispatcher.close()


def stamp(x: Tensor, rank: int) -> Tensor:
    """Like `x [T, H]`: each row starts with its rank and token (16-bit dtypes hold both exactly up to 256)."""
    stamped = torch.zeros_like(x)
    stamped[:, 0], stamped[:, 1] = rank, torch.arange(len(x))
    return stamped


def check_origin_of_rows(ep: Communicator, backend: Backend, case: Case) -> None:
    """Every slot holds exactly the rows routed to it, in order of (source rank, token) where the backend keeps it; so
    counts are conserved."""
    stamped = [stamp(x, rank) for rank, x in enumerate(case.x)]
    stamps = replace(case, x=stamped)
    dispatcher = backend.make(ep, case.slots)
    rows, handle = dispatcher.dispatch_begin(stamps.x[ep.rank], stamps.routing[ep.rank], stamps.step).wait()
    for slot, received in enumerate(slot_rows(rows)):
        physical = ep.rank * case.slots + slot
        expected = [
            [float(rank), float(token)]
            for rank, routing in enumerate(case.routing)
            for token in (routing.expert_ids == physical).any(dim=1).nonzero().flatten().tolist()
        ]
        found = received[:, :2].tolist()
        found = found if dispatcher.capabilities.keeps_order else sorted(found)
        assert found == expected, f"{backend}: slot {physical}"
    received_rows = [len(part) for part in slot_rows(rows)]
    sent = int((case.routing[ep.rank].expert_ids >= 0).sum())
    totals = ep.exchange([sum(received_rows), sent])
    assert sum(received for received, _ in totals) == sum(count for _, count in totals)
    y = dispatcher.combine_begin(run_experts(rows, identity, first_slot=0), handle).wait()
    assert_law(dispatcher, y, oracle(stamps, ep.rank, identity), f"{backend}, rank {ep.rank}: stamps at home")
    dispatcher.close()


def check_two_in_flight(ep: Communicator, backend: Backend, case: Case) -> None:
    """Two micro-batches, begun one after the other, end in the order in which they began."""
    first, second = backend.make(ep, case.slots), backend.make(ep, case.slots)
    x, routing = case.x[ep.rank], case.routing[ep.rank]
    begun = first.dispatch_begin(x, routing, DispatchStep(case.capacity, case.phase, 0))
    later = second.dispatch_begin(-x, routing, DispatchStep(case.capacity, case.phase, 1))
    rows, handle = begun.wait()
    negated, other = later.wait()
    returning = first.combine_begin(run_experts(rows, identity, first_slot=0), handle)
    returning_later = second.combine_begin(run_experts(negated, identity, first_slot=0), other)
    y = returning.wait()
    assert torch.equal(y, -returning_later.wait())
    assert_law(first, y, oracle(case, ep.rank, identity), f"{backend}, rank {ep.rank}")


class Metered:
    """A communicator that adds up the bytes that its rank receives on the device group."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.bytes = 0

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def rank(self) -> int:
        return self._inner.rank

    def all_to_all_begin(self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> _MeteredPending:
        return _MeteredPending(self, self._inner.all_to_all_begin(x, send_counts, recv_counts))

    def all_gather_begin(self, x: Tensor) -> _MeteredPending:
        return _MeteredPending(self, self._inner.all_gather_begin(x))

    def reduce_scatter_begin(self, x: Tensor) -> _MeteredPending:
        return _MeteredPending(self, self._inner.reduce_scatter_begin(x))


@dataclass(frozen=True)
class _MeteredPending:
    meter: Metered
    inner: Any

    def wait(self) -> Tensor:
        result: Tensor = self.inner.wait()
        self.meter.bytes += result.nbytes
        return result


def check_receive_cap(ep: Communicator, backend: Backend, case: Case, cap_bytes: int) -> int:
    """Chunks chosen for `cap_bytes` never receive more and give what one chunk gives; returns their number."""
    meter: Any = Metered(ep)
    dispatcher = backend.make(meter, case.slots)
    x, routing = case.x[ep.rank], case.routing[ep.rank]
    spec = spec_of(
        backend.rows(case.slots),
        ep=ep.size,
        hidden=x.shape[1],
        dtype=x.dtype,
        top_k=routing.expert_ids.shape[1],
        max_tokens=case.capacity,
    )
    size = max(1, most_tokens(backend.name, spec, cap_bytes=cap_bytes))
    num_chunks = max(1, -(-case.capacity // size))
    outputs = []
    for i in range(num_chunks):
        rows_of = slice(i * size, (i + 1) * size)
        part = PhysicalRouting(routing.expert_ids[rows_of], routing.weights[rows_of])
        meter.bytes = 0
        rows, handle = dispatcher.dispatch_begin(x[rows_of], part, DispatchStep(size, case.phase)).wait()
        wire = meter.bytes
        as_sent = wire and getattr(handle, "position", rows) is None and backend.name == "all_to_all"
        laid_out = 0 if as_sent else rows.data.nbytes
        assert wire + laid_out <= cap_bytes, f"{backend}: {wire} + {laid_out} bytes received, cap {cap_bytes}"
        meter.bytes = 0
        y = run_experts(rows, marked, first_slot=ep.rank * case.slots)
        outputs.append(dispatcher.combine_begin(y, handle).wait())
        assert meter.bytes <= cap_bytes
    what = f"{backend}, rank {ep.rank}, chunks of {size}"
    assert_law(dispatcher, torch.cat(outputs), oracle(case, ep.rank, marked), what)
    return num_chunks
