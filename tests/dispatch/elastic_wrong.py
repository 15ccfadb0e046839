"""For each clause of DeepEP V2 an adapter that breaks it. R received rows, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_runtime.dispatch.base import Capabilities, DispatchStep, GroupedRows, Phase, Rows
from moe_runtime.dispatch.deep_ep.elastic import ElasticDispatcher
from moe_runtime.types import Done, PhysicalRouting
from tests.dispatch.contract import Case, make_case
from tests.dispatch.elastic_adapters import Arguments, Change, CompactDispatcher, by, to
from tests.doubles.deep_ep.elastic import Library
from tests.doubles.deep_ep.events import EventHandle, EventOverlap


def bf16_case(ep: int = 2, slots: int = 2, top_k: int = 2, tokens: int = 5, **options: Any) -> Case:
    counts = [max(1, tokens - rank) for rank in range(ep)]
    return make_case(
        ep=ep,
        slots=slots,
        top_k=top_k,
        tokens=counts,
        padding=1,
        dtype=torch.bfloat16,
        **{"hidden": 256, **options},
    )


def exact_case(**sizes: int) -> Case:
    """Values that fp8 holds exactly: blocks of 128 with 1.75 = 448/256 as their largest, weights powers of two."""
    case = bf16_case(**sizes)
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([1.75, -1.75, 1.5, -1.0, 0.5], dtype=torch.bfloat16)
    x = [values[torch.randint(5, part.shape, generator=generator)] for part in case.x]
    for part in x:
        part[:, ::128] = 1.75
    return replace(case, x=x, routing=[replace(r, weights=torch.full_like(r.weights, 0.5)) for r in case.routing])


def twice_case() -> Case:
    """Tokens that chose one expert twice."""
    case = bf16_case()
    routing = [replace(r, expert_ids=r.expert_ids[:, :1].repeat(1, 2)) for r in case.routing]
    return replace(case, routing=routing)


@dataclass(frozen=True)
class Wrong:
    """A wrong adapter, and the smallest case that shows it."""

    made: Change | None = None
    dispatched: Change | None = None
    combined: Change | None = None
    after: Callable[[Any], Any] | None = None
    kind: type[ElasticDispatcher] = ElasticDispatcher
    phase: Phase = Phase.MIXED
    case: Callable[[], Case] = bf16_case
    alignment: int = 4
    quantize: bool = False
    origins: bool = True
    """Whether where rows came from can be checked: stamps survive, and tokens choose distinct slots."""
    max_tokens: int | None = None
    network: str = "nccl"
    nodes: int = 1
    around: Callable[[Library], AbstractContextManager[None]] = lambda library: nullcontext()
    also_off: tuple[str, ...] = ()
    """Clauses that would speak up first, or after."""
    hazard: bool = False
    """Nothing is refused: results are wrong."""
    recovers: bool = True
    """With the clause off, this adapter is right."""


class Waited(ElasticDispatcher):
    """Waits at once, so that its children can change the rows."""

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Any:
        rows, handle = super().dispatch_begin(x, routing, step).wait()
        assert isinstance(rows, GroupedRows)
        return Done((self.shown(rows, handle), handle))

    def shown(self, rows: GroupedRows, handle: Any) -> Rows:
        return rows


class Dequantizing(Waited):
    """Right: fp8 rows as bf16, for experts that know no scales."""

    def shown(self, rows: GroupedRows, handle: Any) -> Rows:
        assert rows.scales is not None
        wide = rows.data.float() * rows.scales.repeat_interleave(128, dim=1)[:, : rows.data.shape[1]]
        return replace(rows, data=wide.bfloat16(), scales=None)


class ChecksAllValues(Waited):
    def shown(self, rows: GroupedRows, handle: Any) -> Rows:
        assert rows.data.isfinite().all(), "a value is not finite"
        return rows


class ChecksAllWeights(Waited):
    def shown(self, rows: GroupedRows, handle: Any) -> Rows:
        assert rows.weights is not None
        assert rows.weights.isfinite().all(), "a weight is not finite"
        return rows


class TakesListForCounts(Waited):
    def shown(self, rows: GroupedRows, handle: Any) -> Rows:
        starts = [0] + [-(-end // rows.alignment) * rows.alignment for end in rows.psum.tolist()[:-1]]
        counts = handle.inner.num_recv_tokens_per_expert_list
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        return replace(rows, psum=torch.tensor(ends, dtype=torch.int32))


class WeighsInCombine(ElasticDispatcher):
    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Any:
        rows, handle = super().dispatch_begin(x, routing, step).wait()
        return Done((replace(rows, weights=None), (handle, rows.weights)))

    def combine_begin(self, y: Tensor, handle: Any) -> Any:
        ours, weights = handle
        return Done(self._buffer.combine(y, handle=ours.inner, topk_weights=weights)[0])


class PromisesBits(ElasticDispatcher):
    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, sums_at_home=True)


class PromisesOrder(ElasticDispatcher):
    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, keeps_order=True)


class NeverCloses(ElasticDispatcher):
    def close(self) -> None: ...


class ClosesEarly(ElasticDispatcher):
    def combine_begin(self, y: Tensor, handle: Any) -> Any:
        self.close()
        return super().combine_begin(y, handle)


class Capturing(ElasticDispatcher):
    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Any:
        with self._library.library.capturing():
            return super().dispatch_begin(x, routing, step)


class DoesNotMask(CompactDispatcher):
    def slots_of(self, ids: Tensor, inner: Any) -> Tensor:
        return ids


class TakesIdsForGlobal(CompactDispatcher):
    def slots_of(self, ids: Tensor, inner: Any) -> Tensor:
        ids = super().slots_of(ids, inner)
        return torch.where(ids >= 0, ids - self._buffer.inner.group.rank() * self._spec.rows.num_slots, -1)


class TakesCompactPsum(CompactDispatcher):
    def shown(self, rows: Rows, inner: Any) -> Rows:
        assert isinstance(rows, GroupedRows)
        return replace(rows, psum=inner.psum_num_recv_tokens_per_expert)


@contextmanager
def deterministic(library: Library) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def again(**values: Any) -> Change:
    """From the second dispatch on, with the handle of the one before."""

    def change(arguments: Arguments, rank: int) -> Arguments:
        return arguments if arguments["last"] is None else {**arguments, "handle": arguments["last"], **values}

    return change


def fewer_tokens(arguments: Arguments, rank: int) -> Arguments:
    if arguments["last"] is None:
        return arguments
    shorter = {name: arguments[name][:-1] for name in ("x", "topk_weights")}
    return {**arguments, **shorter, "topk_idx": None, "handle": arguments["last"]}


def by_rank(arguments: Arguments, rank: int) -> Arguments:
    return {**arguments, "num_max_tokens_per_rank": arguments["num_max_tokens_per_rank"] << rank}


def turned(x: Tensor) -> Tensor:
    """The same numbers, columns adjacent."""
    return x.t().contiguous().t()


class Deaf(EventOverlap):
    def current_stream_wait(self, release_handle: bool = False) -> None: ...


WIDE: dict[str, Any] = {"max_tokens": 4096, "made": to(num_max_tokens_per_rank=1)}
FP8: dict[str, Any] = {"quantize": True, "origins": False, "kind": Dequantizing, "case": exact_case}
SMALL_BUFFER = ("dispatch_fits_buffer", "combine_fits_buffer")
GARBAGE = ("gaps_uninitialised", "rows_past_count", "weights_past_count")

WRONG: dict[str, Wrong] = {
    "nccl_group": Wrong(network="gloo"),
    "made_outside_capture": Wrong(around=lambda library: library.capturing(), phase=Phase.DECODE),
    "sizes_positive": Wrong(made=to(hidden=0), also_off=SMALL_BUFFER),
    "destroy_if_explicit": Wrong(made=to(explicitly_destroy=False)),
    "destroyed_at_end": Wrong(kind=NeverCloses),
    "not_used_after_destroy": Wrong(kind=ClosesEarly),
    "no_deterministic_fill": Wrong(around=deterministic),
    "experts_divide": Wrong(dispatched=by(num_experts=lambda experts: experts + 1)),
    "hybrid_nodes": Wrong(made=to(allow_hybrid_mode=True), nodes=33, case=lambda: bf16_case(ep=33, tokens=1)),
    "hybrid_ranks_of_a_node": Wrong(
        made=to(allow_hybrid_mode=True),
        nodes=2,
        case=lambda: bf16_case(ep=130, slots=1, tokens=1),
        also_off=("hybrid_counters",),
    ),
    "hybrid_counters": Wrong(
        made=to(allow_hybrid_mode=True), nodes=2, case=lambda: bf16_case(ep=2, slots=128, tokens=1)
    ),
    "x_contiguous": Wrong(dispatched=by(x=turned)),
    "tokens_fit": Wrong(dispatched=to(num_max_tokens_per_rank=1)),
    "same_sizes": Wrong(dispatched=by_rank, made=by(num_max_tokens_per_rank=lambda tokens: 2 * tokens)),
    "scales_rows": Wrong(dispatched=by(x=lambda x: (x[0], x[1][:-1])), recovers=False, **FP8),
    "scales_four_bytes": Wrong(dispatched=by(x=lambda x: (x[0], x[1].double())), also_off=("same_sizes",), **FP8),
    "topk_dtype": Wrong(dispatched=by(topk_idx=lambda ids: ids.int())),
    "topk_contiguous": Wrong(dispatched=by(topk_idx=turned)),
    "weights_contiguous": Wrong(dispatched=by(topk_weights=turned)),
    "weights_float": Wrong(dispatched=by(topk_weights=lambda weights: weights.double())),
    "ids_in_range": Wrong(dispatched=by(topk_idx=lambda ids: torch.where(ids < 0, 4, ids)), also_off=("ids_distinct",)),
    "ids_distinct": Wrong(case=twice_case, origins=False),
    "dispatch_fits_buffer": Wrong(also_off=("combine_fits_buffer",), **WIDE),
    "combine_fits_buffer": Wrong(also_off=("dispatch_fits_buffer",), **WIDE),
    "padding_needs_expand": Wrong(kind=CompactDispatcher, dispatched=to(do_zero_padding=True)),
    "cached_without_topk": Wrong(dispatched=again()),
    "cached_without_sync": Wrong(dispatched=again(topk_idx=None)),
    "cached_same_sizes": Wrong(
        dispatched=again(topk_idx=None, do_cpu_sync=None, num_max_tokens_per_rank=64), phase=Phase.DECODE
    ),
    "cached_same_tokens": Wrong(dispatched=fewer_tokens, phase=Phase.DECODE, recovers=False),
    "event_type": Wrong(dispatched=by(previous_event=EventOverlap)),
    "event_with_comm_stream": Wrong(combined=to(allocate_on_comm_stream=False)),
    "event_after_inputs": Wrong(
        dispatched=by(previous_event=lambda event: EventHandle(time=0)),
        case=lambda: bf16_case(ep=1, hidden=192),
        around=lambda library: library.watching(),
    ),
    "event_if_async": Wrong(dispatched=to(async_with_compute_stream=False), hazard=True),
    "arrives_with_event": Wrong(after=lambda found: (*found[:4], Deaf(found[4].event)), hazard=True),
    "sync_outside_capture": Wrong(kind=Capturing, case=lambda: bf16_case(ep=1)),
    "order_is_open": Wrong(kind=PromisesOrder, case=lambda: bf16_case(tokens=9), hazard=True),
    "gaps_uninitialised": Wrong(kind=ChecksAllValues, hazard=True),
    "rows_past_count": Wrong(kind=ChecksAllValues, phase=Phase.DECODE, also_off=GARBAGE[:1], hazard=True),
    "weights_past_count": Wrong(kind=ChecksAllWeights, phase=Phase.DECODE, also_off=GARBAGE[:1], hazard=True),
    "ids_past_count": Wrong(kind=DoesNotMask, phase=Phase.DECODE, hazard=True),
    "no_list_without_sync": Wrong(kind=TakesListForCounts, phase=Phase.DECODE, alignment=1, hazard=True),
    "list_is_aligned": Wrong(kind=TakesListForCounts, hazard=True),
    "local_ids": Wrong(kind=TakesIdsForGlobal, hazard=True),
    "compact_psum": Wrong(kind=TakesCompactPsum, hazard=True),
    "combine_bf16": Wrong(combined=by(x=lambda x: x.float())),
    "combine_contiguous": Wrong(combined=by(x=turned)),
    "combine_compact_rows": Wrong(kind=CompactDispatcher, combined=by(x=lambda x: x[:-1]), phase=Phase.DECODE),
    "combine_expanded_rows": Wrong(combined=by(x=lambda x: x[:-1]), phase=Phase.DECODE),
    "combine_unweighted": Wrong(kind=WeighsInCombine, hazard=True),
    "node_sums_bf16": Wrong(
        kind=PromisesBits,
        nodes=2,
        case=lambda: exact_case(ep=4, slots=2, top_k=6),
        also_off=("partial_sums_bf16",),
        hazard=True,
    ),
    "partial_sums_bf16": Wrong(kind=PromisesBits, case=lambda: exact_case(slots=4, top_k=6), hazard=True),
}
"""The clause and an adapter that only this clause catches."""
