"""Ways to use DeepEP V1 wrongly: for each clause of its double an adapter, or a call, that breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, Phase
from moe_runtime.dispatch.deep_ep import legacy
from moe_runtime.dispatch.deep_ep.legacy_low_latency import LowLatency
from tests.dispatch import contract
from tests.dispatch.contract import Case
from tests.dispatch.legacy_fabric import Fabric, bf16_case
from tests.doubles.deep_ep.events import EventHandle, EventOverlap

MIXED, DECODE = Phase.MIXED, Phase.DECODE
Arguments = dict[str, Any]
Program = Callable[[Communicator, Fabric], None]
Change = Callable[[Any, Arguments], None]
"""(the rank's buffer, arguments by name): changed in place."""
Outcome = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]
"""(the rank's buffer, results) -> what the adapter gets instead."""


def laws(ep: Communicator, fabric: Fabric) -> None:
    contract.check_marked_experts(ep, fabric, fabric.case)
    contract.check_origin_of_rows(ep, fabric, fabric.case)


@dataclass(frozen=True)
class Mistake:
    """Breaks `clause`. `also`: clauses of the same cause, off from the start; `seen`: what tells, if not the clause's
    name; `harmless`: whether it goes well with the clause off, so that nothing else had told."""

    clause: str
    phase: Phase = DECODE
    size: int = 2
    method: str | None = None
    change: Change | None = None
    outcome: Outcome | None = None
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    program: Program = laws
    also: tuple[str, ...] = ()
    seen: str | None = None
    harmless: bool = True
    quantize: bool = False
    alignment: int = 1
    case: Callable[[Phase, int], Case] = lambda phase, size: bf16_case(size, phase)
    in_capture: bool = False

    def __str__(self) -> str:
        return self.clause

    def make(self) -> Fabric:
        """The adapter over a double whose `method` is called with changed arguments, or gives changed results."""
        fabric = Fabric(case=self.case(self.phase, self.size), alignment=self.alignment, quantize=self.quantize)
        owner = fabric.library.Buffer
        if self.method is None:
            return fabric
        original, change, outcome = getattr(owner, self.method), self.change, self.outcome
        signature = inspect.signature(original)

        def wrong(buffer: Any, *args: Any, **options: Any) -> Any:
            bound = signature.bind(buffer, *args, **options)
            bound.apply_defaults()
            if change is not None:
                change(buffer, bound.arguments)
            results = original(*bound.args, **bound.kwargs)
            return results if outcome is None else outcome(buffer, results)

        setattr(owner, self.method, wrong)
        return fabric


def given(**values: Any) -> Change:
    """These arguments instead; a function makes one from what was passed."""

    def change(buffer: Any, arguments: Arguments) -> None:
        for name, value in values.items():
            arguments[name] = value(arguments[name]) if callable(value) else value

    return change


def at_construction(**values: Any) -> dict[str, Any]:
    """The buffer is made with these values; they travel as the constructor's **options."""

    def change(buffer: Any, arguments: Arguments) -> None:
        arguments["options"] |= values

    return {"method": "__init__", "change": change}


def patched(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """The adapter with another `name` in its module."""
    return lambda monkeypatch: monkeypatch.setattr(legacy, name, value)


def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter without its own checks of sizes."""
    monkeypatch.setattr(legacy, "unfit", lambda spec: None)
    monkeypatch.setattr(legacy, "normal_unfit", lambda spec, ranks_per_node: None)


def as_low_latency_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "unfit", lambda spec: None)
    monkeypatch.setattr(legacy, "normal_unfit", lambda spec, ranks_per_node: "none")


def skewed(x: Tensor) -> Tensor:
    """The same numbers, columns adjacent in memory."""
    return x.t().contiguous().t()


def synchronous(buffer: Any, arguments: Arguments) -> None:
    arguments |= {"async_finish": False, "allocate_on_comm_stream": False}


def byte_mask(buffer: Any, arguments: Arguments) -> None:
    size, each = buffer.group_size, len(arguments["num_tokens_per_expert"]) // buffer.group_size
    ids = arguments["topk_idx"]
    home = torch.where(ids >= 0, ids // each, -1)
    arguments["is_token_in_rank"] = (home.unsqueeze(2) == torch.arange(size)).any(1).to(torch.uint8)


def no_event(buffer: Any, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """An adapter that does not wait: its event has nothing to bring."""
    return *results[:-1], EventOverlap(EventHandle())


def no_hook(buffer: Any, results: tuple[Any, ...]) -> tuple[Any, ...]:
    return *results[:-1], lambda: None


def local_twice(buffer: Any, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """An adapter that takes received ids for global ones, once they are there."""
    received, ids, weights, counts, handle, event = results
    first = buffer.rank * len(counts)
    return received, torch.where(ids >= 0, ids - first, -1), weights, counts, handle, LooseWait(event)


@dataclass(frozen=True)
class LooseWait:
    """Of a synchronous call, for an adapter that waits all the same."""

    event: Any

    def current_stream_wait(self) -> None: ...


def changing_capacity(buffer: Any, arguments: Arguments) -> None:
    """Each call takes what it needs."""
    buffer.calls = getattr(buffer, "calls", 0) + 1
    arguments["num_max_dispatch_tokens_per_rank"] = 4 + 4 * (buffer.calls % 2)


def rows_as_views(buffer: Any, results: tuple[Any, ...]) -> tuple[Any, ...]:
    (data, scales), *rest = results
    each, room, groups = scales.shape
    return (data, scales.view(each * room, groups).view(each, room, groups)), *rest


def bare_events(ep: Communicator, fabric: Fabric) -> None:
    """The library looks for an EventOverlap's `event`, and takes anything else for none."""
    fabric.library.Buffer.capture = staticmethod(EventHandle)
    laws(ep, fabric)


def closed_first(ep: Communicator, fabric: Fabric) -> None:
    dispatcher = fabric.make(ep, fabric.case.slots)
    dispatcher.close()
    contract.through(dispatcher, fabric.case, ep.rank, contract.marked)


def short_queues(ep: Communicator, fabric: Fabric) -> None:
    dispatcher = fabric.make(ep, fabric.case.slots)
    dispatcher._buffer.nvshmem_qp_depth = 8
    contract.through(dispatcher, fabric.case, ep.rank, contract.marked)


def two_begun(ep: Communicator, fabric: Fabric) -> None:
    """The second dispatch begins before the first is received."""
    case, dispatcher = fabric.case, fabric.make(ep, fabric.case.slots)
    x, routing = case.x[ep.rank], case.routing[ep.rank]
    begun = [dispatcher.dispatch_begin(x, routing, DispatchStep(case.capacity, DECODE, i)) for i in range(2)]
    for rows, handle in [each.wait() for each in begun]:
        y = contract.run_experts(rows, contract.marked, first_slot=ep.rank * case.slots)
        got = dispatcher.combine_begin(y, handle).wait()
        contract.assert_law(dispatcher, got, contract.oracle(case, ep.rank, contract.marked), "two begun")


def rows_kept(ep: Communicator, fabric: Fabric) -> None:
    """Rows of the first layer are looked at after the second one's dispatch."""
    case, dispatcher = fabric.case, fabric.make(ep, fabric.case.slots)
    rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
    before = [part.clone() for part in contract.slot_rows(rows)]
    dispatcher.combine_begin(rows.data.clone(), handle).wait()
    contract.through(dispatcher, case, ep.rank, contract.marked)
    for part, was in zip(contract.slot_rows(rows), before, strict=True):
        assert torch.equal(part, was), "rows of an earlier layer have changed"


def prompts_then_decode(ep: Communicator, fabric: Fabric) -> None:
    dispatcher = fabric.make(ep, fabric.case.slots)
    for phase in (MIXED, DECODE):
        contract.through(dispatcher, replace(fabric.case, phase=phase), ep.rank, contract.marked)


def mixing_experts(ep: Communicator, fabric: Fabric) -> None:
    """Experts whose rows depend on all that the memory holds."""
    case, dispatcher = fabric.case, fabric.make(ep, fabric.case.slots)
    rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
    y = contract.run_experts(rows, contract.marked, first_slot=ep.rank * case.slots) + 0 * rows.data.sum()
    got = dispatcher.combine_begin(y, handle).wait()
    contract.assert_law(dispatcher, got, contract.oracle(case, ep.rank, contract.marked), "mixing experts")


def ordered_rows(ep: Communicator, fabric: Fabric) -> None:
    """A caller that takes rows to stand in order of source rank and token."""
    case = replace(fabric.case, x=[contract.stamp(x, rank) for rank, x in enumerate(fabric.case.x)])
    rows, _ = fabric.make(ep, case.slots).dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
    for part in contract.slot_rows(rows):
        found = part[:, :2].tolist()
        assert found == sorted(found), "rows are not in order"


def dequantized(ep: Communicator, fabric: Fabric) -> None:
    """One dispatch of fp8 rows."""
    case, dispatcher = fabric.case, fabric.make(ep, fabric.case.slots)
    rows, _ = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
    assert rows.scales is not None and rows.data.dtype is torch.float8_e4m3fn


def not_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowLatency, "_settle", lambda self: None)


def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def not_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy.Normal, "_home", lambda self: None)
