"""The schedule of micro-batches: turns in one order, the layer's results unchanged, errors closing all."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.overlap import Stage, Stages, interleave, run_through
from tests.dispatch import contract
from tests.dispatch.contract import BACKENDS, Case, make_case
from tests.dispatch.test_contract import on_ranks

D, C = Stage.DISPATCH, Stage.COMBINE


def program(name: str, stages: list[Stage], told: list[str]) -> Stages[str]:
    try:
        for stage in stages:
            told.append(f"{name} begins {stage}")
            yield stage
            told.append(f"{name} has {stage}")
    finally:
        told.append(f"{name} ends")
    return name


def test_one_runs_while_the_other_waits() -> None:
    told: list[str] = []
    seen: list[tuple[int, Stage | None]] = []
    found = interleave([program("a", [D, C], told), program("b", [D, C], told)], lambda *turn: seen.append(turn))
    assert found == ["a", "b"]
    assert seen == [(0, D), (1, D), (0, C), (1, C), (0, None), (1, None)]
    begun = [text for text in told if "begins" in text]
    assert begun == ["a begins dispatch", "b begins dispatch", "a begins combine", "b begins combine"]
    assert told.index("b begins dispatch") < told.index("a has dispatch")


def test_one_alone_runs_through() -> None:
    assert run_through(program("a", [D, C, D, C], [])) == "a"
    assert interleave([program(name, [D], []) for name in "abc"]) == ["a", "b", "c"]
    assert interleave([program("a", [], []), program("b", [D], [])]) == ["a", "b"], "an empty one too"


def test_an_error_closes_the_others() -> None:
    told: list[str] = []

    def fails() -> Stages[str]:
        yield D
        raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        interleave([program("a", [D, C], told), fails()])
    assert told[-1] == "a ends"


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.alignment == 1], ids=str)
def test_interleaved_dispatches_give_what_they_give_alone(backend: contract.Backend) -> None:
    """Several layers of two micro-batches through one dispatcher, the second one empty on some ranks."""
    size = 1 if backend.name == "local" else 4
    cases = [
        make_case(ep=size, slots=2, top_k=2, tokens=[3] * size, seed=1),
        make_case(ep=size, slots=2, top_k=2, tokens=[2 if r % 2 else 0 for r in range(size)], seed=2),
    ]

    def rank_program(ep: Communicator) -> None:
        dispatcher = backend.make(ep, 2)

        def layers(case: Case) -> Stages[list[torch.Tensor]]:
            found = []
            for _ in range(3):
                arriving = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step)
                yield Stage.DISPATCH
                rows, handle = arriving.wait()
                y = contract.run_experts(rows, contract.marked, first_slot=2 * ep.rank)
                returning = dispatcher.combine_begin(y, handle)
                yield Stage.COMBINE
                found.append(returning.wait())
            return found

        for case, outputs in zip(cases, interleave([layers(case) for case in cases]), strict=True):
            for y in outputs:
                contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), str(backend))

    on_ranks(size, rank_program)
