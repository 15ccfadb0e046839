"""The combine in two parts: bitwise what it is as a whole, begun before the other slots' products, the same calls on
every rank whatever is empty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_kernels.experts import ExpertWeights, prepare_experts
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch import all_to_all, parts
from moe_runtime.dispatch.base import (
    Dispatcher,
    DispatchStep,
    GroupedRows,
    Layout,
    PaddedRows,
    Phase,
    Rows,
    first_slots,
    splitting,
)
from moe_runtime.dispatch.deferred import DeferredDispatcher
from moe_runtime.dispatch.factory import COLLECTIVES, SPLITTING, make_dispatcher
from moe_runtime.dispatch.parts import Cut, Part
from moe_runtime.dispatch.phased import PhasedDispatcher
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import CommunicationError
from moe_runtime.layers.experts import Experts
from tests.dispatch import contract
from tests.dispatch.contract import Backend, make_case
from tests.dispatch.test_contract import cases, on_ranks
from tests.layers import test_moe

LAYOUTS = [
    Backend("all_to_all", layout, n) for layout, n in ((Layout.GROUPED, 1), (Layout.GROUPED, 4), (Layout.PADDED, 1))
]
SKEW = make_case(ep=4, slots=5, top_k=3, tokens=[0, 9, 1, 4], padding=1, spare_capacity=2, seed=3)


def marked_at(rank: int, slots: int) -> contract.RunPart:
    return lambda rows, slot: contract.run_experts(rows, contract.marked, first_slot=rank * slots + slot)


@pytest.mark.parametrize("backend", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_same_bits(backend: Backend, size: int) -> None:
    """Also where ranks are empty, where a part is, or where everything is."""
    shapes = {name: case for name, case in cases(size).items() if case.slots > 1}
    shapes["only first slots"] = make_case(ep=size, slots=2, top_k=1, tokens=[2] * size, only_slot=0)
    shapes["five slots"] = make_case(ep=size, slots=5, top_k=3, tokens=[(3 * r + 1) % 5 for r in range(size)])
    shapes["bf16, five slots"] = replace(shapes["five slots"], x=[x.bfloat16() for x in shapes["five slots"].x])

    def program(ep: Communicator) -> None:
        for name, case in shapes.items():
            try:
                contract.check_split_combine(ep, backend, case)
            except AssertionError as error:
                error.add_note(f"case: {name}")
                raise

    on_ranks(size, program)


def test_by_hand() -> None:
    """2 ranks of 3 slots, 2 of them in the first part; rank 1's second part is empty."""
    case = make_case(ep=2, slots=3, top_k=1, tokens=[4, 2])
    for routing, slots in zip(case.routing, ([2, 3, 0, 4], [1, 2]), strict=True):
        routing.expert_ids.copy_(torch.tensor(slots).unsqueeze(1))

    def program(ep: Communicator) -> list[object]:
        dispatcher = LAYOUTS[0].make(ep, 3)
        step = replace(case.step, split_combine=True)
        rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], step).wait()
        (first, ours), (rest, theirs) = splitting(dispatcher).split(rows, handle)
        assert isinstance(first, GroupedRows) and isinstance(rest, GroupedRows)
        found: list[object] = [first.psum.tolist(), rest.psum.tolist()]
        found += [ours.sent, theirs.sent, ours.received, theirs.received, theirs.row_of.flatten().tolist()]
        y = splitting(dispatcher).combine_first_begin(first.data, ours)
        splitting(dispatcher).combine_rest_begin(rest.data, theirs, y).wait()
        return found

    zero, one = on_ranks(2, program)
    # Wire order of rank 0 is slots 0 2 | 3 4; home come 0 | 3 4, then 2.
    assert zero == [[1, 2], [2], [1, 2], [1, 0], [1, 1], [1, 1], [3, 1, 0, 2]]
    assert one == [[1, 2], [0], [1, 0], [1, 0], [2, 0], [0, 0], [0, 1]]


def test_who_can() -> None:
    def program(ep: Communicator) -> None:
        made = {name: Backend(name, Layout.GROUPED).make(ep, 2) for name in COLLECTIVES}
        assert {name for name, one in made.items() if one.capabilities.splits_combine} == set(SPLITTING)
        with pytest.raises(AssertionError, match="AllGatherDispatcher combines as a whole"):
            splitting(made["all_gather"])
        phased = PhasedDispatcher(made["all_to_all"], made["all_gather"])
        assert phased.capabilities.splits_combine
        assert not PhasedDispatcher(made["all_gather"], made["all_to_all"]).capabilities.splits_combine
        deferred = DeferredDispatcher(lambda: phased)
        deferred.open()
        case = make_case(ep=1, slots=2, top_k=2, tokens=[5])
        y = contract.through_parts(deferred, case, 0, marked_at(0, 2))
        contract.assert_law(deferred, y, contract.oracle(case, 0, contract.marked), "phased")
        rows, handle = made["all_to_all"].dispatch_begin(case.x[0], case.routing[0], case.step).wait()
        with pytest.raises(AssertionError, match="dispatched to be combined as a whole"):
            splitting(made["all_to_all"]).split(rows, handle)
        with pytest.raises(AssertionError, match="1 slots have no parts"):
            first_slots(1)

    on_ranks(1, program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real experts in Triton, batch-invariant: bitwise as without parts. Equal blocks refuse."""
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    case = make_case(ep=2, slots=3, top_k=3, tokens=[4, 2], padding=1, hidden=32, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(6, *shape, generator=g).to(dtype) for shape in ((32, 32), (32, 16)))

    def program(ep: Communicator) -> None:
        own = slice(3 * ep.rank, 3 * ep.rank + 3)
        experts = Experts(prepare_experts(w13[own], w2[own]), batch_invariant=True)
        dispatcher = LAYOUTS[0].make(ep, 3)

        def run(rows: Rows, slot: int) -> Tensor:
            count = (rows.psum if isinstance(rows, GroupedRows) else rows.counts).shape[0]
            return experts.slots(slot, slot + count)(rows)

        y = contract.through_parts(dispatcher, case, ep.rank, run)
        rows, handle = dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], case.step).wait()
        whole = dispatcher.combine_begin(experts(rows), handle).wait()
        assert torch.equal(y, whole) and whole.any()
        decode = DispatchStep(case.capacity, Phase.DECODE, split_combine=True)
        with pytest.raises(AssertionError, match="equal blocks come home as a whole"):
            dispatcher.dispatch_begin(case.x[ep.rank], case.routing[ep.rank], decode)

    on_ranks(2, program)


Mutant = Callable[[pytest.MonkeyPatch], None]


def _rows_not_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cut, "home_rows", lambda self, row_of: row_of)


def _parts_swapped_at_home(patch: pytest.MonkeyPatch) -> None:
    def wrong(y: Tensor, row_of: Tensor, weights: Tensor, *, rest: Tensor | None = None) -> Tensor:
        return unpermute(y, row_of, weights) if rest is None else unpermute(rest, row_of, weights, rest=y)

    patch.setattr(all_to_all, "unpermute", wrong)


def _ends_of_the_whole(patch: pytest.MonkeyPatch) -> None:
    """The second part's ends count the first part's rows."""
    split = Cut.split

    def wrong(self: Cut, rows: Rows, position: Tensor | None) -> tuple[Part, Part]:
        first, (rest, at) = split(self, rows, position)
        assert isinstance(rows, GroupedRows) and isinstance(rest, GroupedRows)
        ends = rows.psum[-rest.psum.shape[0] :].clamp(max=rest.data.shape[0])
        return first, (replace(rest, psum=ends), at)

    patch.setattr(Cut, "split", wrong)


def _sent_in_order_of_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parts, "positions", lambda counts, starts, rows: torch.arange(rows))


def _nowhere_is_somewhere(patch: pytest.MonkeyPatch) -> None:
    right = Cut.home_rows
    patch.setattr(Cut, "home_rows", lambda self, row_of: right(self, row_of).clamp(min=0))


@pytest.mark.parametrize(
    "mutant",
    [_rows_not_moved, _parts_swapped_at_home, _ends_of_the_whole, _sent_in_order_of_slots, _nowhere_is_somewhere],
)
def test_mutants_are_seen(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(4, lambda ep: contract.check_split_combine(ep, LAYOUTS[0], SKEW))
    mutant(monkeypatch)
    with pytest.raises(CommunicationError, match=r"rank \d raised AssertionError .* values differ"):
        on_ranks(4, lambda ep: contract.check_split_combine(ep, LAYOUTS[0], SKEW))


@dataclass(frozen=True)
class Told:
    """A communicator, or experts, whose calls are written down."""

    inner: Any
    log: list[str]

    @property
    def size(self) -> int:
        size: int = self.inner.size
        return size

    @property
    def weights(self) -> ExpertWeights:
        weights: ExpertWeights = self.inner.weights
        return weights

    def all_to_all_begin(self, x: Tensor, sent: list[int], received: list[int]) -> Any:
        self.log.append("counts leave" if x.dim() == 1 else "rows leave")
        return self.inner.all_to_all_begin(x, sent, received)

    def slots(self, start: int, stop: int) -> Told:
        return Told(self.inner.slots(start, stop), self.log)

    def __call__(self, rows: Rows) -> Any:
        self.log.append(f"{self.weights.num_slots} slots multiply")
        return self.inner(rows)


@pytest.mark.parametrize("tokens", [[5, 3], [0, 1]], ids=str)
def test_outputs_leave_before_the_other_slots_multiply(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every rank, whatever is empty."""
    logs: list[list[str]] = []

    def make(name: str, ep: Communicator, spec: DispatchSpec) -> Dispatcher[Any]:
        logs.append([])
        told: Any = Told(ep, logs[-1])
        return make_dispatcher(name, told, spec)

    monkeypatch.setattr(test_moe, "make_dispatcher", make)
    monkeypatch.setattr(test_moe, "Experts", lambda weights, invariant: Told(Experts(weights, invariant), logs[-1]))
    variant = test_moe.Variant(ep=2, dispatch="all_to_all", redundant=2, max_chunk_tokens=4, split_combine=True)
    inputs = [torch.randn(count, test_moe.HIDDEN) for count in tokens]
    test_moe.run(test_moe.make_weights(1), inputs, variant, num_real=tokens)
    turn = ["counts leave", "rows leave", "3 slots multiply", "rows leave", "2 slots multiply", "rows leave"]
    assert logs == [turn * -(-max(tokens) // 4)] * 2


@pytest.mark.parametrize("layout", list(Layout))
def test_the_host_waits_for_nothing_but_counts(layout: Layout) -> None:
    """A tensor without values raises where the host would read one."""

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    cut = Cut(meta(6, 2), meta(2, 3), meta(2, 3), [3, 1], [4, 2])
    data, marks = meta(9, 8, dtype=torch.float32), meta(3, dtype=torch.int32)
    rows = GroupedRows(data, marks) if layout is Layout.GROUPED else PaddedRows(data.view(3, 3, 8), marks)
    (first, at_first), (rest, at_rest) = cut.split(rows, meta(9))
    assert first.data.shape[0] + rest.data.shape[0] == rows.data.shape[0]
    assert at_first is not None and at_rest is not None and (at_first.shape, at_rest.shape) == ((6,), (3,))
    assert cut.home_rows(meta(6, 2)).shape == (6, 2)
