"""How the processes of a torchrun world agree on a run, where rank 0 serves their store."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_runtime.comm.process import host_store, join_store
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.errors import CommunicationError, ConfigError, MoeRuntimeError
from moe_runtime.launch import meeting
from moe_runtime.launch.build import ProcessParts
from moe_runtime.launch.compose import compose
from moe_runtime.launch.env import TorchrunEnv
from moe_runtime.launch.executors import torchrun
from moe_runtime.launch.meeting import Meeting, decide
from tests.api.tiny import write_tiny


def places(port: int, *, local_world_size: int = 2) -> list[TorchrunEnv]:
    return [TorchrunEnv(rank, 2, rank, local_world_size, "127.0.0.1", port, agent_store=False) for rank in range(2)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def error_of(work: Callable[[], object]) -> BaseException | None:
    """What `work` raises; what it made is let go of at once, as when a process ends."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - for the test to look at
        return error.with_traceback(None)
    return None


def test_a_refusal_reaches_a_rank_that_comes_late() -> None:
    first, second = places(free_port())
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(error_of, lambda: decide(["epp=3"], torchrun=first))
        time.sleep(1.0)
        late = pool.submit(error_of, lambda: decide([], torchrun=second))
        for found in (refused, late):
            error = found.result(timeout=30)
            assert isinstance(error, ConfigError)
            assert "Did you mean 'ep'?" in str(error)


def test_any_error_of_one_rank_is_told_to_all() -> None:
    store = host_store(deadline_s=10)
    ranks = [Meeting(place, join_store("127.0.0.1", store.port, deadline_s=10)) for place in places(store.port)]
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        failed = pool.submit(error_of, lambda: ranks[0].together("its checkpoint", lambda: 1 // 0))
        told = pool.submit(error_of, lambda: ranks[1].together("its checkpoint", lambda: 1))
        for found in (failed, told):
            error = found.result(timeout=30)
            assert isinstance(error, MoeRuntimeError)
            assert "ZeroDivisionError" in str(error)
    assert time.monotonic() - began < 20


def test_a_store_that_goes_away_or_stays_silent_is_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING_DEADLINE_S", 0.5)
    store = host_store(deadline_s=10)
    other = Meeting(places(store.port)[1], join_store("127.0.0.1", store.port, deadline_s=10))
    with pytest.raises(CommunicationError, match="rank 1: rank 0 has not decided on a run within 0.5 s"):
        other.hear()
    with pytest.raises(CommunicationError, match="rank 1: not every rank was done with loading within 0.5 s"):
        other.together("loading", lambda: 1)
    del store
    with pytest.raises(CommunicationError, match="rank 1: not every rank was done with writing"):
        other.together("writing", lambda: 1)


@pytest.mark.parametrize("local_world_size", [2, 1])
def test_a_world_on_one_machine_listens_on_loopback(
    local_world_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """gloo's interface at the moment when the process groups are made."""
    store = host_store(deadline_s=10)
    (place, _), seen = places(store.port, local_world_size=local_world_size), list[str | None]()

    def init_process(*arguments: object, **options: object) -> None:
        seen.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        raise CommunicationError("far enough")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(torchrun, "init_process", init_process)
    composed = compose([f"model={write_tiny(tmp_path / 'model')}"])
    parts = ProcessParts.open(composed, ranks_in_process=1)
    owner = RequestOwner(mesh=composed.topology.mesh(), num_pages=1, check=lambda _: 0, decoder=None, idle_wait_s=1.0)
    with pytest.raises(CommunicationError, match="far enough"):
        torchrun.torchrun_rank(composed, parts, owner, meeting=Meeting(place, store), on_progress=lambda _: None)
    assert seen == ["lo" if local_world_size == 2 else None]
