"""launcher=process: ranks as children of this process, in good times."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_runtime import LLM, ConfigError
from moe_runtime.engine.owner import IDLE_WAIT_S
from tests.api.tiny import alone, greedy, tokens, write_tiny
from tests.launch.processes import listening_addresses, wait_gone, workers

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43], [3, 3], [200, 100]]
OTHER_INTERFACES = [name for _, name in socket.if_nameindex() if name not in ("lo", "lo0")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Three processes; gloo is told to use a network interface, as a cluster's administrator may."""
    before = set(threading.enumerate())
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if OTHER_INTERFACES:
            patch.setenv("GLOO_SOCKET_IFNAME", OTHER_INTERFACES[0])
        with LLM(str(folder), ep=3, overrides=["launcher=process", "comm_timeout_s=600"]) as started:
            if OTHER_INTERFACES:
                assert os.environ["GLOO_SOCKET_IFNAME"] == OTHER_INTERFACES[0]
            pids = workers()
            assert len(pids) == 2
            yield started
            began = time.monotonic()
        assert time.monotonic() - began < 60
    wait_gone(pids, within_s=0.1)
    assert set(threading.enumerate()) == before
    assert torch.get_num_threads() == num_threads


def test_same_tokens_as_alone(llm: LLM, folder: Path) -> None:
    assert llm.owns_requests
    outputs = llm.generate(PROMPTS, greedy(10))
    assert tokens(outputs) == alone(folder, PROMPTS, greedy(10))
    assert [list(output.prompt_token_ids) for output in outputs] == PROMPTS
    assert int(llm.expert_load().sum()) > 0
    snapshot = llm.snapshot()
    assert len(snapshot.groups) == 3
    assert snapshot.mesh.ep == 3


def test_everything_listens_on_loopback_only(llm: LLM) -> None:
    for pid in (os.getpid(), *workers()):
        assert listening_addresses(pid) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert listening_addresses(os.getpid())


def test_children_are_out_of_reach_of_ctrl_c(llm: LLM) -> None:
    for pid in workers():
        assert os.getpgid(pid) != os.getpgid(0)


def test_idle_steps_tell_the_others_that_rank_0_lives(llm: LLM) -> None:
    steps = llm.num_steps
    time.sleep(2 * IDLE_WAIT_S)
    assert 0 < llm.num_steps - steps < 5
    assert len(llm.generate([[5, 6]], greedy(3))[0].outputs[0].token_ids) == 3


def test_streams_and_several_threads(llm: LLM, folder: Path) -> None:
    expected = alone(folder, PROMPTS, greedy(6))
    found: dict[int, tuple[int, ...]] = {}

    def work(index: int) -> None:
        for output in llm.stream(PROMPTS[index], greedy(6)):
            found[index] = output.outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[index] for index in range(len(PROMPTS))] == expected


def test_modules_in_the_current_folder_are_not_found_first(folder: Path, tmp_path: Path) -> None:
    """As with the console script, whose own folder stands in that place."""
    for name in ("here", "scripts"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "queue.py").write_text("raise AssertionError('this is not the queue of Python')")
    script = tmp_path / "scripts" / "run.py"
    script.write_text(
        "import sys; from moe_runtime import LLM\n"
        "with LLM(sys.argv[1], ep=2, overrides=['launcher=process', 'comm_timeout_s=600']) as llm: print('runs')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], cwd=tmp_path / "here", capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "runs\n"), done.stderr


def test_one_at_a_time(llm: LLM, folder: Path) -> None:
    pids = workers()
    with pytest.raises(ConfigError, match="already initialised"):
        LLM(str(folder), ep=2, overrides=["launcher=process"])
    assert workers() == pids
    assert tokens(llm.generate([[5]], greedy(2))) == alone(folder, [[5]], greedy(2))
