"""DeepEP V1's adapter over its double: the laws in both phases, sizes, both modes in one buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.experts import expert_mlp_padded, prepare_experts
from moe_kernels.quant import dequantize, quantize_blocks
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import DispatchStep, Layout, PaddedRows, Phase
from moe_runtime.dispatch.deep_ep.legacy_low_latency import TOLERANCE
from moe_runtime.errors import CommunicationError
from moe_runtime.types import NOWHERE
from tests.dispatch import contract
from tests.dispatch.contract import Case, make_case
from tests.dispatch.legacy_fabric import Fabric, bf16_case, on_ranks
from tests.doubles.deep_ep.legacy import Library

MIXED, DECODE = Phase.MIXED, Phase.DECODE
BOTH = pytest.mark.parametrize("phase", [MIXED, DECODE], ids=str)


def cases(size: int, phase: Phase, hidden: int = 16) -> dict[str, Case]:
    """Shapes that have broken dispatchers, at `size` ranks."""
    k, last = min(2, size * 2), size - 1
    tokens = {
        "even": [3] * size,
        "uneven": [(5 * r + 1) % 7 for r in range(size)],
        "some ranks empty": [0 if r % 2 else 4 for r in range(size)],
        "one rank full": [6 if r == last else 0 for r in range(size)],
        "all empty": [0] * size,
    }
    common: dict[str, Any] = {"ep": size, "hidden": hidden, "dtype": torch.bfloat16}
    found = {name: make_case(slots=2, top_k=k, tokens=counts, **common) for name, counts in tokens.items()}
    found["padding"] = make_case(slots=3, top_k=3, tokens=[4] * size, padding=2, **common)
    found["padding only"] = make_case(slots=2, top_k=k, tokens=[2] * size, padding=2, spare_capacity=3, **common)
    found["one slot for all"] = make_case(slots=2, top_k=1, tokens=[3] * size, only_slot=2 * size - 1, **common)
    return {name: replace(case, phase=phase) for name, case in found.items()}


@pytest.mark.parametrize(
    ("size", "phase"),
    [*((n, MIXED) for n in (2, 4, 8, 16, 24)), *((n, DECODE) for n in (2, 3, 4, 8, 16, 32))],
    ids=str,
)
def test_laws_hold(size: int, phase: Phase) -> None:
    """Equal to `local` within the bound, and each row where it should be. V1 has no kernels for one rank."""
    everything = {name: Fabric(case=case, alignment=4) for name, case in cases(size, phase).items()}
    if size > 8:
        everything = {name: everything[name] for name in ("uneven", "one rank full", "padding")}

    def program(ep: Communicator) -> None:
        for name, fabric in everything.items():
            try:
                contract.check_marked_experts(ep, fabric, fabric.case)
                contract.check_origin_of_rows(ep, fabric, fabric.case)
            except AssertionError as error:
                error.add_note(f"case: {name}")
                raise

    on_ranks(size, program)


def test_320_ranks() -> None:
    """Every rank takes part; one in sixteen compares, since the oracle runs all slots."""
    tokens = [int(r % 3 > 0) for r in range(320)]
    case = make_case(ep=320, slots=1, top_k=8, tokens=tokens, hidden=8, dtype=torch.bfloat16)
    fabric = Fabric(case=replace(case, phase=DECODE))

    def program(ep: Communicator) -> None:
        dispatcher = fabric.make(ep, 1)
        y = contract.through(dispatcher, fabric.case, ep.rank, contract.marked)
        if ep.rank % 16 == 1:
            contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), str(ep.rank))

    on_ranks(320, program)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(3, 8), (8, 4)])
def test_without_normal_kernels_prompts_go_by_low_latency(size: int, ranks_per_node: int) -> None:
    fabric = Fabric(case=bf16_case(size, MIXED), ranks_per_node=ranks_per_node)

    def program(ep: Communicator) -> None:
        dispatcher = fabric.make(ep, 2)
        assert dispatcher.capabilities.layouts == (Layout.PADDED,) and not dispatcher.capabilities.counts_on_host
        contract.check_marked_experts(ep, fabric, fabric.case)

    on_ranks(size, program)


@BOTH
def test_identity_experts_return_x(phase: Phase) -> None:
    fabric = Fabric(case=bf16_case(4, phase))
    on_ranks(4, lambda ep: contract.check_identity_experts(ep, fabric, fabric.case))


@BOTH
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_shapes(phase: Phase, data: st.DataObject) -> None:
    slots, hidden = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([8, 40, 192, 2048]))
    tokens = data.draw(st.lists(st.integers(0, 5), min_size=4, max_size=4))
    case = make_case(
        ep=4,
        slots=slots,
        top_k=data.draw(st.integers(1, min(11, 4 * slots))),
        tokens=tokens,
        hidden=hidden,
        padding=data.draw(st.integers(0, 2)),
        spare_capacity=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 9)),
        dtype=torch.bfloat16,
    )
    fabric = Fabric(case=replace(case, phase=phase), alignment=data.draw(st.sampled_from([1, 8])))

    def program(ep: Communicator) -> None:
        contract.check_marked_experts(ep, fabric, fabric.case)
        contract.check_origin_of_rows(ep, fabric, fabric.case)

    on_ranks(4, program)


@BOTH
@pytest.mark.parametrize("size", [2, 16])
def test_two_micro_batches_through_three_layers(size: int, phase: Phase) -> None:
    """Both begin before either is received; all results stay good to the end."""
    case = bf16_case(size, phase)
    fabric = Fabric(case=case)

    def program(ep: Communicator) -> None:
        dispatcher, x, routing = fabric.make(ep, case.slots), case.x[ep.rank], case.routing[ep.rank]
        steps = [DispatchStep(case.capacity, phase, i) for i in range(2)]
        kept: list[Tensor] = []
        for _ in range(3):
            begun = [
                dispatcher.dispatch_begin(tokens, routing, step) for tokens, step in zip((x, -x), steps, strict=True)
            ]
            rows, handle = begun[0].wait()
            negated, other = begun[1].wait()
            first = slot_of(case, ep.rank)
            returning = dispatcher.combine_begin(contract.run_experts(rows, contract.marked, first_slot=first), handle)
            y = contract.run_experts(negated, contract.identity, first_slot=first)
            later = dispatcher.combine_begin(y, other)
            kept += [returning.wait(), later.wait()]
        for marked, unchanged in zip(kept[::2], kept[1::2], strict=True):
            assert torch.equal(marked, kept[0]) and torch.equal(unchanged, kept[1]), "bits are those of the first layer"
            contract.assert_law(dispatcher, marked, contract.oracle(case, ep.rank, contract.marked), "first")
            contract.assert_law(dispatcher, -unchanged, contract.oracle(case, ep.rank, contract.identity), "second")
        dispatcher.close()

    on_ranks(size, program)


def test_counters_are_cleaned_once_nothing_is_under_way() -> None:
    """Between nodes; the other micro-batch's kernels use the same memory."""
    case = bf16_case(16, MIXED)
    fabric = Fabric(case=case)

    def program(ep: Communicator) -> None:
        dispatcher, x, routing = fabric.make(ep, case.slots), case.x[ep.rank], case.routing[ep.rank]
        begun = [dispatcher.dispatch_begin(x, routing, DispatchStep(case.capacity, MIXED, i)) for i in range(2)]
        arrived = [pending.wait() for pending in begun]
        first = slot_of(case, ep.rank)
        returning = [
            dispatcher.combine_begin(contract.run_experts(rows, contract.marked, first_slot=first), handle)
            for rows, handle in arrived
        ]
        dirty = []
        for pending in returning:
            pending.wait()
            dirty.append(dispatcher._buffer.dirty)
        assert dirty == [True, False]
        dispatcher.close()

    on_ranks(16, program)


def slot_of(case: Case, rank: int) -> int:
    """First slot of a rank."""
    return rank * case.slots


@pytest.mark.parametrize("size", [8, 16])
def test_prompts_and_decoding_share_a_buffer(size: int) -> None:
    """Idle steps among them; between nodes the counters are cleaned by the normal kernels' own steps."""
    prompts = bf16_case(size, MIXED)
    fabric = Fabric(case=prompts)

    def program(ep: Communicator) -> None:
        dispatcher = fabric.make(ep, 2)
        for phase in (DECODE, MIXED, MIXED, DECODE, DECODE, Phase.IDLE, MIXED, Phase.IDLE):
            case = replace(prompts, phase=phase)
            if phase is Phase.IDLE:
                case = replace(case, x=[x[:0] for x in case.x], routing=[nothing(r) for r in case.routing])
            y = contract.through(dispatcher, case, ep.rank, contract.marked)
            contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), str(phase))

    on_ranks(size, program)


def nothing(routing: Any) -> Any:
    return replace(routing, expert_ids=routing.expert_ids[:0], weights=routing.weights[:0])


@BOTH
def test_bits_do_not_depend_on_the_order_of_rows(phase: Phase) -> None:
    case = bf16_case(8, phase, top_k=5, tokens=4)

    def outputs(seed: int) -> list[Any]:
        fabric = Fabric(case=case, library=Library(seed=seed))
        return on_ranks(8, lambda ep: contract.through(fabric.make(ep, 2), case, ep.rank, contract.marked))

    first, second = outputs(1), outputs(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_low_latency_keeps_a_tighter_bound() -> None:
    case = bf16_case(8, DECODE, top_k=8, slots=4)
    fabric = Fabric(case=case)

    def program(ep: Communicator) -> None:
        y = contract.through(fabric.make(ep, 4), case, ep.rank, contract.marked).float()
        want = contract.oracle(case, ep.rank, contract.marked).float()
        assert (y - want).abs().max() <= (TOLERANCE + 2**-8) * want.abs().max()

    on_ranks(8, program)


@BOTH
@pytest.mark.parametrize(("hidden", "ue8m0"), [(256, False), (192, False), (256, True)])
def test_fp8_tokens_with_scales(phase: Phase, hidden: int, ue8m0: bool) -> None:
    """Equal to `local` after quantisation of the rows; bf16 comes home."""
    case = bf16_case(2, phase, hidden=hidden)
    fabric = Fabric(case=case, quantize=True, ue8m0=ue8m0, alignment=4)

    def program(ep: Communicator) -> None:
        dispatcher = fabric.make(ep, 2)
        rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
        assert rows.data.dtype is torch.float8_e4m3fn and rows.data.is_contiguous() and rows.scales is not None
        assert rows.data.shape[-1] == hidden and rows.scales.shape[-1] == 2
        if isinstance(rows, PaddedRows):
            assert rows.scales.stride(1) == 1, "rows are adjacent in memory"
        if ue8m0:
            real = [part.flatten() for part in contract.slot_rows(replace(rows, data=rows.scales))]
            assert bool((torch.cat(real).log2() % 1 == 0).all()), "powers of two"
        plain = dequantize(BlockScaled(rows.data, rows.scales), dtype=torch.bfloat16, backend="torch")
        y = contract.run_experts(replace(rows, data=plain), contract.marked, first_slot=ep.rank * 2)
        got = dispatcher.combine_begin(y, handle).wait().float()
        want = contract.oracle(case, ep.rank, contract.marked).float()
        assert got.shape == want.shape
        # e4m3 keeps 4 bits: 2^-4 of each value, and of each term where terms cancel.
        assert (got - want).abs().max() <= 2**-3 * want.abs().max()

    on_ranks(2, program)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_experts_take_scales_by_columns(backend: str) -> None:
    """Scales `[E, C, G]` as low latency gives them, rows adjacent, mean the same as contiguous ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 256, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 8, 2, generator=generator) + 0.5
    w13, w2 = (quantize_blocks(torch.randn(2, *shape, generator=generator)) for shape in ((256, 256), (256, 128)))
    weights = prepare_experts(w13, w2)
    counts = torch.tensor([5, 0], dtype=torch.int32)
    by_columns = scales.transpose(1, 2).contiguous().transpose(1, 2)
    outputs = [
        expert_mlp_padded(BlockScaled(x, s), weights, counts=counts, out_dtype=torch.float32, backend=backend)[0, :5]
        for s in (scales, by_columns)
    ]
    assert torch.equal(*outputs) and bool(outputs[0].any())


def test_decode_steps_are_captured_and_prompts_are_not() -> None:
    case = bf16_case(2, DECODE)
    fabric = Fabric(case=case)
    prompts = replace(case, phase=MIXED)
    with VirtualCluster(2, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=2)
        made = cluster.run(lambda rank: fabric.make(groups[rank].ep, 2))
        assert made[0].capabilities.graph_safe and made[0].capabilities.counts_on_host
        with fabric.library.capturing():
            cluster.run(lambda rank: contract.through(made[rank], case, rank, contract.marked))
            with pytest.raises(CommunicationError, match="counts_outside_capture"):
                cluster.run(lambda rank: contract.through(made[rank], prompts, rank, contract.marked))


def test_padding_rows_come_back_as_zeros() -> None:
    fabric = Fabric(case=bf16_case(2, DECODE))

    def program(ep: Communicator) -> None:
        y = contract.through(fabric.make(ep, 2), fabric.case, ep.rank, contract.marked)
        assert not y[fabric.case.routing[ep.rank].expert_ids[:, 0] == NOWHERE].any()

    on_ranks(2, program)
