"""torch's symmetric memory dispatcher over its double: the laws, its sizes and limits, what is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_kernels.quant import quantize_rows
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, GroupedRows, Layout, Phase
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.symm_mem import detect, sizes
from moe_runtime.errors import ConfigError
from tests.dispatch import contract
from tests.dispatch.contract import Case, make_case
from tests.dispatch.symm_mem_backend import Symmetric
from tests.dispatch.test_contract import on_ranks
from tests.doubles.symm_mem import SymmMem

LAYOUTS = [(Layout.GROUPED, 1), (Layout.GROUPED, 4), (Layout.PADDED, 1)]


def cases(size: int) -> dict[str, Case]:
    k = min(2, size * 2)
    return {
        "uneven": make_case(ep=size, slots=3, top_k=3, tokens=[(5 * r + 1) % 7 for r in range(size)], padding=1),
        "one slot per rank": make_case(ep=size, slots=1, top_k=min(size, 4), tokens=[2] * size, spare_capacity=2),
        "all empty": make_case(ep=size, slots=2, top_k=k, tokens=[0] * size),
        "one expert for all": make_case(ep=size, slots=2, top_k=1, tokens=[3] * size, only_slot=2 * size - 1),
        "bf16, odd rows": make_case(ep=size, slots=2, top_k=k, tokens=[3] * size, dtype=torch.bfloat16, hidden=13),
    }


def all_laws(everything: dict[str, Case], layout: Layout, alignment: int, *without: str) -> Any:
    def program(ep: Communicator) -> None:
        for name, case in everything.items():
            try:
                backend: Any = Symmetric(case, layout, alignment, without=without)
                contract.check_marked_experts(ep, backend, case)
                contract.check_identity_experts(ep, backend, case)
                contract.check_origin_of_rows(ep, backend, case)
            except AssertionError as error:
                error.add_note(f"case: {name}")
                raise

    return program


@pytest.mark.parametrize(("layout", "alignment"), LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_laws_hold(size: int, layout: Layout, alignment: int) -> None:
    on_ranks(size, all_laws(cases(size), layout, alignment))


def test_laws_hold_on_16_ranks_of_a_torch_that_keeps_its_offsets() -> None:
    """16 is torch's own limit on the way home; ours is lower while blocks may be late."""
    named = {name: case for name, case in cases(16).items() if name != "one expert for all"}
    on_ranks(16, all_laws(named, Layout.GROUPED, 1, "late_block"))


def test_two_micro_batches_in_flight() -> None:
    """One dispatcher with a lane for each."""
    case = make_case(ep=4, slots=2, top_k=2, tokens=[3] * 4)
    backend = Symmetric(case, in_flight=2)

    def program(ep: Communicator) -> None:
        dispatcher = backend.make(ep, 2)
        x, routing = case.x[ep.rank], case.routing[ep.rank]
        for phase in (Phase.MIXED, Phase.DECODE, Phase.IDLE):
            begun = [
                dispatcher.dispatch_begin(x * (i + 1), routing, DispatchStep(3, phase, micro_batch=i)) for i in range(2)
            ]
            arrived = [pending.wait() for pending in begun]
            returning = [
                dispatcher.combine_begin(contract.run_experts(rows, contract.marked, first_slot=ep.rank * 2), handle)
                for rows, handle in arrived
            ]
            for i, pending in enumerate(returning):
                scaled = replace(case, x=[x * (i + 1) for x in case.x])
                contract.assert_law(
                    dispatcher, pending.wait(), contract.oracle(scaled, ep.rank, contract.marked), f"{phase}, {i}"
                )

    on_ranks(4, program)


def test_the_same_bits_again() -> None:
    case = make_case(ep=4, slots=2, top_k=2, tokens=[4, 0, 3, 1])

    def program(ep: Communicator) -> torch.Tensor:
        dispatcher = Symmetric(case).make(ep, 2)
        first, second = (contract.through(dispatcher, case, ep.rank, contract.marked) for _ in range(2))
        assert torch.equal(first, second)
        return first

    assert all(torch.equal(a, b) for a, b in zip(on_ranks(4, program), on_ranks(4, program), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("alignment", [1, 4])
def test_as_on_a_gpu(alignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows sorted by the kernels, decode steps, the double refusing what a capture would; smaller steps in between."""
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    case = replace(make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], spare_capacity=1), phase=Phase.DECODE)
    backend = Symmetric(case, alignment=alignment)

    def program(ep: Communicator) -> None:
        library = backend.library(ep)
        dispatcher = backend.make_with(library, ep)
        assert dispatcher.capabilities.graph_safe and not dispatcher.capabilities.counts_on_host
        for capacity in (3, 2, 3):
            step = replace(case, capacity=capacity)
            with library.capturing():
                y = contract.through(dispatcher, step, ep.rank, contract.marked)
            contract.assert_law(dispatcher, y, contract.oracle(step, ep.rank, contract.marked), f"capacity {capacity}")

    on_ranks(2, program)


def test_rows_travel_in_fp8_and_outputs_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    bf16 = torch.bfloat16
    case = make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], hidden=136, dtype=bf16)
    backend = Symmetric(case, quantize=True)

    def program(ep: Communicator) -> None:
        dispatcher = backend.make(ep, case.slots)
        rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
        assert isinstance(rows, GroupedRows) and rows.scales is not None
        assert rows.data.dtype is torch.float8_e4m3fn and rows.data.is_contiguous()
        outputs, start = torch.full(rows.data.shape, float("nan"), dtype=bf16), 0
        for slot, end in enumerate(rows.psum.tolist()):
            tokens = [
                case.x[rank][token]
                for rank, routing in enumerate(case.routing)
                for token in (routing.expert_ids == ep.rank * 2 + slot).any(dim=1).nonzero().flatten().tolist()
            ]
            assert len(tokens) == end - start
            if tokens:
                expected = quantize_rows(torch.stack(tokens))
                assert torch.equal(rows.data[start:end].view(torch.uint8), expected.data.view(torch.uint8))
                assert torch.equal(rows.scales[start:end], expected.scale)
                outputs[start:end] = torch.stack(tokens)
            start = end
        y = dispatcher.combine_begin(outputs, handle).wait()
        torch.testing.assert_close(y, case.x[ep.rank], rtol=2**-7, atol=1e-6)

    on_ranks(2, program)


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "bincount", "is_nonzero"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class Aside(SymmMem):
    """Its own work is not looked at."""

    def all_to_all_vdev_2d(self, *arguments: Any) -> None:
        with _disable_current_modes():
            super().all_to_all_vdev_2d(*arguments)

    def all_to_all_vdev_2d_offset(self, *arguments: Any) -> None:
        with _disable_current_modes():
            super().all_to_all_vdev_2d_offset(*arguments)


def test_the_dispatch_of_a_gpu_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    case = replace(make_case(ep=1, slots=2, top_k=2, tokens=[2]), phase=Phase.DECODE)

    def program(ep: Communicator) -> None:
        dispatcher = Symmetric(case).make_with(Aside(ep), ep)
        with NoWaits():  # type: ignore[no-untyped-call]
            rows, handle = dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step).wait()
            y = dispatcher.combine_begin(rows.data * 2, handle).wait()
        torch.testing.assert_close(y, case.x[0] * 2)

    on_ranks(1, program)


def test_waits_are_seen() -> None:
    """Where counts go to the host."""
    case = make_case(ep=1, slots=2, top_k=2, tokens=[2])

    def program(ep: Communicator) -> None:
        dispatcher = Symmetric(case).make_with(Aside(ep), ep)
        with pytest.raises(AssertionError, match="nonzero waits"), NoWaits():  # type: ignore[no-untyped-call]
            dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step).wait()

    on_ranks(1, program)


def test_a_dispatch_that_was_not_combined_is_refused() -> None:
    case = make_case(ep=1, slots=2, top_k=2, tokens=[2])

    def program(ep: Communicator) -> None:
        dispatcher = Symmetric(case).make(ep, 2)
        dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step).wait()
        with pytest.raises(AssertionError, match="was not combined"):
            dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step)

    on_ranks(1, program)


def test_memory_of_another_backend_is_an_error_of_the_configuration() -> None:
    case = make_case(ep=1, slots=2, top_k=2, tokens=[2])

    def program(ep: Communicator) -> None:
        backend = Symmetric(case)
        library = backend.library(ep)
        library.empty(4)
        with pytest.raises(ConfigError, match=r"dispatch=symm_mem: .*Backend can not be changed after use.*all_to_all"):
            backend.make_with(library, ep)

    on_ranks(1, program)


def test_bytes_are_those_allocated() -> None:
    case = make_case(ep=2, slots=3, top_k=2, tokens=[5, 2], hidden=24)
    backend = Symmetric(case, in_flight=2)

    def program(ep: Communicator) -> int:
        library = backend.library(ep)
        backend.make_with(library, ep)
        return sum(allocation.memory.numel() for allocation in library._allocations.values())

    spec = backend.spec(2)
    sorted_rows = 2 * 2 * 5 * 2 * 24 * 4
    assert on_ranks(2, program) == [sizes.buffer_bytes(spec) - sorted_rows] * 2
    more = [sizes.buffer_bytes(replace(spec, max_tokens=tokens)) for tokens in range(6)]
    assert more == sorted(more)


def test_limits() -> None:
    def why(ep: int, slots: int) -> str:
        return str(sizes.unfit(Symmetric(make_case(ep=ep, slots=slots, top_k=1, tokens=[1] * ep)).spec(ep)))

    assert why(8, 8) == why(4, 16) == why(1, 16) == "None"
    assert "ep=16" in why(16, 1) and "Set ep=8" in why(16, 1)
    assert "9 slots on each of 8 ranks" in why(8, 9) and why(8, 9).endswith("64 of all. Set dispatch=all_to_all.")
    assert why(2, 17).endswith("at most 16 slots of a rank and 64 of all. Raise ep, or set dispatch=all_to_all.")
    assert sizes.max_capacity(Symmetric(make_case(ep=1, slots=1, top_k=1, tokens=[1])).spec(1)) is None


def test_what_is_found_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build has the operators' signatures and no kernels."""
    found = detect.find()
    if torch.version.cuda is None:
        assert isinstance(found, Missing)
        assert "is built without NVSHMEM" in str(found) and "dispatch=all_to_all" in found.remedy
    monkeypatch.setattr(detect, "SIGNATURES", (("all_to_all_vdev_2d", ("input", "other")),))
    assert "it must be all_to_all_vdev_2d(input, other)" in str(detect.find())
    monkeypatch.setattr(detect, "SIGNATURES", (("all_to_nobody", ("input",)),))
    assert "lacks all_to_nobody" in str(detect.find())


def test_calls_are_torchs() -> None:
    import torch.distributed._symmetric_memory as memory

    calls = detect.calls_of(memory, torch.ops.symm_mem)
    assert calls.empty is memory.empty and calls.all_to_all_vdev_2d is torch.ops.symm_mem.all_to_all_vdev_2d
