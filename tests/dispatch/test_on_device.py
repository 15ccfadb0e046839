"""The laws again for dispatchers as they run on a GPU: rows sorted by the Triton kernels, counts never on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_kernels import backends
from moe_kernels.experts import prepare_experts
from moe_kernels.quant import quantize_blocks, quantize_rows

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, GroupedRows, Layout, Phase
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.local import LocalDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.layers.experts import Experts
from moe_runtime.types import PhysicalRouting
from tests.dispatch import contract
from tests.dispatch.contract import Backend, Case, make_case
from tests.dispatch.test_contract import on_ranks

STAYING = [Backend("local", Layout.GROUPED), Backend("local", Layout.GROUPED, 4)]
STAYING += [Backend("all_gather", Layout.GROUPED), Backend("all_gather", Layout.GROUPED, 4)]
ALL_TO_ALL = Backend("all_to_all", Layout.GROUPED)
COUNTED = [Backend("all_to_all", Layout.PADDED), Backend("all_gather", Layout.PADDED), Backend("local", Layout.PADDED)]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")


def sizes(backend: Backend) -> tuple[int, ...]:
    return (1,) if backend.name == "local" else (2,)


def cases(size: int) -> dict[str, Case]:
    few = [2, 1][:size]
    return {
        "uneven": make_case(ep=size, slots=3, top_k=3, tokens=few, padding=1),
        "fewer slots than k": make_case(ep=size, slots=1, top_k=size, tokens=few, spare_capacity=1),
        "all empty": make_case(ep=size, slots=2, top_k=2, tokens=[0] * size),
        "one expert for all": make_case(ep=size, slots=2, top_k=1, tokens=few, only_slot=2 * size - 1),
    }


@pytest.mark.parametrize(("backend", "size"), [(b, n) for b in (*STAYING, ALL_TO_ALL) for n in sizes(b)], ids=str)
def test_laws_hold(backend: Backend, size: int) -> None:
    everything = list(cases(size).items())

    def program(ep: Communicator) -> None:
        for name, case in everything:
            try:
                contract.check_marked_experts(ep, backend, case)
                contract.check_origin_of_rows(ep, backend, case)
                if backend is ALL_TO_ALL:
                    decode = replace(case, phase=Phase.DECODE)
                    contract.check_marked_experts(ep, backend, decode)
                    contract.check_origin_of_rows(ep, backend, decode)
            except AssertionError as error:
                error.add_note(f"case: {name}")
                raise

    on_ranks(size, program)


@pytest.mark.parametrize("backend", [STAYING[0], STAYING[2], STAYING[3], ALL_TO_ALL], ids=str)
def test_chunks_within_the_cap(backend: Backend) -> None:
    size = sizes(backend)[-1]
    case = make_case(ep=size, slots=2, top_k=2, tokens=[5 - 2 * r for r in range(size)])
    case = replace(case, phase=Phase.DECODE)
    cap = backend.buffer_bytes(size, 2, tokens=2, top_k=2)
    assert on_ranks(size, lambda ep: contract.check_receive_cap(ep, backend, case, cap)) == [3] * size


@pytest.mark.parametrize("backend", [STAYING[0], STAYING[3]], ids=str)
def test_two_micro_batches_in_flight(backend: Backend) -> None:
    size = sizes(backend)[-1]
    case = make_case(ep=size, slots=2, top_k=2, tokens=[3] * size)
    case = replace(case, phase=Phase.DECODE)
    on_ranks(size, lambda ep: contract.check_two_in_flight(ep, backend, case))


@pytest.mark.parametrize("name", ["local", "all_gather"])
def test_equals_the_torch_way_within_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code, the same sum: the CPU's bags fuse product and sum, so the last bit may differ."""
    size = 1 if name == "local" else 2
    case = make_case(ep=size, slots=4, top_k=4, tokens=[6 - r for r in range(size)], padding=1)
    backend = Backend(name, Layout.GROUPED)

    def program(ep: Communicator) -> torch.Tensor:
        return contract.through(backend.make(ep, case.slots), case, ep.rank, contract.marked)

    on_device = on_ranks(size, program)
    monkeypatch.setattr(backends, "default_backend", lambda device: "torch")
    for ours, theirs in zip(on_device, on_ranks(size, program), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [*STAYING, ALL_TO_ALL], ids=str)
def test_shapes_follow_from_what_was_agreed(backend: Backend) -> None:
    """Whatever the routing: the same room, so that a captured step stays valid; and it is said so."""
    size, slots, top_k = sizes(backend)[-1], 2, 2
    tokens = [3] * size

    def program(ep: Communicator) -> list[int]:
        dispatcher = backend.make(ep, slots)
        assert dispatcher.capabilities.graph_safe
        assert dispatcher.capabilities.counts_on_host == (backend is ALL_TO_ALL), "for steps with prompts"
        found = []
        for ids in ([0, 1], [2 * size - 1, 0], [-1, -1]):
            x, weights = torch.ones(3, 8), torch.ones(3, top_k)
            routing = PhysicalRouting(torch.tensor([ids] * tokens[ep.rank]), weights)
            rows, _ = dispatcher.dispatch_begin(x, routing, DispatchStep(3, Phase.DECODE)).wait()
            assert isinstance(rows, GroupedRows)
            found.append(rows.data.shape[0])
        return found

    room = size * 3 * min(top_k, slots) + slots * (backend.alignment - 1)
    assert on_ranks(size, program) == [[room] * 3] * size


def test_counted_layouts_say_so() -> None:
    for backend in COUNTED:

        def program(ep: Communicator, backend: Backend = backend) -> bool:
            capabilities = backend.make(ep, 2).capabilities
            return capabilities.counts_on_host and not capabilities.graph_safe

        assert on_ranks(1, program) == [True]


@pytest.mark.parametrize("name", ["local", "all_gather", "all_to_all"])
def test_rows_for_fp8_experts_are_quantised_on_the_way(name: str) -> None:
    """The bytes and scales that the experts would make of them; what is not bf16 is left to the experts."""
    size = 1 if name == "local" else 2
    case = make_case(ep=size, slots=2, top_k=2, tokens=[2] * size, hidden=130, dtype=torch.bfloat16)
    case = replace(case, phase=Phase.DECODE)
    layouts = [RowLayout(2, quantize=quantize) for quantize in (True, False)]

    def program(ep: Communicator) -> None:
        found = []
        for layout in layouts:
            dispatcher = make_dispatcher(name, ep, contract.spec_of(layout))
            rows, _ = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
            assert isinstance(rows, GroupedRows)
            found.append(rows)
        narrow, plain = found
        last = int(plain.psum[-1])
        assert torch.equal(narrow.psum, plain.psum)
        assert narrow.data.dtype is torch.float8_e4m3fn, name
        assert plain.scales is None
        assert narrow.scales is not None
        want = quantize_rows(plain.data[:last], backend="torch")
        assert torch.equal(narrow.data[:last].view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(narrow.scales[:last], want.scale)
        wide, _ = (
            make_dispatcher(name, ep, contract.spec_of(layouts[0]))
            .dispatch_begin(case.x[ep.rank].float(), case.routing[ep.rank], case.step)
            .wait()
        )
        assert wide.data.dtype is torch.float32

    on_ranks(size, program)


def test_fp8_rows_reach_fp8_experts() -> None:
    """Quantised by the dispatcher or by the experts: the same outputs. bf16 is only stored here, never multiplied."""
    case = make_case(ep=1, slots=2, top_k=2, tokens=[3], hidden=128, dtype=torch.bfloat16)
    w13, w2 = torch.randn(2, 256, 128) / 11, torch.randn(2, 128, 128) / 11
    experts = Experts(prepare_experts(quantize_blocks(w13), quantize_blocks(w2)))
    outputs = []
    for quantize in (True, False):
        dispatcher = LocalDispatcher(RowLayout(2, quantize=quantize))
        rows, handle = dispatcher.dispatch_begin(case.x[0], case.routing[0], case.step).wait()
        outputs.append(dispatcher.combine_begin(experts(rows), handle).wait())
        assert outputs[-1].dtype is torch.bfloat16
    assert torch.equal(*outputs)
