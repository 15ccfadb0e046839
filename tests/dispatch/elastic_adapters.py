"""DeepEP V2's adapter over its double, for the contract's programs; and ways to use the library wrongly.

T tokens, K top-k, E local slots, R received rows, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, Phase, Rows
from moe_runtime.dispatch.deep_ep.elastic import ElasticDispatcher, ElasticHandle
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import Done, PhysicalRouting
from tests.dispatch.contract import Case
from tests.doubles.deep_ep.elastic import Library
from tests.doubles.fabric_group import FabricGroup

Arguments = dict[str, Any]
Change = Callable[[Arguments, int], Arguments]
"""(arguments of a call, rank) -> what is passed instead."""


def spec_for(case: Case, *, alignment: int = 4, quantize: bool = False, max_tokens: int | None = None) -> DispatchSpec:
    most = max(1, case.capacity) if max_tokens is None else max_tokens
    return DispatchSpec(
        ep=case.ep,
        rows=RowLayout(case.slots, alignment=alignment, quantize=quantize),
        hidden=case.x[0].shape[1],
        dtype=torch.bfloat16,
        top_k=case.routing[0].expert_ids.shape[1],
        max_tokens=most,
        max_decode_tokens=most,
    )


@dataclass(frozen=True)
class Elastic:
    """What contract.py takes for a backend."""

    spec: DispatchSpec
    library: Any
    kind: type[ElasticDispatcher] = ElasticDispatcher
    network: str = "nccl"

    def make(self, ep: Communicator, slots: int) -> ElasticDispatcher:
        assert slots == self.spec.rows.num_slots
        return self.kind(ep, self.spec, library=self.library, group=FabricGroup(ep, self.network))


@dataclass(frozen=True)
class CompactHandle:
    inner: Any
    row_of: Tensor
    weights: Tensor


class CompactDispatcher(ElasticDispatcher):
    """The library's other form for decode: a row per token and rank, which is sorted here. What `ElasticDispatcher`
    does not use, done rightly, so that its clauses have someone to hold to them."""

    last: Any = None
    """The library's handle of the last dispatch."""

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Any:
        rows = self._spec.rows
        data, ids, weights, inner, event = self._buffer.dispatch(
            self._payload(x),
            topk_idx=routing.expert_ids,
            topk_weights=routing.weights,
            num_experts=self._spec.num_physical,
            num_max_tokens_per_rank=self._decode_capacity,
            expert_alignment=rows.alignment,
            previous_event=self._library.ElasticBuffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            do_cpu_sync=step.phase is Phase.MIXED,
        )
        event.current_stream_wait()
        self.last = inner
        sorted_rows, row_of = rows.sort(data[:, : self._spec.hidden].contiguous(), self.slots_of(ids, inner))
        return Done((self.shown(sorted_rows, inner), CompactHandle(inner, row_of, weights)))

    def slots_of(self, ids: Tensor, inner: Any) -> Tensor:
        """`ids [R, K]`, those past the count of received tokens masked on the device."""
        received = inner.psum_num_recv_tokens_per_scaleup_rank[-1]
        return torch.where((torch.arange(len(ids)) < received).unsqueeze(1), ids, -1)

    def shown(self, rows: Rows, inner: Any) -> Rows:
        return rows

    def combine_begin(self, y: Tensor, handle: Any) -> Any:
        summed = unpermute(y, handle.row_of, handle.weights, out_dtype=torch.bfloat16)
        return super().combine_begin(summed, ElasticHandle(handle.inner))


@dataclass
class Bent:
    """A library of which one argument is changed on the way: what an adapter would do that passed it so."""

    library: Library
    made: Change | None = None
    dispatched: Change | None = None
    combined: Change | None = None
    after: Callable[[Any], Any] | None = None
    """Of what a dispatch returns."""
    topk_idx_t: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.topk_idx_t = self.library.topk_idx_t

    @property
    def ElasticBuffer(self) -> Any:  # noqa: N802 - the library's name
        return _BentClass(self)

    def get_physical_domain_size(self, group: FabricGroup) -> tuple[int, int]:
        return self.library.get_physical_domain_size(group)


@dataclass(frozen=True)
class _BentClass:
    bent: Bent

    def capture(self) -> Any:
        return self.bent.library.ElasticBuffer.capture()

    def __call__(self, group: FabricGroup, **arguments: Any) -> Any:
        made = self.bent.made
        passed = made(arguments, group.rank()) if made else arguments
        return _BentBuffer(self.bent, self.bent.library.ElasticBuffer(group, **passed))


class _BentBuffer:
    def __init__(self, bent: Bent, inner: Any) -> None:
        self.bent, self.inner = bent, inner
        self.last: Any = None

    def dispatch(self, x: Any, **arguments: Any) -> Any:
        passed = {"x": x, **arguments}
        if self.bent.dispatched:
            passed = self.bent.dispatched({**passed, "last": self.last}, self.inner.group.rank())
            passed.pop("last", None)
        found = self.inner.dispatch(**passed)
        self.last = found[3]
        return self.bent.after(found) if self.bent.after else found

    def combine(self, x: Tensor, **arguments: Any) -> Any:
        passed = {"x": x, **arguments}
        return self.inner.combine(**(self.bent.combined(passed, 0) if self.bent.combined else passed))

    def destroy(self) -> None:
        self.inner.destroy()


def by(**values: Callable[[Any], Any]) -> Change:
    """Each named argument replaced by what its function makes of it."""
    return lambda arguments, rank: {**arguments, **{name: change(arguments[name]) for name, change in values.items()}}


def to(**values: Any) -> Change:
    """Each named argument replaced."""
    return lambda arguments, rank: {**arguments, **values}
