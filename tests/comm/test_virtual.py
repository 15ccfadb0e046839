"""The contract on virtual ranks, and what only virtual ranks promise: sharing, determinism, any calling thread."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_runtime.comm import collectives
from moe_runtime.comm.base import Groups
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.errors import CommunicationError, ConfigError, EngineClosedError
from tests.comm.contract import PROGRAMS, data

MESHES = [(1, 1, 1), (1, 2, 1), (1, 1, 3), (1, 4, 2), (2, 2, 2)]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("pp", "dp", "tp"), MESHES)
def test_contract(program: str, pp: int, dp: int, tp: int) -> None:
    with VirtualCluster(pp * dp * tp, num_threads=1) as cluster:
        groups = virtual_groups(cluster, pp=pp, dp=dp, tp=tp)
        first = cluster.run(lambda rank: PROGRAMS[program](groups[rank], 0))
        assert cluster.run(lambda rank: PROGRAMS[program](groups[rank], 0)) == first


@pytest.mark.parametrize("program", ["all_reduce", "reduce_scatter"])
def test_the_contract_sees_a_sum_in_another_order(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = collectives.ordered_sum
    monkeypatch.setattr(collectives, "ordered_sum", lambda parts: right(list(reversed(parts))))
    with VirtualCluster(3, num_threads=1) as cluster:
        groups = virtual_groups(cluster, tp=3)
        with pytest.raises(CommunicationError) as caught:
            cluster.run(lambda rank: PROGRAMS[program](groups[rank], 0))
    assert isinstance(caught.value.__cause__, AssertionError)


def test_sixteen_bit_sums_accumulate_in_fp32() -> None:
    # 256 + 1 is not a bf16 number: adding one at a time in bf16 would stay at 256.
    parts = [torch.tensor([256.0]).bfloat16()] + [torch.tensor([1.0]).bfloat16()] * 4
    with VirtualCluster(5) as cluster:
        groups = virtual_groups(cluster, dp=5)
        totals = cluster.run(lambda rank: groups[rank].ep.all_reduce(parts[rank]).item())
    assert totals == [260.0] * 5


def test_gathered_rows_are_shared_between_ranks() -> None:
    with VirtualCluster(4) as cluster:
        groups = virtual_groups(cluster, tp=4)
        wholes = cluster.run(lambda rank: groups[rank].tp.all_gather(torch.ones(2, 3)).data_ptr())
    assert len(set(wholes)) == 1


def test_many_ranks() -> None:
    with VirtualCluster(320, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=80, tp=4)

        def program(rank: int) -> list[float]:
            mine = groups[rank]
            gathered = mine.tp.all_gather(torch.full((1, 4), float(rank)))
            back = mine.tp.reduce_scatter(gathered)
            send = [int((rank + k) % 320 == target) for target in range(320) for k in (7,)]
            recv = [int((source + 7) % 320 == rank) for source in range(320)]
            moved = mine.ep.all_to_all(back, send, recv)
            return [*moved[0, :1].tolist(), float(len(mine.world.exchange([rank])))]

        got = cluster.run(program)
    assert got == [[4.0 * ((rank - 7) % 320), 320.0] for rank in range(320)]


def test_built_in_one_thread_and_run_from_two_others() -> None:
    built: list[tuple[VirtualCluster, list[Groups]]] = []

    def build() -> None:
        cluster = VirtualCluster(4)
        built.append((cluster, virtual_groups(cluster, dp=2, tp=2)))

    _in_thread(build)
    cluster, groups = built[0]
    owner = cluster.call(threading.get_ident)
    seen: list[tuple[int, list[float]]] = []

    def generate() -> None:
        for _ in range(20):
            totals = cluster.run(lambda rank: groups[rank].world.all_reduce(torch.tensor([float(rank)])).item())
            seen.append((cluster.run(lambda rank: threading.get_ident())[3], totals))

    users = [threading.Thread(target=generate) for _ in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join(timeout=60)
    _in_thread(cluster.close)
    assert seen == [(owner, [6.0] * 4)] * 40


def test_programs_run_in_order_of_readiness_every_time() -> None:
    def trace(cluster: VirtualCluster, groups: list[Groups]) -> list[tuple[int, int]]:
        steps: list[tuple[int, int]] = []

        def program(rank: int) -> None:
            for turn in range(3):
                steps.append((turn, rank))
                groups[rank].tp.barrier()
                groups[rank].world.barrier()

        cluster.run(program)
        return steps

    with VirtualCluster(6) as cluster:
        groups = virtual_groups(cluster, dp=3, tp=2)
        first = trace(cluster, groups)
        assert trace(cluster, groups) == first
    assert first[:6] == [(0, rank) for rank in range(6)]


def test_a_begun_operation_does_not_switch() -> None:
    order: list[str] = []
    with VirtualCluster(2) as cluster:
        groups = virtual_groups(cluster, tp=2)

        def program(rank: int) -> None:
            pending = groups[rank].tp.all_gather_begin(torch.ones(1))
            order.append(f"begun {rank}")
            pending.wait()
            order.append(f"done {rank}")

        cluster.run(program)
    assert order == ["begun 0", "begun 1", "done 1", "done 0"]


def test_thread_modes_belong_to_the_cluster() -> None:
    threads = torch.get_num_threads()
    with VirtualCluster(2) as cluster:
        assert cluster.run(lambda rank: torch.is_inference_mode_enabled()) == [True, True]
    with VirtualCluster(2, inference_mode=False, num_threads=1) as cluster:
        assert cluster.run(lambda rank: torch.is_inference_mode_enabled()) == [False, False]
        assert cluster.call(torch.get_num_threads) == 1
    assert not torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == threads


def test_closing() -> None:
    cluster = VirtualCluster(2)
    groups = virtual_groups(cluster, tp=2)
    before = threading.active_count()
    cluster.close()
    cluster.close()
    assert threading.active_count() == before - 1
    for use in (lambda: cluster.run(lambda rank: rank), lambda: cluster.call(time.monotonic)):
        with pytest.raises(EngineClosedError, match="this virtual cluster is closed"):
            use()
    groups[0].close()
    with pytest.raises(EngineClosedError, match="barrier on a closed communicator"):
        groups[0].tp.barrier()


def test_a_forgotten_cluster_ends_its_thread() -> None:
    before = threading.active_count()

    def use_and_forget() -> weakref.ref[VirtualCluster]:
        cluster = VirtualCluster(2)
        groups = virtual_groups(cluster, tp=2)
        cluster.run(lambda rank: groups[rank].world.barrier())
        return weakref.ref(cluster)

    gone = use_and_forget()
    gc.collect()
    assert gone() is None
    _until(lambda: threading.active_count() == before)


def test_nothing_stays_behind_after_a_run() -> None:
    """Neither inputs nor results of a finished run are kept alive by the cluster."""
    kept: list[weakref.ref[Tensor]] = []
    with VirtualCluster(3) as cluster:
        groups = virtual_groups(cluster, tp=3)

        def program(rank: int) -> None:
            x = data((3, 2), torch.float32, rank).clone()
            kept.extend((weakref.ref(x), weakref.ref(groups[rank].tp.all_gather(x))))
            kept.append(weakref.ref(groups[rank].tp.all_to_all(x, [1] * 3, [1] * 3)))

        cluster.run(program)
        gc.collect()
        assert [ref() for ref in kept] == [None] * 9


def test_misfits_are_named() -> None:
    with pytest.raises(ConfigError, match="at least 1 rank"):
        VirtualCluster(0)
    with VirtualCluster(4) as cluster:
        with pytest.raises(ConfigError, match=r"pp=1, dp=3, tp=1: their product 3 must be the cluster's size 4"):
            virtual_groups(cluster, dp=3)
        with pytest.raises(CommunicationError, match="from a rank or call of the same cluster"):
            cluster.call(lambda: cluster.run(lambda rank: rank))
        assert cluster.call(lambda: cluster.call(lambda: 3)) == 3


def _in_thread(fn: Callable[[], None]) -> None:
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
