"""Every way in which virtual ranks can fail to meet: reported at once, by name, with all ranks unwound."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch
from greenlet import getcurrent, greenlet
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.comm.base import Groups
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.errors import CommunicationError, EngineClosedError
from tests.comm.virtual_faults import FAULTS, Fault, raises, rows


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named_and_everybody_is_unwound(fault: Fault) -> None:
    entered: set[int] = set()
    unwound: set[int] = set()
    programs: list[greenlet] = []
    with VirtualCluster(4, deadline_s=60) as cluster:
        groups = virtual_groups(cluster, dp=2, tp=2)

        def warm_up(rank: int) -> None:
            for comm in (groups[rank].world, groups[rank].ep, groups[rank].tp):
                comm.barrier()

        def program(rank: int) -> None:
            groups[rank].location.step, groups[rank].location.layer = 7, 3
            entered.add(rank)
            programs.append(getcurrent())
            try:
                fault(groups[rank], rank)
            finally:
                unwound.add(rank)

        cluster.run(warm_up)
        with pytest.raises(CommunicationError, match=FAULTS[fault]):
            cluster.run(program)
        assert entered == unwound >= {0, 1}
        # The communicators start afresh: same numbers, nothing left of the failed run.
        assert cluster.run(lambda rank: groups[rank].world.exchange([rank])) == [((0,), (1,), (2,), (3,))] * 4
    assert programs
    assert all(program.dead for program in programs)


def test_the_exception_of_a_rank_is_the_cause() -> None:
    with VirtualCluster(4) as cluster:
        groups = virtual_groups(cluster, dp=4)
        with pytest.raises(CommunicationError) as caught:
            cluster.run(lambda rank: raises(groups[rank], rank))
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.__cause__.args == ("a bad weight",)


def test_a_rank_cannot_go_on_by_catching_the_error() -> None:
    calls: list[str] = []
    with VirtualCluster(2) as cluster:
        groups = virtual_groups(cluster, tp=2)

        def program(rank: int) -> None:
            try:
                groups[rank].tp.all_reduce(rows(rank + 1))
            except CommunicationError:
                calls.append("caught")
                groups[rank].tp.barrier()
                calls.append("went on")

        with pytest.raises(CommunicationError, match="all_reduce #0 of tp with"):
            cluster.run(program)
    assert calls == ["caught"]


def test_calls_while_a_rank_is_stopped_are_refused_and_its_troubles_noted() -> None:
    with VirtualCluster(3) as cluster:
        groups = virtual_groups(cluster, tp=3)

        def program(rank: int) -> None:
            if rank == 2:
                raise ValueError("first")
            try:
                groups[rank].tp.barrier()
            finally:
                if rank == 0:
                    groups[rank].tp.barrier()
                raise KeyError("second")

        with pytest.raises(CommunicationError, match="rank 2 raised ValueError") as caught:
            cluster.run(program)
    assert [note.split(" while ")[0] for note in caught.value.__notes__] == [
        "rank 0 raised CommunicationError",
        "rank 1 raised KeyError",
    ]


def test_a_communicator_is_for_its_own_rank_inside_a_run() -> None:
    with VirtualCluster(2) as cluster:
        groups = virtual_groups(cluster, tp=2)
        with pytest.raises(CommunicationError, match="rank 0 was called from outside that rank's program"):
            groups[0].tp.barrier()
        with pytest.raises(CommunicationError, match="rank 1 was called from outside that rank's program"):
            cluster.run(lambda rank: groups[1].tp.barrier())


@pytest.mark.usefixtures("interruptible")
def test_keyboard_interrupt_in_the_caller_stops_the_ranks() -> None:
    unwound: list[int] = []
    main = threading.main_thread().ident
    assert threading.get_ident() == main
    with VirtualCluster(3) as cluster:
        groups = virtual_groups(cluster, tp=3)

        def program(rank: int) -> None:
            try:
                for turn in range(10**9):
                    if turn == 50 and rank == 0 and main is not None:
                        signal.pthread_kill(main, signal.SIGINT)
                    groups[rank].tp.barrier()
            finally:
                unwound.append(rank)

        with pytest.raises(KeyboardInterrupt):
            cluster.run(program)
        assert sorted(unwound) == [0, 1, 2]
        assert cluster.run(lambda rank: rank) == [0, 1, 2]


def test_a_rank_that_never_yields_meets_the_deadline() -> None:
    stop = threading.Event()
    cluster = VirtualCluster(3, deadline_s=0.2)
    groups = virtual_groups(cluster, tp=3)
    unwound: list[int] = []

    def program(rank: int) -> None:
        groups[rank].location.step = 5
        try:
            groups[rank].tp.barrier()
            if rank == 1:
                stop.wait(60)
            groups[rank].tp.barrier()
        finally:
            unwound.append(rank)

    with pytest.raises(CommunicationError, match=r"rank 1 \(step 5\) has held the cluster's thread for 0.2 s"):
        cluster.run(program)
    with pytest.raises(EngineClosedError):
        cluster.run(program)
    stop.set()
    end = time.monotonic() + 10
    while len(unwound) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(unwound) == [0, 1, 2]


def test_slow_ranks_that_yield_meet_no_deadline() -> None:
    with VirtualCluster(2, deadline_s=0.3) as cluster:
        groups = virtual_groups(cluster, tp=2)

        def program(rank: int) -> int:
            for _ in range(4):
                time.sleep(0.1)
                groups[rank].tp.barrier()
            return rank

        assert cluster.run(program) == [0, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**30),
    dp=st.integers(1, 3),
    tp=st.integers(1, 3),
    kind=st.sampled_from(["raise", "return", "skip", "repeat", "shape"]),
    when=st.integers(0, 11),
    where=st.integers(0, 8),
)
def test_any_fault_anywhere_ends_the_run(seed: int, dp: int, tp: int, kind: str, when: int, where: int) -> None:
    """One rank departs from a random sequence of calls: the run fails at once, unless the fault shows in nothing."""
    world, culprit = dp * tp, where % (dp * tp)
    entered: set[int] = set()
    unwound: set[int] = set()
    with VirtualCluster(world, deadline_s=60) as cluster:
        groups = virtual_groups(cluster, dp=dp, tp=tp)
        generator = torch.Generator().manual_seed(seed)
        calls = torch.randint(0, 9, (12,), generator=generator).tolist()

        def program(rank: int) -> int:
            mine = groups[rank]
            entered.add(rank)
            try:
                for turn, call in enumerate([*calls, 0]):
                    faulty = rank == culprit and turn == when
                    if faulty and kind == "raise":
                        raise ValueError("on purpose")
                    if faulty and kind == "return":
                        break
                    for _ in range({"skip": 0, "repeat": 2}.get(kind, 1) if faulty else 1):
                        make_call(mine, call, 3 if faulty and kind == "shape" else 2)
            finally:
                unwound.add(rank)
            return rank

        harmless = world == 1 or (len(groups[culprit].tp.ranks) == 1 and calls[when] % 3 == 1)
        harmless |= len(groups[culprit].dp.ranks) == 1 and calls[when] % 3 == 2
        if kind == "raise" or not (harmless or (kind == "shape" and calls[when] // 3 == 2)):
            with pytest.raises(CommunicationError):
                cluster.run(program)
        else:
            try:
                assert cluster.run(program) == list(range(world))
            except CommunicationError:
                assert kind in ("return", "shape")
        assert entered == unwound
        assert cluster.run(lambda rank: len(groups[rank].world.exchange([rank]))) == [world] * world


def make_call(mine: Groups, call: int, n: int) -> None:
    comm = (mine.world, mine.tp, mine.dp)[call % 3]
    match call // 3:
        case 0:
            comm.all_gather(torch.ones(n, 2))
        case 1:
            comm.reduce_scatter_begin(torch.ones(comm.size * n, 2)).wait()
        case _:
            comm.barrier()
