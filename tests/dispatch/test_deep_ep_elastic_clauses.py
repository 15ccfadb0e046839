"""Each clause of the double of DeepEP V2 catches an adapter that breaks it, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, Phase
from moe_runtime.dispatch.deep_ep import elastic, elastic_sizes
from moe_runtime.dispatch.deep_ep.elastic import ElasticDispatcher
from moe_runtime.errors import CommunicationError
from tests.dispatch import contract
from tests.dispatch.elastic_adapters import Bent, CompactDispatcher, Elastic, spec_for, to
from tests.dispatch.elastic_wrong import WRONG, Dequantizing, Wrong, bf16_case, exact_case
from tests.dispatch.test_contract import on_ranks
from tests.doubles.clauses import ContractError
from tests.doubles.deep_ep.elastic import Library
from tests.doubles.deep_ep.elastic_clauses import clauses
from tests.doubles.fabric_group import FabricGroup

BY_SIZE = {
    "room_for_ranks",
    "room_for_experts",
    "room_for_experts_of_a_rank",
    "lanes_for_topk",
    "row_bytes",
    "combine_hidden",
    "compiled_for_capacity",
}
"""Clauses with a test of their own below."""


def run(wrong: Wrong, *off: str) -> None:
    """The contract's programs with this adapter, and these clauses off."""
    library = Library(nodes=wrong.nodes)
    bent = Bent(library, made=wrong.made, dispatched=wrong.dispatched, combined=wrong.combined, after=wrong.after)
    case = replace(wrong.case(), phase=wrong.phase)
    spec = spec_for(case, alignment=wrong.alignment, quantize=wrong.quantize, max_tokens=wrong.max_tokens)
    backend: Any = Elastic(spec, bent, wrong.kind, wrong.network)

    def program(ep: Communicator) -> None:
        with wrong.around(library):
            contract.check_marked_experts(ep, backend, case)
            if wrong.origins:
                contract.check_origin_of_rows(ep, backend, case)

    with library.clauses.without(*off, *wrong.also_off):
        try:
            on_ranks(case.ep, program)
        except CommunicationError as error:
            raise error.__cause__ or error from None
        library.check_end()


def test_every_clause_has_its_wrong_adapter() -> None:
    assert {clause.name for clause in clauses()} == set(WRONG) | BY_SIZE


@pytest.mark.parametrize("name", WRONG)
def test_the_clause_catches_its_wrong_adapter(name: str) -> None:
    wrong = WRONG[name]
    with pytest.raises(Exception) as caught:
        run(wrong)
    if wrong.hazard:
        assert not isinstance(caught.value, ContractError), "results are wrong; nothing is refused"
    else:
        assert isinstance(caught.value, ContractError)
        assert caught.value.clause.name == name
    if wrong.recovers:
        run(wrong, name)


@pytest.mark.parametrize("phase", [Phase.MIXED, Phase.DECODE])
@pytest.mark.parametrize("kind", [ElasticDispatcher, CompactDispatcher])
def test_right_adapters_pass_with_every_clause_on(kind: type[ElasticDispatcher], phase: Phase) -> None:
    run(Wrong(kind=kind, phase=phase))


@pytest.mark.parametrize("phase", [Phase.MIXED, Phase.DECODE])
@pytest.mark.parametrize(("quantize", "hidden"), [(False, 192), (False, 256), (True, 256)])
def test_events_cover_what_the_adapter_writes(quantize: bool, hidden: int, phase: Phase) -> None:
    """Padded and quantised inputs, and padded results: written before the event that the library waits for."""
    run(
        Wrong(
            kind=Dequantizing if quantize else ElasticDispatcher,
            case=lambda: bf16_case(ep=1, hidden=hidden) if not quantize else exact_case(ep=1),
            phase=phase,
            quantize=quantize,
            origins=not quantize,
            around=lambda library: library.watching(),
        )
    )


@pytest.mark.parametrize(
    ("clause", "sizes"),
    [
        ("room_for_experts", {"ep": 16, "slots": 129, "top_k": 2}),
        ("room_for_experts_of_a_rank", {"ep": 2, "slots": 257, "top_k": 2}),
        ("lanes_for_topk", {"ep": 2, "slots": 20, "top_k": 33}),
    ],
)
def test_an_adapter_that_forgot_a_limit(clause: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = Wrong(case=lambda: bf16_case(**sizes, tokens=1))
    with pytest.raises(Exception, match="has room for"):
        run(forgetful)
    monkeypatch.setattr(elastic, "unfit", lambda spec: None)
    with pytest.raises(ContractError, match=clause):
        run(forgetful)
    run(forgetful, clause)


def test_an_adapter_that_forgot_the_limit_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    many: Any = SimpleNamespace(size=1025, rank=0, barrier=lambda: None)
    spec = replace(spec_for(bf16_case()), ep=1025)
    monkeypatch.setattr(elastic, "unfit", lambda spec: None)
    library = Library()
    with pytest.raises(ContractError, match="room_for_ranks"):
        ElasticDispatcher(many, spec, library=library, group=FabricGroup(many))
    with library.clauses.without("room_for_ranks"):
        ElasticDispatcher(many, spec, library=library, group=FabricGroup(many))


@pytest.mark.parametrize(
    ("clause", "other", "multiple"), [("row_bytes", "combine_hidden", 8), ("combine_hidden", "row_bytes", 16)]
)
def test_an_adapter_that_pads_too_little(
    clause: str, other: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = contract.make_case(ep=2, slots=2, top_k=2, tokens=[3, 2], hidden=40, dtype=torch.bfloat16)
    monkeypatch.setattr(elastic_sizes, "HIDDEN_MULTIPLE", multiple)
    with pytest.raises(ContractError, match=clause):
        run(Wrong(case=lambda: narrow))
    run(Wrong(case=lambda: narrow), clause, other)


def test_every_capacity_is_compiled_for() -> None:
    """Decode steps of 1 to 4 tokens: the adapter has one set of kernels, one that passes the step's capacity four."""

    def builds(bent: Any) -> int:
        case = bf16_case(ep=1, tokens=4)

        def program(ep: Communicator) -> None:
            dispatcher = Elastic(spec_for(case), bent).make(ep, case.slots)
            for tokens in range(1, 5):
                few = replace(case.routing[0], expert_ids=case.routing[0].expert_ids[:tokens])
                few = replace(few, weights=few.weights[:tokens])
                step = DispatchStep(tokens, Phase.DECODE)
                rows, handle = dispatcher.dispatch_begin(case.x[0][:tokens], few, step).wait()
                dispatcher.combine_begin(rows.data, handle).wait()

        on_ranks(1, program)
        return len(bent.library.jit_builds)

    by_step = Bent(Library(), dispatched=lambda call, rank: {**call, "num_max_tokens_per_rank": len(call["x"])})
    assert builds(Bent(Library())) == 3
    assert builds(by_step) == 12
    library = Library()
    with library.clauses.without("compiled_for_capacity"):
        assert builds(Bent(library, dispatched=to())) == 0
