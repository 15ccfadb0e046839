"""DeepEP V2's adapter over its double, every clause and hazard on, against the laws in contract.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.experts import prepare_experts
from moe_kernels.quant import quantize_blocks, quantize_rows
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, GroupedRows, Phase
from moe_runtime.dispatch.deep_ep.elastic import ElasticDispatcher
from moe_runtime.dispatch.local import LocalDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.errors import ConfigError
from moe_runtime.layers.experts import Experts
from moe_runtime.types import NOWHERE
from tests.dispatch import contract
from tests.dispatch.contract import Case, make_case
from tests.dispatch.elastic_adapters import CompactDispatcher, Elastic, spec_for
from tests.dispatch.test_contract import on_ranks
from tests.doubles.deep_ep.elastic import Library
from tests.doubles.fabric_group import FabricGroup

PHASES = pytest.mark.parametrize("phase", [Phase.MIXED, Phase.DECODE])


def bf16_case(**arguments: Any) -> Case:
    return make_case(**{"hidden": 256, "dtype": torch.bfloat16, **arguments})


def cases(size: int) -> dict[str, Case]:
    k = min(3, size * 2)
    found = {
        "uneven, hidden padded": bf16_case(
            ep=size, slots=3, top_k=k, tokens=[(5 * r + 1) % 7 for r in range(size)], hidden=192
        ),
        "padding": bf16_case(ep=size, slots=2, top_k=k, tokens=[3] * size, padding=2, spare_capacity=3),
        "one rank full": bf16_case(ep=size, slots=1, top_k=1, tokens=[4] + [0] * (size - 1), only_slot=size - 1),
        "all empty": bf16_case(ep=size, slots=2, top_k=k, tokens=[0] * size),
    }
    return found if size < 32 else dict(list(found.items())[:2])


def check(ep: Communicator, backend: Any, case: Case) -> None:
    contract.check_marked_experts(ep, backend, case)
    contract.check_origin_of_rows(ep, backend, case)


@PHASES
@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_laws_hold(size: int, phase: Phase) -> None:
    for name, case in cases(size).items():
        library, case = Library(), replace(case, phase=phase)
        for alignment in (1, 4) if size < 32 else (4,):
            backend = Elastic(spec_for(case, alignment=alignment), library)
            try:
                on_ranks(size, lambda ep, backend=backend, case=case: check(ep, backend, case))  # type: ignore[misc]
            except Exception as error:
                error.add_note(f"case: {name}, alignment {alignment}")
                raise
        library.check_end()


@PHASES
def test_320_ranks(phase: Phase) -> None:
    case = replace(bf16_case(ep=320, slots=1, top_k=8, tokens=[r % 3 for r in range(320)]), phase=phase)
    backend = Elastic(spec_for(case), Library())

    def program(ep: Communicator) -> None:
        dispatcher, routing = backend.make(ep, 1), case.routing[ep.rank]
        y = contract.through(dispatcher, case, ep.rank, contract.marked)
        terms = [
            w.unsqueeze(1) * contract.marked(case.x[ep.rank].float(), ids.unsqueeze(1))  # type: ignore[arg-type]
            for ids, w in zip(routing.expert_ids.unbind(1), routing.weights.unbind(1), strict=True)
        ]
        contract.assert_law(dispatcher, y, torch.stack(terms).sum(0).bfloat16(), f"rank {ep.rank}")

    on_ranks(320, program)


@PHASES
@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_laws_hold_between_nodes(nodes: int, phase: Phase) -> None:
    """A node's sums are rounded once more on their way."""
    case = replace(bf16_case(ep=8, slots=2, top_k=8, tokens=[3, 0, 5, 2] * 2, padding=1), phase=phase)
    backend = Elastic(spec_for(case), Library(nodes=nodes))
    on_ranks(8, lambda ep: check(ep, backend, case))


@PHASES
def test_identity_experts_return_x(phase: Phase) -> None:
    case = bf16_case(ep=4, slots=2, top_k=3, tokens=[4] * 4, padding=1)
    backend = Elastic(spec_for(case), Library())

    def program(ep: Communicator) -> None:
        dispatcher = backend.make(ep, 2)
        y = contract.through(dispatcher, replace(case, phase=phase), ep.rank, contract.identity)
        absent = case.routing[ep.rank].expert_ids[:, 0] == NOWHERE
        contract.assert_law(dispatcher, y[~absent], case.x[ep.rank][~absent], "identity")
        assert not y[absent].any()

    on_ranks(4, program)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    size, slots = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    case = bf16_case(
        ep=size,
        slots=slots,
        top_k=data.draw(st.integers(1, min(9, size * slots))),
        tokens=data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)),
        hidden=data.draw(st.sampled_from([2, 40, 256])),
        seed=data.draw(st.integers(0, 1000)),
        padding=data.draw(st.integers(0, 3)),
        spare_capacity=data.draw(st.integers(0, 2)),
    )
    case = replace(case, phase=data.draw(st.sampled_from(list(Phase))))
    kind = data.draw(st.sampled_from([ElasticDispatcher, CompactDispatcher]))
    if kind is CompactDispatcher and case.x[0].shape[1] != 256:
        kind = ElasticDispatcher  # the other form is there for its clauses: it pads nothing
    library = Library(seed=data.draw(st.integers(0, 9)))
    backend = Elastic(spec_for(case, alignment=data.draw(st.sampled_from([1, 2, 8]))), library, kind)
    on_ranks(size, lambda ep: check(ep, backend, case))
    library.check_end()


@PHASES
def test_the_order_of_arrival_changes_no_bit(phase: Phase) -> None:
    case = replace(bf16_case(ep=4, slots=2, top_k=4, tokens=[6, 3, 5, 4]), phase=phase)
    outputs, orders = [], []
    for seed in (0, 0, 1, 2):
        backend = Elastic(spec_for(case), Library(seed=seed))

        def program(ep: Communicator, backend: Elastic = backend) -> tuple[Tensor, Tensor]:
            dispatcher = backend.make(ep, 2)
            rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
            y = contract.run_experts(rows, contract.marked, first_slot=2 * ep.rank)
            return rows.data.nan_to_num(), dispatcher.combine_begin(y, handle).wait()

        found: Any = on_ranks(4, program)
        orders.append(torch.cat([rows for rows, _ in found]))
        outputs.append(torch.cat([y for _, y in found]))
    assert torch.equal(orders[0], orders[1]), "the same seed"
    assert not torch.equal(orders[0], orders[2]), "another order"
    assert all(torch.equal(outputs[0], y) for y in outputs)


@PHASES
def test_two_micro_batches_in_flight(phase: Phase) -> None:
    case = bf16_case(ep=4, slots=2, top_k=2, tokens=[3, 0, 2, 1])
    backend = Elastic(spec_for(case), Library())

    def program(ep: Communicator) -> None:
        dispatcher, x, routing = backend.make(ep, 2), case.x[ep.rank], case.routing[ep.rank]
        begun = [
            dispatcher.dispatch_begin(part, routing, DispatchStep(case.capacity, phase, index))
            for index, part in enumerate((x, -x))
        ]
        arrived = [pending.wait() for pending in begun]
        returning = [
            dispatcher.combine_begin(contract.run_experts(rows, contract.identity, first_slot=0), handle)
            for rows, handle in arrived
        ]
        first, second = (pending.wait() for pending in returning)
        assert torch.equal(first, -second)
        contract.assert_law(dispatcher, first, contract.oracle(case, ep.rank, contract.identity), "in flight")

    on_ranks(4, program)


@PHASES
@pytest.mark.parametrize("hidden", [192, 256])
def test_fp8_rows_are_what_the_experts_would_have_made(hidden: int, phase: Phase) -> None:
    """Quantised before they travel: the bytes and scales of rows quantised where they arrive."""
    case = replace(bf16_case(ep=2, slots=2, top_k=2, tokens=[5, 3], hidden=hidden), phase=phase)

    def program(ep: Communicator, backend: Elastic) -> GroupedRows:
        dispatcher = backend.make(ep, 2)
        rows, _ = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
        assert isinstance(rows, GroupedRows)
        return rows

    found: list[Any] = []
    for quantize in (True, False):
        backend = Elastic(spec_for(case, quantize=quantize), Library())
        found.append(on_ranks(2, lambda ep, backend=backend: program(ep, backend)))  # type: ignore[misc]
    for narrow, wide in zip(*found, strict=True):
        assert torch.equal(narrow.psum, wide.psum)
        assert narrow.data.is_contiguous()
        assert narrow.data.shape[1] == hidden
        assert narrow.scales.stride(0) == 1
        assert narrow.scales.stride(1) % 4 == 0, "as TMA wants them"
        for values, scales, plain in zip(
            contract.slot_rows(narrow),
            contract.slot_rows(replace(narrow, data=narrow.scales)),
            contract.slot_rows(wide),
            strict=True,
        ):
            want = quantize_rows(plain)
            assert torch.equal(values.view(torch.uint8), want.data.view(torch.uint8))
            assert torch.equal(scales, want.scale)


@PHASES
@pytest.mark.parametrize("quantize", [False, True])
def test_real_experts_weigh_their_rows(quantize: bool, phase: Phase) -> None:
    """NaN in gaps and past the count reaches no one; weights are multiplied in once."""
    case = replace(bf16_case(ep=2, slots=2, top_k=2, tokens=[4, 3], padding=1), phase=phase)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(4, *shape, generator=generator) / 16 for shape in ((256, 256), (256, 128))]

    def experts(slots: slice) -> Experts:
        made = [w[slots].contiguous() for w in weights]
        if quantize:
            return Experts(prepare_experts(*(quantize_blocks(w) for w in made)))
        return Experts(prepare_experts(*(w.bfloat16() for w in made)))

    backend = Elastic(spec_for(case, quantize=quantize), Library())

    def program(ep: Communicator) -> None:
        dispatcher, x, routing = backend.make(ep, 2), case.x[ep.rank], case.routing[ep.rank]
        rows, handle = dispatcher.dispatch_begin(x, routing, case.step).wait()
        y = dispatcher.combine_begin(experts(slice(2 * ep.rank, 2 * ep.rank + 2))(rows), handle).wait()
        local = LocalDispatcher(RowLayout(4))
        rows, own = local.dispatch_begin(x, routing, case.step).wait()
        if quantize:
            narrow = quantize_rows(rows.data)
            rows = replace(rows, data=narrow.data, scales=narrow.scale)
        contract.assert_law(dispatcher, y, local.combine_begin(experts(slice(None))(rows), own).wait(), "experts")

    on_ranks(2, program)


def test_what_the_adapter_refuses() -> None:
    case = bf16_case(ep=1, slots=2, top_k=1, tokens=[3])
    spec = spec_for(case)

    def program(ep: Communicator) -> None:
        with pytest.raises(ConfigError, match=r"dispatch=deep_ep: tokens are torch.float32.*Set dtype=bfloat16"):
            ElasticDispatcher(ep, replace(spec, dtype=torch.float32), library=Library(), group=FabricGroup(ep))
        dispatcher = Elastic(spec, Library()).make(ep, 2)
        with pytest.raises(AssertionError, match="3 tokens exceed the agreed capacity 2"):
            dispatcher.dispatch_begin(case.x[0], case.routing[0], DispatchStep(2, Phase.DECODE))
        with pytest.raises(AssertionError, match="a step of 5 tokens, a buffer for 4"):
            dispatcher.dispatch_begin(case.x[0], case.routing[0], DispatchStep(5, Phase.MIXED))
        with pytest.raises(AssertionError, match=r"x is torch.float32"):
            dispatcher.dispatch_begin(case.x[0].float(), case.routing[0], DispatchStep(3, Phase.MIXED))

    on_ranks(1, program)
