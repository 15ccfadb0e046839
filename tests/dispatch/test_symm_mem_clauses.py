"""For every clause of the symmetric memory's double a wrong adapter that it catches and that passes with it off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.symm_mem import dispatcher as adapter
from moe_runtime.dispatch.symm_mem import sizes
from moe_runtime.dispatch.symm_mem.dispatcher import SymmMemDispatcher
from moe_runtime.dispatch.symm_mem.sizes import Room
from moe_runtime.errors import CommunicationError
from tests.dispatch import contract
from tests.dispatch.contract import Case, make_case
from tests.dispatch.symm_mem_backend import Symmetric
from tests.dispatch.test_contract import on_ranks
from tests.doubles.symm_mem import SymmMem, symm_mem_clauses

Patch = Callable[[pytest.MonkeyPatch], None]
CASE = replace(make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], hidden=8), phase=Phase.DECODE)
EMPTY_SLOTS = make_case(ep=2, slots=3, top_k=1, tokens=[2, 1], hidden=8, only_slot=2)


def one_dispatch(ep: Communicator, backend: Symmetric) -> None:
    case = backend.case
    dispatcher = backend.make(ep, case.slots)
    y = contract.through(dispatcher, case, ep.rank, contract.marked)
    contract.assert_law(dispatcher, y, contract.oracle(case, ep.rank, contract.marked), f"rank {ep.rank}")


def captured_dispatch(ep: Communicator, backend: Symmetric) -> None:
    library = backend.library(ep)
    dispatcher = backend.make_with(library, ep)
    with library.capturing():
        contract.through(dispatcher, backend.case, ep.rank, contract.marked)


def zeroed_gaps(ep: Communicator, backend: Symmetric) -> None:
    """As if what was zeroed before stayed so."""
    dispatcher = backend.make(ep, backend.case.slots)
    away = dispatcher._lanes[0].away.zero_()
    dispatcher.dispatch_begin(backend.case.x[ep.rank], backend.case.routing[ep.rank], backend.case.step).wait()
    assert not away[-8:].any(), "a gap is not zero"


def with_argument(method: str, name: str, change: Callable[[Tensor], Any]) -> Patch:
    """An operator is called with another argument."""
    order = {"input": 0, "out": 1, "in_splits": 2, "major_align": 5}

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = getattr(SymmMem, method)

        def wrong(library: SymmMem, *arguments: Any) -> None:
            changed = list(arguments)
            changed[order[name]] = change(changed[order[name]])
            right(library, *changed)

        patch.setattr(SymmMem, method, wrong)

    return apply


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """`owner.name` becomes `make(what it was)`."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def both(*patches: Patch) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        for one in patches:
            one(patch)

    return apply


def larger_on_others(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate(self: SymmMemDispatcher, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        more = 16 * self._ep.rank if dtype is torch.uint8 else 0
        return right(self, (shape[0] + more, *shape[1:]), dtype)

    return allocate


def ordinary(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Bytes from torch's own allocator."""

    def allocate(self: SymmMemDispatcher, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype) if dtype is torch.uint8 else right(self, shape, dtype)

    return allocate


def unannounced(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate(self: SymmMemDispatcher, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made: Tensor = self._library.empty(shape, dtype=dtype, device=self._device)
        return made

    return allocate


def lane_with(change: Callable[[SymmMemDispatcher, Any], None]) -> Patch:
    def make(right: Callable[[SymmMemDispatcher], Any]) -> Callable[[SymmMemDispatcher], Any]:
        def lane(self: SymmMemDispatcher) -> Any:
            made = right(self)
            change(self, made)
            return made

        return lane

    return replaced(SymmMemDispatcher, "_lane", make)


def announce_backwards_on_odd_ranks(self: SymmMemDispatcher, lane: Any) -> None:
    tensors = [lane.home, lane.away, lane.splits, lane.arrived, lane.returned]
    for tensor in reversed(tensors) if self._ep.rank % 2 else tensors:
        self._library.rendezvous(tensor, self._group_name)


def offsets_by_columns(self: SymmMemDispatcher, lane: Any) -> None:
    lane.arrived = self._allocate((self._spec.num_physical, 2), torch.int64).t()


def small_splits(self: SymmMemDispatcher, lane: Any) -> None:
    lane.splits = self._allocate((self._spec.num_physical,), torch.int32)


def one_tensor_of_offsets(self: SymmMemDispatcher, lane: Any) -> None:
    lane.returned = lane.arrived


def added_to_what_was_there(right: Callable[..., Any]) -> Callable[..., Any]:
    def sort(self: SymmMemDispatcher, lane: Any, ids: Tensor, **named: Any) -> Any:
        before = lane.splits.clone()
        found = right(self, lane, ids, **named)
        lane.splits += before
        return found

    return sort


def overwriting_home(right: Callable[..., Any]) -> Callable[..., Any]:
    def receive(self: SymmMemDispatcher, arriving: Any) -> Any:
        arriving.lane.home.zero_()
        return right(self, arriving)

    return receive


def sums_for_offsets(patch: pytest.MonkeyPatch) -> None:
    """Where rows begin by the splits alone."""
    right = SymmMem.all_to_all_vdev_2d

    def wrong(library: SymmMem, *arguments: Any) -> None:
        right(library, *arguments)
        splits, offsets = arguments[3]
        offsets.copy_(splits.cumsum(0) - splits)

    patch.setattr(SymmMem, "all_to_all_vdev_2d", wrong)


def no_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sizes, "HEAD_ROWS", 0)
    patch.setattr(adapter, "HEAD_ROWS", 0)


def nothing(patch: pytest.MonkeyPatch) -> None: ...


def many_ranks(ep: int) -> Case:
    return make_case(ep=ep, slots=1, top_k=1, tokens=[1] * ep, hidden=4)


@dataclass(frozen=True)
class Wrong:
    """An adapter that breaks one clause. `passes`: it does its work where the clause is off. `says`: what is seen of
    it, if not an error that names the clause. `besides`: clauses that would come first."""

    apply: Patch
    program: Callable[[Communicator, Symmetric], None] = one_dispatch
    case: Case = CASE
    passes: bool = True
    says: str = ""
    besides: tuple[str, ...] = ()


OUT, HOME = "all_to_all_vdev_2d", "all_to_all_vdev_2d_offset"
FROM_ELSEWHERE = "fetched (rows|outputs) from the wrong place"
WRONG = {
    "backend": Wrong(replaced(SymmMem, "set_backend", lambda right: lambda self, name: None)),
    "same_size": Wrong(replaced(SymmMemDispatcher, "_allocate", larger_on_others)),
    "nothing_zeroed": Wrong(replaced(SymmMemDispatcher, "_sort", added_to_what_was_there), says="not_negative: "),
    "symmetric": Wrong(replaced(SymmMemDispatcher, "_allocate", ordinary)),
    "same_order": Wrong(
        both(replaced(SymmMemDispatcher, "_allocate", unannounced), lane_with(announce_backwards_on_odd_ranks))
    ),
    "no_capture": Wrong(replaced(SymmMemDispatcher, "_allocate", unannounced), captured_dispatch),
    "ranks_out": Wrong(nothing, case=many_ranks(33), besides=("late_block", "ranks_home")),
    "ranks_home": Wrong(nothing, case=many_ranks(17), besides=("late_block",)),
    "slots_out": Wrong(nothing, case=make_case(ep=1, slots=17, top_k=2, tokens=[2])),
    "slots_home": Wrong(nothing, case=make_case(ep=1, slots=33, top_k=2, tokens=[2]), besides=("slots_out",)),
    "align": Wrong(with_argument(OUT, "major_align", lambda align: 0)),
    "contiguous": Wrong(lane_with(offsets_by_columns)),
    "two_rows": Wrong(with_argument(OUT, "in_splits", lambda splits: splits.view(2, -1))),
    "same_rows": Wrong(with_argument(HOME, "out", lambda out: out.view(torch.int32))),
    "int64": Wrong(lane_with(small_splits)),
    "fits": Wrong(with_argument(OUT, "input", lambda wire: wire[: sizes.HEAD_ROWS]), passes=False),
    "not_negative": Wrong(with_argument(OUT, "in_splits", lambda splits: splits.sub_(9)), passes=False),
    "room": Wrong(replaced(Room, "away_rows", lambda right: lambda self, tokens: 2), passes=False),
    "gaps": Wrong(nothing, zeroed_gaps, says="a gap is not zero"),
    "empty_slot": Wrong(sums_for_offsets, case=EMPTY_SLOTS, says=FROM_ELSEWHERE),
    "no_exit": Wrong(replaced(SymmMemDispatcher, "_receive", overwriting_home)),
    "offsets_in_use": Wrong(lane_with(one_tensor_of_offsets)),
    "late_block": Wrong(no_heads, case=EMPTY_SLOTS, says=FROM_ELSEWHERE),
}


@pytest.mark.parametrize("clause", [clause.name for clause in symm_mem_clauses()])
def test_the_clause_catches_a_wrong_adapter(clause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = WRONG[clause]
    wrong.apply(monkeypatch)
    backend = Symmetric(wrong.case, without=wrong.besides)
    with pytest.raises(CommunicationError, match=wrong.says or f"{clause}: "):
        on_ranks(wrong.case.ep, lambda ep: wrong.program(ep, backend))
    if wrong.passes:
        without = replace(backend, without=(*wrong.besides, clause))
        on_ranks(wrong.case.ep, lambda ep: wrong.program(ep, without))


@pytest.mark.parametrize("case", [CASE, EMPTY_SLOTS])
@pytest.mark.parametrize("program", [one_dispatch, captured_dispatch])
def test_the_right_adapter_passes(program: Callable[[Communicator, Symmetric], None], case: Case) -> None:
    on_ranks(2, lambda ep: program(ep, Symmetric(case)))


def test_late_blocks_beyond_the_limits_are_seen() -> None:
    """9 ranks share 8 blocks: rows of second splits come from elsewhere, and nobody sums them."""
    case = make_case(ep=9, slots=2, top_k=2, tokens=[3] * 9)
    assert sizes.unfit(Symmetric(case).spec(9)) is not None
    with pytest.raises(CommunicationError, match=FROM_ELSEWHERE):
        on_ranks(9, lambda ep: one_dispatch(ep, Symmetric(case)))


def test_late_blocks_on_the_way_home_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head rows for the way out alone: a rank that sent nothing to slot 0 fetches outputs from elsewhere."""
    right = SymmMemDispatcher.__init__

    def without_heads_home(self: SymmMemDispatcher, ep: Communicator, spec: Any, **named: Any) -> None:
        right(self, ep, spec, **named)
        if ep.rank:
            self._heads[0] = 0
        else:
            self._heads_away[1 : ep.size] = 0
            self._num_heads_away = sizes.HEAD_ROWS

    monkeypatch.setattr(SymmMemDispatcher, "__init__", without_heads_home)
    with pytest.raises(CommunicationError, match="fetched outputs from the wrong place"):
        on_ranks(2, lambda ep: one_dispatch(ep, Symmetric(EMPTY_SLOTS)))
    on_ranks(2, lambda ep: one_dispatch(ep, Symmetric(EMPTY_SLOTS, without=("late_block",))))


def test_the_error_names_the_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    WRONG["align"].apply(monkeypatch)
    with pytest.raises(CommunicationError, match=r"align: 0; major_align is positive \(ext:638\)"):
        on_ranks(2, lambda ep: one_dispatch(ep, Symmetric(CASE)))
