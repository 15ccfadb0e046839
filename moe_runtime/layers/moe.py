"""One MoE layer: route, count, place, then per chunk dispatch, experts, combine. T tokens, H hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from moe_kernels import backends
from torch import Tensor

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.dispatch.base import Dispatcher, DispatchStep, Phase, Rows, first_slots, splitting
from moe_runtime.dispatch.overlap import Stage, Stages, run_through
from moe_runtime.layers.experts import MLP, Experts
from moe_runtime.layers.router import Router
from moe_runtime.parallel.replicas import ReplicaSelector
from moe_runtime.types import LogicalRouting, Pending, PhysicalRouting

H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class MoEStep:
    """What all ranks of the ep group agreed on: each brings up to `capacity` tokens, in `num_chunks` dispatches.

    `num_real` is this rank's own: its first rows are tokens, the others padding. A one-element integer tensor on the
    device stands for a number that changes while shapes stay (captured graphs).

    `split_combine`: the outputs of a rank's first slots start home before those of its others are computed.
    """

    num_real: int | Tensor
    capacity: int
    chunk_tokens: int
    num_chunks: int
    phase: Phase
    micro_batch: int = 0
    split_combine: bool = False

    def chunks(self) -> Iterator[tuple[slice, DispatchStep]]:
        """Rows of each chunk and its dispatch."""
        for i in range(self.num_chunks):
            start = i * self.chunk_tokens
            rows = max(0, min(self.chunk_tokens, self.capacity - start))
            yield slice(start, start + rows), DispatchStep(rows, self.phase, self.micro_batch, self.split_combine)


@dataclass(frozen=True, slots=True, eq=False)
class MoELayer(Generic[H]):
    """One rank's part of the layer.

    `index` counts MoE layers from 0: the row of the placement and of the recorder. `shared` is None where the model has
    no shared experts or they are dispatched.
    """

    index: int
    router: Router
    selector: ReplicaSelector
    dispatcher: Dispatcher[H]
    experts: Experts
    shared: MLP | None = None
    recorder: LoadRecorder | None = None
    _one_launch: bool = field(init=False)
    """Experts are chosen, placed and counted by one kernel."""

    def __post_init__(self) -> None:
        device = self.router.weight.device
        object.__setattr__(self, "_one_launch", backends.default_backend(device) == "triton")

    def __call__(self, x: Tensor, step: MoEStep) -> Tensor:
        """`stages`, run through."""
        return run_through(self.stages(x, step))

    def stages(self, x: Tensor, step: MoEStep) -> Stages[Tensor]:
        """`x [T, H]`, T <= step.capacity, rows from `step.num_real` on padding -> `[T, H]` in x's dtype.

        Stops where a dispatch is on its way, with the shared expert begun beside it, and where a combine is.
        """
        assert x.shape[0] <= step.capacity, f"{x.shape[0]} tokens exceed the agreed capacity {step.capacity}"
        routing = self._route(x, step)
        shared: Tensor | None = None
        outputs = []
        for rows, chunk in step.chunks():
            part = routing if step.num_chunks == 1 else _rows_of(routing, rows)
            arriving = self.dispatcher.dispatch_begin(x if step.num_chunks == 1 else x[rows], part, chunk)
            if shared is None and self.shared is not None:
                shared = self.shared(x)
            yield Stage.DISPATCH
            received, handle = arriving.wait()
            if self.recorder is not None:
                captured = isinstance(step.num_real, Tensor)
                self.recorder.record_received(self.index, received, step.phase, captured=captured)
            if chunk.split_combine:
                returning = self._in_parts(received, handle)
            else:
                returning = self.dispatcher.combine_begin(self.experts(received), handle)
            yield Stage.COMBINE
            outputs.append(returning.wait())
        routed = outputs[0] if step.num_chunks == 1 else torch.cat(outputs)
        return routed if shared is None else routed + shared

    def _in_parts(self, received: Rows, handle: H) -> Pending[Tensor]:
        """Experts and combine: the first slots' outputs travel beside the products of the others."""
        dispatcher, num_slots = splitting(self.dispatcher), self.experts.weights.num_slots
        cut = first_slots(num_slots)
        (first, ours), (rest, theirs) = dispatcher.split(received, handle)
        on_way = dispatcher.combine_first_begin(self.experts.slots(0, cut)(first), ours)
        return dispatcher.combine_rest_begin(self.experts.slots(cut, num_slots)(rest), theirs, on_way)

    def _route(self, x: Tensor, step: MoEStep) -> PhysicalRouting:
        index, recorder, num_real = self.index, self.recorder, step.num_real
        if self._one_launch or isinstance(num_real, Tensor):
            placed = self.router.place(
                x,
                num_real=num_real,
                replicas=self.selector.replicas(index),
                counts_=None if recorder is None else recorder.counts_of(index, step.phase),
                routes_=None if recorder is None else recorder.routes_of(index, micro_batch=step.micro_batch),
            )
            if not self.selector.by_counts:
                return placed
            return self.selector.to_physical(index, LogicalRouting(placed.expert_ids, placed.weights))
        logical = self.router(x, num_real=num_real)
        if recorder is not None:
            recorder.record(index, logical, step.phase, micro_batch=step.micro_batch)
        return self.selector.to_physical(index, logical)


def _rows_of(routing: PhysicalRouting, rows: slice) -> PhysicalRouting:
    return PhysicalRouting(routing.expert_ids[rows], routing.weights[rows])
