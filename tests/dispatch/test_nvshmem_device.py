"""NVSHMEM's device path over its double: the kernels, interpreted, store into other ranks' memory for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_kernels import backends, put_rows

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Layout, Phase
from moe_runtime.dispatch.nvshmem import device
from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
from moe_runtime.errors import CommunicationError, ConfigError
from tests.dispatch import contract
from tests.dispatch.contract import Case, make_case
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.test_contract import on_ranks
from tests.dispatch.test_nvshmem import many_steps, random_case, steps_of
from tests.doubles.nvshmem import Core
from tests.kernels.far_double import FarMemory

LAYOUTS = [(Layout.GROUPED, 1), (Layout.GROUPED, 4), (Layout.PADDED, 1)]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle sums by the same kernels: those of torch fuse product and sum."""
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")


def cases(size: int) -> dict[str, Case]:
    few = [2, 0, 1, 3][:size]
    return {
        "uneven": make_case(ep=size, slots=2, top_k=2, tokens=few, padding=1, hidden=8),
        "one slot per rank": make_case(ep=size, slots=1, top_k=min(size, 3), tokens=few, spare_capacity=1, hidden=8),
        "one expert for all": make_case(ep=size, slots=2, top_k=1, tokens=few, only_slot=2 * size - 1, hidden=8),
        "fp16": make_case(ep=size, slots=2, top_k=2, tokens=few, dtype=torch.float16, hidden=8),
        "all empty": make_case(ep=size, slots=2, top_k=2, tokens=[0] * size, hidden=8),
    }


@pytest.mark.parametrize(("layout", "alignment"), LAYOUTS)
@pytest.mark.parametrize(
    ("size", "name"),
    [(1, "uneven"), (2, "one expert for all"), (2, "fp16"), (2, "all empty"), (4, "uneven"), (4, "one slot per rank")],
)
def test_laws_hold(size: int, name: str, layout: Layout, alignment: int) -> None:
    case = cases(size)[name]
    backend: Any = Nvshmem("device", case, layout, alignment)

    def program(ep: Communicator) -> None:
        if size < 4:
            contract.check_marked_experts(ep, backend, case)
        contract.check_origin_of_rows(ep, backend, case)

    on_ranks(size, program)


@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(seed: int) -> None:
    case = random_case(seed + 20, 3)
    backend: Any = Nvshmem("device", case, *LAYOUTS[seed % 3])

    def program(ep: Communicator) -> None:
        dispatcher = backend.make(ep, case.slots)
        y = contract.through(dispatcher, case, ep.rank, contract.marked)
        contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), f"rank {ep.rank}")

    on_ranks(case.ep, program)


def test_eight_ranks() -> None:
    case = make_case(ep=8, slots=1, top_k=2, tokens=[1, 0, 1, 1, 2, 0, 1, 1], hidden=8)
    dispatcher_of: Any = Nvshmem("device", case)

    def program(ep: Communicator) -> None:
        dispatcher = dispatcher_of.make(ep, 1)
        y = contract.through(dispatcher, case, ep.rank, contract.marked)
        contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), f"rank {ep.rank}")

    on_ranks(8, program)


def test_identity_and_two_in_flight() -> None:
    case = make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], padding=1, hidden=8)
    backend: Any = Nvshmem("device", case, in_flight=2)

    def program(ep: Communicator) -> None:
        contract.check_identity_experts(ep, backend, case)
        contract.check_two_in_flight(ep, backend, case)

    on_ranks(2, program)


@pytest.mark.parametrize("seed", range(2))
def test_ranks_may_run_ahead(seed: int) -> None:
    """Bitwise `local`, whoever goes first."""
    steps = steps_of(3)[:3]
    backend = Nvshmem("device", replace(steps[0], capacity=4), Layout.GROUPED, 2, in_flight=2)
    on_ranks(3, lambda ep: many_steps(ep, backend, steps, seed))


def without_meeting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceDispatcher, "_meet", lambda self: None)


def one_block_for_all(patch: pytest.MonkeyPatch) -> None:
    right = DeviceDispatcher._lane
    patch.setattr(DeviceDispatcher, "_lane", lambda self: self.__dict__.setdefault("lane", right(self)))


def weights_of_nobody(patch: pytest.MonkeyPatch) -> None:
    right = put_rows.pull

    def pull(peers: Any, slots: Any, row_of: Any, weights: Any, **named: Any) -> Any:
        return right(peers, slots, row_of, weights.flip(1), **named)

    patch.setattr(put_rows, "pull", pull)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (without_meeting, "have not come to dispatch 1"),
        (one_block_for_all, "values differ"),
        (weights_of_nobody, "differ"),
    ],
)
def test_a_wrong_adapter_is_caught(wrong: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(2)[1:2]
    backend = Nvshmem("device", steps[0], in_flight=2)
    wrong(monkeypatch)
    with pytest.raises(CommunicationError, match=says):
        on_ranks(2, lambda ep: many_steps(ep, backend, steps, 0))


def test_a_dispatch_that_was_dropped_harms_no_other() -> None:
    """Rows that nobody combined are overwritten by those of the next dispatch, which waits for all ranks."""
    case = make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], hidden=8)

    def program(ep: Communicator) -> None:
        dispatcher = Nvshmem("device", case).make(ep, 2)
        dispatcher.dispatch_begin(-case.x[ep.rank], case.routing[ep.rank], case.step).wait()
        y = contract.through(dispatcher, case, ep.rank, contract.marked)
        contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), "after a dropped one")

    on_ranks(2, program)


@pytest.mark.parametrize("phase", list(Phase))
def test_no_call_that_a_capture_forbids(phase: Phase) -> None:
    """Steps of every phase stay on the device: the library is asked for nothing, and no number is the host's."""
    case = replace(make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], hidden=8), phase=phase)

    def program(ep: Communicator) -> None:
        backend = Nvshmem("device", case)
        core = backend.core(ep)
        dispatcher = backend.make_with(core, ep)
        with core.capturing():
            y = contract.through(dispatcher, case, ep.rank, contract.marked)
        contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), str(phase))

    on_ranks(2, program)


NODES = [[0, 1], [2, 3]]


def test_ranks_out_of_reach_are_named() -> None:
    case = make_case(ep=4, slots=1, top_k=1, tokens=[1] * 4)

    def program(ep: Communicator) -> None:
        node = ep.rank // 2
        core = Core(ep, reach=lambda rank: rank // 2 == node)
        text = rf"rank {ep.rank} has no address for the memory of ranks \[{NODES[1 - node][0]}, {NODES[1 - node][1]}\]"
        with pytest.raises(ConfigError, match=text):
            DeviceDispatcher(ep, Nvshmem("device", case).spec(4), library=core, group=None)

    on_ranks(4, program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_nodes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of the other node are reached by NVSHMEM's device functions alone, with the same bits."""
    monkeypatch.setattr(device, "find_bitcode", lambda: Path("libnvshmem_device.bc"))
    case = make_case(ep=4, slots=2, top_k=3, tokens=[2, 1, 0, 2], padding=1, hidden=8, dtype=dtype)
    memory = FarMemory([])
    memory.install(monkeypatch)

    def program(ep: Communicator) -> None:
        node = ep.rank // 2
        core = Core(ep, reach=lambda rank: rank // 2 == node)
        dispatcher = Nvshmem("device", case).make_with(core, ep)
        if ep.rank == 0:
            largest = max(core.allocations, key=lambda allocation: allocation.size)
            memory.blocks = [part for rank in range(4) if (part := largest.part(rank)) is not None]
        ep.barrier()
        for _ in range(2):
            y = contract.through(dispatcher, case, ep.rank, contract.marked)
            contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), f"rank {ep.rank}")
        dispatcher.close()

    on_ranks(4, program)
    assert memory.calls
