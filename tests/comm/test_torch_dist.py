"""The contract on gloo processes, bit for bit what virtual ranks give; every fault by name, within the deadline."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import pytest

from moe_runtime.comm.process import Backend, host_store, init_process, join_store
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.errors import CommunicationError, ConfigError
from tests.comm.contract import PROGRAMS
from tests.comm.gloo_faults import FAULTS
from tests.comm.gloo_pool import GlooPool, Outcome

MESHES = [(2, 1), (1, 2), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    with pytest.MonkeyPatch.context() as patch:
        # gloo itself reads this one: bind loopback, whatever the machine's name resolves to.
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        with GlooPool(4, {**PROGRAMS, **FAULTS}) as running:
            yield running


def alive(outcomes: list[Outcome | None]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome is not None]


@pytest.mark.parametrize(("dp", "tp"), MESHES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_contract_and_agreement_with_virtual_ranks(pool: GlooPool, program: str, dp: int, tp: int) -> None:
    outcomes = alive(pool.run(program, dp=dp, tp=tp))
    with VirtualCluster(dp * tp, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=dp, tp=tp)
        virtual = cluster.run(lambda rank: PROGRAMS[program](groups[rank], 0))
    assert outcomes == [Outcome(value=value) for value in virtual]


@pytest.mark.parametrize("program", ["all_to_all", "control", "begin_and_wait"])
def test_contract_while_verifying(pool: GlooPool, program: str) -> None:
    assert [outcome.error for outcome in alive(pool.run(program, dp=2, verify=True))] == [None, None]


# What rank 0 says. {}: program, deadline_s, verify, text
WORDS: dict[str, tuple[float, bool, str]] = {
    "is_busy": (
        1.0,
        False,
        r"rank 0 waited for [12]\.\d s in all_gather #0 of ep \(step 7, layer 3\): Timed out waiting 1000ms .*\n"
        r"rank 1 is busy after barrier #0 of world \(step 7, layer 3\)\.",
    ),
    "crosses": (
        1.0,
        False,
        r"rank 0 waited for [12]\.\d s in all_gather #0 of ep \(step 7, layer 3\): .*\n"
        r"rank 1 waits in exchange #1 of world \(step 7, layer 3\)\.",
    ),
    "leaves": (30.0, False, r"rank 0 waited .* in all_reduce #0 of ep .*\nrank 1 has left \(step 7, layer 3\)\."),
    "raises": (
        30.0,
        False,
        r"in all_reduce #0 of ep .*\nrank 1 has left after ValueError: a bad weight \(step 7, layer 3\)\.",
    ),
    "other_call": (
        30.0,
        True,
        r"all_to_all #0 of ep \(step 7, layer 3\): rank 0 is in all_to_all #0 \[2\] torch.float32 of ep; "
        r"rank 1 is in reduce_scatter #0 \[2, 2\] torch.float32 of ep\.",
    ),
    "other_shape": (
        30.0,
        True,
        r"rank 0 is in all_reduce #0 \[4, 2\] torch.float32 of ep; rank 1 is in all_reduce #0 \[5, 2\] torch.float32",
    ),
    "wrong_recv_counts": (30.0, True, r"rank 1 expects 2 rows from rank 1, which sends it 1"),
    "too_few_rows": (30.0, False, r"\nrank 1 has left after DisagreementError: rank 1 gives all_to_all 1 rows but"),
}


@pytest.mark.parametrize("fault", WORDS)
def test_faults_are_named(pool: GlooPool, fault: str) -> None:
    deadline_s, verify, words = WORDS[fault]
    started = time.monotonic()
    first, *_ = alive(pool.run(fault, dp=2, deadline_s=deadline_s, verify=verify))
    assert first.error == "CommunicationError"
    assert re.search(words, first.text), first.text
    assert time.monotonic() - started < deadline_s + 10
    assert first.threads == ()


def test_a_fault_stays(pool: GlooPool) -> None:
    outcomes = alive(pool.run("goes_on", dp=1, tp=2, deadline_s=1.0))
    for outcome in outcomes:
        assert outcome.error is None
        first, second = outcome.value
        assert first == second != "met"
    assert "rank 1 waits in recv #0 of tp from rank 0 (step 0)" in outcomes[0].value[0]


def test_four_ranks_name_the_one_that_is_elsewhere(pool: GlooPool) -> None:
    outcomes = alive(pool.run("is_busy", dp=4, deadline_s=1.0))
    for rank in (0, 2, 3):
        assert "rank 1 is busy after barrier #0 of world (step 7, layer 3)" in outcomes[rank].text
    assert "ranks 2-3 wait in all_gather #0 of ep" in outcomes[0].text


def test_a_dead_process_is_named() -> None:
    with GlooPool(2, FAULTS) as pair:
        first, second = pair.run("dies", dp=2, deadline_s=30.0)
    assert second is None
    assert first is not None
    assert re.search(r"in all_reduce #0 of ep .*\nrank 1 gave no sign of life within 2 s\.", first.text), first.text


def test_leaving_right_after_the_last_call_loses_nothing(pool: GlooPool) -> None:
    for seed in range(5):
        outcomes = pool.run("hurries", dp=4, seed=seed, deadline_s=30.0)
        assert outcomes == [Outcome(value=["8000.0"])] * 4


def test_stores_choose_their_ports() -> None:
    first, second = host_store(deadline_s=5), host_store(deadline_s=5)
    assert first.port != second.port
    joined = join_store("127.0.0.1", first.port, deadline_s=5)
    first.set("a", "1")
    assert joined.get("a") == b"1"


def test_nobody_at_the_address() -> None:
    store = host_store(deadline_s=5)
    port = store.port
    del store
    with pytest.raises(CommunicationError, match=rf"no store answers at 127.0.0.1:{port} within 0.5 s"):
        join_store("127.0.0.1", port, deadline_s=0.5)


def test_absent_processes_are_named() -> None:
    store = host_store(deadline_s=5)
    with pytest.raises(CommunicationError, match=r"rank 1 could not join 4 processes in 0.5 s: ranks 0, 2-3 did not"):
        init_process(1, 4, store=store, backend="gloo", deadline_s=0.5)


def test_a_store_that_ends_while_processes_meet_is_named() -> None:
    stores = [host_store(deadline_s=5)]
    joined = join_store("127.0.0.1", stores[0].port, deadline_s=5)
    threading.Timer(0.3, stores.clear).start()
    with pytest.raises(CommunicationError, match="the store where they meet is gone"):
        init_process(1, 2, store=joined, backend="gloo", deadline_s=3)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("nccl", "cpu", "backend=nccl on device=cpu: these do not fit. Use backend=gloo."),
        ("gloo", "cuda:0", "backend=gloo on device=cuda:0: these do not fit. Use backend=nccl."),
        ("nccl", "cuda", "device=cuda: nccl needs the device's number. Use cuda:<local rank>."),
    ],
)
def test_misfits_are_named(backend: Backend, device: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        init_process(0, 1, store=host_store(deadline_s=5), backend=backend, deadline_s=5, device=device)
    assert str(caught.value) == message
