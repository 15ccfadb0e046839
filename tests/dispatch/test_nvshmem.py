"""NVSHMEM's host path over its double: the laws, in whatever order ranks go on."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, Layout, Phase
from tests.dispatch import contract
from tests.dispatch.contract import Case, make_case
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.test_contract import on_ranks
from tests.doubles.nvshmem import Core
from tests.doubles.nvshmem.schedule import Shuffled

LAYOUTS = [(Layout.GROUPED, 1), (Layout.GROUPED, 4), (Layout.PADDED, 1)]


def cases(size: int) -> dict[str, Case]:
    k = min(2, size * 2)
    return {
        "uneven": make_case(ep=size, slots=3, top_k=3, tokens=[(5 * r + 1) % 7 for r in range(size)], padding=1),
        "one slot per rank": make_case(ep=size, slots=1, top_k=min(size, 4), tokens=[2] * size, spare_capacity=2),
        "all empty": make_case(ep=size, slots=2, top_k=k, tokens=[0] * size),
        "one expert for all": make_case(ep=size, slots=2, top_k=1, tokens=[3] * size, only_slot=2 * size - 1),
        "bf16": make_case(ep=size, slots=2, top_k=k, tokens=[3] * size, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize(("layout", "alignment"), LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_laws_hold(size: int, layout: Layout, alignment: int) -> None:
    everything = list(cases(size).items())

    def program(ep: Communicator) -> None:
        for name, case in everything:
            try:
                backend: Any = Nvshmem("host", case, layout, alignment)
                contract.check_marked_experts(ep, backend, case)
                contract.check_identity_experts(ep, backend, case)
                contract.check_origin_of_rows(ep, backend, case)
            except AssertionError as error:
                error.add_note(f"case: {name}")
                raise

    on_ranks(size, program)


def random_case(seed: int, most: int) -> Case:
    """A mesh, slots, a routing and numbers of tokens drawn from `seed`."""
    draw = random.Random(seed)
    size, slots = draw.randint(1, most), draw.randint(1, 3)
    case = make_case(
        ep=size,
        slots=slots,
        top_k=draw.randint(1, min(4, size * slots)),
        tokens=[draw.randint(0, 4) for _ in range(size)],
        hidden=draw.choice([4, 6, 10]),
        seed=seed,
        padding=draw.randint(0, 1),
        spare_capacity=draw.randint(0, 2),
    )
    return replace(case, phase=draw.choice(list(Phase)))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int) -> None:
    case = random_case(seed, 6)
    backend: Any = Nvshmem("host", case, *LAYOUTS[seed % 3])

    def program(ep: Communicator) -> None:
        contract.check_marked_experts(ep, backend, case)
        contract.check_origin_of_rows(ep, backend, case)

    on_ranks(case.ep, program)


def test_as_many_ranks_as_it_takes() -> None:
    case = make_case(ep=32, slots=1, top_k=4, tokens=[r % 3 for r in range(32)], hidden=8)
    backend: Any = Nvshmem("host", case)
    on_ranks(32, lambda ep: contract.check_marked_experts(ep, backend, case))


def test_two_micro_batches_in_flight() -> None:
    case = make_case(ep=4, slots=2, top_k=2, tokens=[3] * 4)
    backend: Any = Nvshmem("host", case, in_flight=2)
    on_ranks(4, lambda ep: contract.check_two_in_flight(ep, backend, case))


def many_steps(ep: Communicator, backend: Nvshmem, steps: list[Case], seed: int) -> list[list[torch.Tensor]]:
    """Every step twice over, micro-batches interleaved, while ranks run ahead of each other; the results."""
    shuffled: Any = Shuffled(ep, seed)
    dispatcher = backend.make(shuffled, steps[0].slots)
    outputs = []
    for case in steps:
        x, routing = case.x[ep.rank], case.routing[ep.rank]
        first_slot = ep.rank * case.slots
        begun = [
            dispatcher.dispatch_begin(x * (i + 1), routing, DispatchStep(case.capacity, case.phase, i))
            for i in range(backend.in_flight)
        ]
        arrived = [pending.wait() for pending in begun]
        returning = [
            dispatcher.combine_begin(contract.run_experts(rows, contract.marked, first_slot=first_slot), handle)
            for rows, handle in arrived
        ]
        outputs.append([pending.wait() for pending in returning])
    dispatcher.close()
    shuffled.finish()
    for case, results in zip(steps, outputs, strict=True):
        for i, y in enumerate(results):
            scaled = replace(case, x=[x * (i + 1) for x in case.x])
            contract.assert_law(dispatcher, y, contract.oracle(scaled, ep.rank, contract.marked), f"{case.phase}, {i}")
    return outputs


def steps_of(size: int) -> list[Case]:
    """Prompt and decode steps of one shape, with other tokens on each rank in each."""
    return [
        replace(
            make_case(ep=size, slots=2, top_k=2, tokens=[(r + i) % 3 for r in range(size)], seed=i),
            capacity=4 if i % 2 else 2,
            phase=Phase.MIXED if i % 2 else Phase.DECODE,
        )
        for i in range(6)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_may_run_ahead(seed: int) -> None:
    """And the bits do not depend on who did."""
    steps = steps_of(3)
    backend = Nvshmem("host", replace(steps[0], capacity=4), in_flight=2)
    seen = on_ranks(3, lambda ep: many_steps(ep, backend, steps, seed))
    again = on_ranks(3, lambda ep: many_steps(ep, backend, steps, seed + 100))
    for one, other in zip(seen, again, strict=True):
        for a, b in zip(one, other, strict=True):  # type: ignore[call-overload]
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_decode_step_moves_decode_blocks() -> None:
    """A put moves whole allocations, so those of a decode step are small."""

    def program(ep: Communicator) -> dict[str, int]:
        case = make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], spare_capacity=6)
        backend = Nvshmem("host", case)
        core = backend.core(ep)
        dispatcher, moved = backend.make_with(core, ep), {}
        for name, capacity in (("mixed", 8), ("decode", 2)):
            before = core.bytes_put
            contract.through(dispatcher, replace(case, capacity=capacity), ep.rank, contract.identity)
            moved[name] = core.bytes_put - before
        return moved

    for moved in on_ranks(2, program):
        assert moved == {"mixed": 2 * 8 * (80 + 64), "decode": 2 * 4 * (80 + 64)}


def test_a_dispatch_that_was_not_combined_is_refused() -> None:
    case = make_case(ep=1, slots=2, top_k=2, tokens=[2])

    def program(ep: Communicator) -> None:
        dispatcher = Nvshmem("host", case).make(ep, 2)
        dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step).wait()
        with pytest.raises(AssertionError, match="was not combined"):
            dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step)

    on_ranks(1, program)


def test_a_second_heap_uses_what_runs_and_leaves_it_running() -> None:
    case = make_case(ep=2, slots=2, top_k=2, tokens=[2, 1])

    def program(ep: Communicator) -> None:
        backend = Nvshmem("host", case)
        core: Core = backend.core(ep)
        first, second = backend.make_with(core, ep), backend.make_with(core, ep)
        second.close()
        assert core.init_status() is core.InitStatus.STATUS_IS_INITIALIZED
        contract.assert_law(
            first,
            contract.through(first, case, ep.rank, contract.marked),
            contract.oracle(case, ep.rank, contract.marked),
            "",
        )
        first.close()
        first.close()
        assert core.init_status() is core.InitStatus.STATUS_IS_BOOTSTRAPPED

    on_ranks(2, program)
