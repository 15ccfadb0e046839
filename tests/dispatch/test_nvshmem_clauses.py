"""For every clause of NVSHMEM's double a wrong adapter that it catches and that passes with the clause off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from moe_kernels import backends

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, Phase
from moe_runtime.dispatch.nvshmem import host, packing
from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
from moe_runtime.dispatch.nvshmem.heap import Heap, Signal
from moe_runtime.dispatch.nvshmem.host import HostDispatcher
from moe_runtime.errors import CommunicationError
from tests.dispatch import contract
from tests.dispatch.contract import make_case
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.test_contract import on_ranks
from tests.doubles.nvshmem import Core
from tests.doubles.nvshmem.clauses import nvshmem_clauses
from tests.doubles.nvshmem.core import Status

Patch = Callable[[pytest.MonkeyPatch], None]
CASE = replace(make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], hidden=8), phase=Phase.DECODE)


def one_dispatch(ep: Communicator, backend: Nvshmem) -> None:
    core = backend.core(ep)
    dispatcher = backend.make_with(core, ep)
    y = contract.through(dispatcher, CASE, ep.rank, contract.marked)
    dispatcher.close()
    contract.assert_law(dispatcher, y, contract.oracle(CASE, ep.rank, contract.marked), f"rank {ep.rank}")


def captured_dispatch(ep: Communicator, backend: Nvshmem) -> None:
    core = backend.core(ep)
    dispatcher = backend.make_with(core, ep)
    with core.capturing():
        contract.through(dispatcher, CASE, ep.rank, contract.marked)


def few_bytes(ep: Communicator, backend: Nvshmem) -> None:
    core = backend.core(ep)
    dispatcher = backend.make_with(core, ep)
    small = replace(CASE, capacity=1, x=[x[:1] for x in CASE.x], routing=[_first(r) for r in CASE.routing])
    y = contract.through(dispatcher, small, ep.rank, contract.marked)
    contract.assert_law(dispatcher, y, contract.oracle(small, ep.rank, contract.marked), "one token")
    assert core.bytes_put == 2 * 1 * (48 + 48), "half of each block"


def _first(routing: Any) -> Any:
    return type(routing)(routing.expert_ids[:1], routing.weights[:1])


def two_at_once(ep: Communicator, backend: Nvshmem) -> None:
    dispatcher = replace(backend, in_flight=2).make(ep, CASE.slots)
    x, routing = CASE.x[ep.rank], CASE.routing[ep.rank]
    begun = [dispatcher.dispatch_begin(x * (i + 1), routing, DispatchStep(2, Phase.DECODE, i)) for i in range(2)]
    arrived = [pending.wait() for pending in begun]
    returning = [
        dispatcher.combine_begin(contract.run_experts(rows, contract.identity, first_slot=0), handle)
        for rows, handle in arrived
    ]
    for i, pending in enumerate(returning):
        torch.testing.assert_close(pending.wait(), x * (i + 1))


def after_close(ep: Communicator, backend: Nvshmem) -> None:
    dispatcher = backend.make(ep, CASE.slots)
    dispatcher.close()
    contract.through(dispatcher, CASE, ep.rank, contract.marked)


def far_away(ep: Communicator, backend: Nvshmem) -> None:
    core = Core(ep, backend.core(ep).clauses, reach=lambda rank: rank == ep.rank)
    backend.make_with(core, ep)


def one_gpu_for_all(ep: Communicator, backend: Nvshmem) -> None:
    core = Core(ep, backend.core(ep).clauses, running=Status.STATUS_LIMITED_MPG)
    contract.through(backend.make_with(core, ep), CASE, ep.rank, contract.marked)


def unaware(right: Callable[[Core], Status]) -> Callable[[Core], Status]:
    return lambda core: min(right(core), Status.STATUS_IS_INITIALIZED)


def with_argument(method: str, **changed: Any) -> Patch:
    """The library is called with another argument; a function makes it from the library."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = getattr(Core, method)

        def wrong(core: Core, *arguments: Any, **named: Any) -> Any:
            made = {name: value(core) if callable(value) else value for name, value in changed.items()}
            return right(core, *arguments, **(named | made))

        patch.setattr(Core, method, wrong)

    return apply


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """`owner.name` becomes `make(what it was)`."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def both(*patches: Patch) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        for one in patches:
            one(patch)

    return apply


def signals_of(cell_of: Callable[[Heap], torch.Tensor]) -> Callable[[Any], Any]:
    def make(_right: Any) -> Callable[[Heap], Signal]:
        def signal(heap: Heap) -> Signal:
            cell = cell_of(heap).view(torch.int64)
            return Signal(cell, heap.library.tensor_get_buffer(cell)[0])

        return signal

    return make


def in_one_allocation(heap: Heap) -> torch.Tensor:
    """Signals side by side, 8 bytes each."""
    shared = [tensor for tensor in heap._tensors if tensor.numel() == 8 * 99]
    whole = shared[0] if shared else heap.allocate(8 * 99).zero_()
    used = getattr(heap.library, "used", 0)
    heap.library.used = used + 1
    return whole[8 * used : 8 * used + 8]


def shared_lanes(right: Callable[[HostDispatcher], Any]) -> Callable[[HostDispatcher], Any]:
    """All micro-batches in the memory of the first."""

    def lane(dispatcher: HostDispatcher) -> Any:
        made = right(dispatcher)
        first = dispatcher.__dict__.setdefault("first", made)
        return replace(made, inboxes=first.inboxes)

    return lane


def before_close(act: Callable[[Heap], None]) -> Callable[[Any], Any]:
    def make(right: Callable[[Heap], None]) -> Callable[[Heap], None]:
        def close(heap: Heap) -> None:
            act(heap)
            right(heap)

        return close

    return make


def backwards_on_odd_ranks(heap: Heap) -> None:
    if heap.ep.rank % 2:
        heap._tensors.reverse()


def view_own(right: Callable[[Heap, torch.Tensor], list[int]]) -> Callable[[Heap, torch.Tensor], list[int]]:
    def addresses(heap: Heap, tensor: torch.Tensor) -> list[int]:
        heap.library.get_peer_tensor(tensor, heap.ep.rank)
        return right(heap, tensor)

    return addresses


def all_but_the_last(right: Callable[..., None]) -> Callable[..., None]:
    def wait(dispatcher: HostDispatcher, signals: list[Signal], number: int) -> None:
        right(dispatcher, signals[:-1], number)

    return wait


def half(right: Callable[..., None]) -> Callable[..., None]:
    def put(dispatcher: Any, target: torch.Tensor, source: torch.Tensor, *rest: Any) -> None:
        right(dispatcher, target, source[: source.numel() // 2], *rest)

    return put


def twice(right: Callable[[Core], None]) -> Callable[[Core], None]:
    def finalize(core: Core) -> None:
        right(core)
        right(core)

    return finalize


def one_size(spec: Any) -> tuple[int, ...]:
    return (spec.max_tokens,)


@dataclass(frozen=True)
class Wrong:
    """An adapter that breaks one clause. `passes`: it does its work where the clause is off. `says`: what is seen of
    it, if not an error that names the clause."""

    apply: Patch
    program: Callable[[Communicator, Nvshmem], None] = one_dispatch
    path: str = "host"
    passes: bool = True
    says: str = ""


NAN = "nan > "
WRONG = {
    "init_first": Wrong(replaced(Heap, "_start", lambda right: lambda heap: False)),
    "init_method": Wrong(with_argument("init", initializer_method="UID")),
    "init_uid": Wrong(with_argument("init", rank=None)),
    "one_uid": Wrong(with_argument("init", uid=Core.get_unique_id)),
    "same_size": Wrong(
        replaced(Heap, "signal", signals_of(lambda heap: heap.allocate(8 + 8 * heap.ep.rank)[:8].zero_()))
    ),
    "nothing_zeroed": Wrong(replaced(Heap, "signal", signals_of(lambda heap: heap.allocate(8))), says=NAN),
    "no_fp8": Wrong(
        replaced(
            Core, "tensor", lambda right: lambda core, shape, dtype: right(core, shape, torch.float8_e5m2).view(dtype)
        )
    ),
    "base_pointer": Wrong(replaced(Heap, "signal", signals_of(in_one_allocation))),
    "whole_allocation": Wrong(
        both(
            replaced(host, "sizes", lambda right: one_size),
            replaced(packing, "sizes", lambda right: one_size),
            replaced(HostDispatcher, "_put", half),
        ),
        few_bytes,
        says="half of each block",
    ),
    "stream": Wrong(with_argument("put_signal", stream=None)),
    "signal_buffer": Wrong(
        replaced(Heap, "signal", lambda right: lambda heap: replace(made := right(heap), buffer=made.cell))
    ),
    "late_data": Wrong(replaced(HostDispatcher, "_await", all_but_the_last), says=NAN),
    "in_flight": Wrong(replaced(HostDispatcher, "_lane", shared_lanes), two_at_once, says="not close"),
    "signal_comes": Wrong(
        replaced(HostDispatcher, "_await", lambda right: lambda self, signals, number: right(self, signals, number + 1))
    ),
    "limited_mpg": Wrong(replaced(Core, "init_status", unaware), one_gpu_for_all),
    "frozen_numbers": Wrong(lambda patch: None, captured_dispatch),
    "no_capture": Wrong(
        replaced(DeviceDispatcher, "_meet", lambda right: lambda self: self._heap.settle()), captured_dispatch, "device"
    ),
    "own_view": Wrong(replaced(Heap, "addresses", view_own), path="device", says="free_all:"),
    "mapped": Wrong(lambda patch: None, far_away, "device", says="has no address for the memory of ranks"),
    "freed_once": Wrong(replaced(Heap, "close", before_close(lambda heap: heap._tensors.append(heap._tensors[0])))),
    "same_free": Wrong(replaced(Heap, "close", before_close(backwards_on_odd_ranks))),
    "free_all": Wrong(replaced(Heap, "close", before_close(lambda heap: heap._tensors.__delitem__(0)))),
    "no_use_after_free": Wrong(lambda patch: None, after_close, passes=False),
    "finalize_once": Wrong(replaced(Core, "finalize", twice)),
}


@pytest.mark.parametrize("clause", [clause.name for clause in nvshmem_clauses()])
def test_the_clause_catches_a_wrong_adapter(clause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = WRONG[clause]
    if wrong.path == "device":
        monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    backend = Nvshmem(wrong.path, CASE)
    wrong.apply(monkeypatch)
    with pytest.raises(CommunicationError, match=wrong.says or f"{clause}: "):
        on_ranks(2, lambda ep: wrong.program(ep, backend))
    if wrong.passes:
        on_ranks(2, lambda ep: wrong.program(ep, replace(backend, without=(clause,))))


@pytest.mark.parametrize("program", [one_dispatch, two_at_once])
def test_the_right_adapter_passes_the_same_programs(program: Callable[[Communicator, Nvshmem], None]) -> None:
    on_ranks(2, lambda ep: program(ep, Nvshmem("host", CASE)))


def test_the_error_names_the_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    WRONG["stream"].apply(monkeypatch)
    with pytest.raises(CommunicationError, match=r"stream: put_signal with stream=None; .* \(core/rma\.py:108"):
        on_ranks(2, lambda ep: one_dispatch(ep, Nvshmem("host", CASE)))


def test_ranks_that_share_a_gpu_are_told_so() -> None:
    with pytest.raises(CommunicationError, match="several ranks share a GPU, and NVSHMEM's waits do not work there"):
        on_ranks(2, lambda ep: one_gpu_for_all(ep, Nvshmem("host", CASE)))
