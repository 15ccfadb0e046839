"""launcher=process when things go wrong: every rank ends within seconds, and the error says what happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_runtime import LLM, CheckpointError, CommunicationError, EngineClosedError
from moe_runtime.comm.process import host_store
from moe_runtime.launch.build import LoadProgress
from moe_runtime.launch.compose import compose
from moe_runtime.launch.executors.process import Children
from tests.api.tiny import alone, damage, greedy, tokens, write_tiny
from tests.launch.processes import children, descendants, finish, wait_gone, workers

WITHIN_S = 60.0
"""For everything to end after a fault, on a busy machine (2 s on an idle one); the run's own timeout is far longer."""
PROCESS = ["launcher=process", "comm_timeout_s=600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - for the test to look at
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_a_rank_that_is_killed_while_it_generates(folder: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(str(folder), ep=3, overrides=PROCESS)
    pids = workers()
    began = threading.Event()

    def stream() -> None:
        for _ in llm.stream([5, 6], greedy(250)):
            began.set()

    waiting = [in_background(stream), in_background(lambda: llm.generate([[7]] * 8, greedy(250)))]
    assert began.wait(30)
    os.kill(pids[1], signal.SIGKILL)
    killed_at = time.monotonic()
    for thread, errors in waiting:
        thread.join(timeout=WITHIN_S)
        assert not thread.is_alive()
        (error,) = errors
        assert isinstance(error, EngineClosedError)
        assert f"rank 2's process {pids[1]} was killed by SIGKILL" in str(error)
    wait_gone(pids, within_s=max(0.1, WITHIN_S - (time.monotonic() - killed_at)))
    with pytest.raises(EngineClosedError, match="rank 2's process"):
        llm.generate([[5]])
    assert llm.snapshot().state == "failed"
    llm.close()
    assert workers() == []
    assert set(threading.enumerate()) == before


@pytest.mark.slow
def test_a_rank_that_is_killed_while_idle_and_a_new_start(folder: Path) -> None:
    with LLM(str(folder), ep=2, overrides=PROCESS) as llm:
        (pid,) = workers()
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + WITHIN_S
        while llm.snapshot().state == "running" and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(EngineClosedError, match="rank 1's process"):
            llm.generate([[5]])
    with LLM(str(folder), ep=2, overrides=PROCESS) as llm:
        assert tokens(llm.generate([[5]], greedy(3))) == alone(folder, [[5]], greedy(3))


@pytest.mark.parametrize("moment", [pytest.param("starting", marks=pytest.mark.slow), "loading"])
def test_a_rank_that_is_killed_before_it_runs(folder: Path, moment: str) -> None:
    killed: list[int] = []

    def kill(progress: LoadProgress | None = None) -> None:
        while not killed and (found := workers()[1:]):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])

    def kill_first_sight() -> None:
        while not killed:
            kill()

    composed = compose([f"model={folder}", "ep=3", *PROCESS])
    if moment == "starting":
        threading.Thread(target=kill_first_sight).start()
    began = time.monotonic()
    with pytest.raises(CommunicationError, match=r"rank 2's process \d+ was killed by SIGKILL"):
        LLM.from_composed(composed, on_progress=kill if moment == "loading" else lambda _: None)
    assert time.monotonic() - began < 2 * WITHIN_S
    assert workers() == []


def test_a_rank_that_has_ended_before_it_is_told_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def ended(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        child = popen([sys.executable, "-c", "raise SystemExit(9)"], **options)
        child.wait()
        return child

    monkeypatch.setattr(subprocess, "Popen", ended)
    started = Children(host_store(deadline_s=WITHIN_S))
    started.start(2, deadline_s=WITHIN_S)
    with pytest.raises(CommunicationError, match="not all ranks have started") as told:
        started.wait_until_ready()
    assert re.match(r"rank 1's process \d+ ended with exit code 9\. not all ranks", str(started.explain(told.value)))
    started.end()


def test_a_broken_tensor_that_only_another_rank_reads(folder: Path, tmp_path: Path) -> None:
    broken = write_tiny(tmp_path / "model")
    damage(broken, "model.layers.1.mlp.experts.7.up_proj.weight")
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        LLM(str(broken), ep=2, overrides=PROCESS)
    assert str(caught.value).count("experts.7.up_proj") == 1
    assert "rank 1 could not load its part" in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert time.monotonic() - began < 2 * WITHIN_S
    assert workers() == []


def test_a_checkpoint_that_nobody_can_open(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = write_tiny(tmp_path / "model")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(broken), ep=2, overrides=PROCESS)
    assert workers() == []
    assert capfd.readouterr() == ("", "")


def test_a_rank_that_loads_for_longer_than_the_timeout_of_a_step(folder: Path) -> None:
    composed = compose([f"model={folder}", "ep=2", "launcher=process", "comm_timeout_s=4"])
    with LLM.from_composed(composed, on_progress=lambda _: time.sleep(2.0)) as llm:
        assert tokens(llm.generate([[5]], greedy(3))) == alone(folder, [[5]], greedy(3))


@pytest.mark.slow
def test_a_rank_that_never_ends_loading_is_waited_for_so_long(folder: Path) -> None:
    composed = compose([f"model={folder}", "ep=2", *PROCESS, "load_timeout_s=1"])
    with pytest.raises(CommunicationError, match="rank 0 waited .* in collect #0 of world"):
        LLM.from_composed(composed, on_progress=lambda _: time.sleep(1.5))
    assert workers() == []


SCRIPT = """
import sys
from moe_runtime import LLM, SamplingParams
llm = LLM(sys.argv[1], ep=2, overrides=["launcher=process"])
print("ready", flush=True)
for output in llm.stream([5], SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)):
    print("token", flush=True)
print(sys.stdin.readline(), flush=True)
"""


@pytest.mark.parametrize("moment", [pytest.param("ready", marks=pytest.mark.slow), "token"])
def test_a_parent_that_is_killed(folder: Path, moment: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    while (line := parent.stdout.readline()) != f"{moment}\n":
        assert line, "the parent has ended"
    found = descendants(parent.pid)
    assert len(found) == 1
    parent.kill()
    wait_gone(found, within_s=WITHIN_S)
    finish(parent, within_s=5)


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "moe_runtime", f"model={folder}", "ep=2", "launcher=process", *words]


@pytest.mark.slow
def test_ctrl_c(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [5, 6]}\n' * 4000, encoding="utf-8")
    process = subprocess.Popen(
        command(folder, f"prompts={prompts}", "sampling.max_tokens=200", "sampling.ignore_eos=true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("generating"):
        assert line, process.stderr.read() if process.stderr else ""
    found = children(process.pid)
    assert len(found) == 1
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = finish(process, within_s=2 * WITHIN_S)
    assert process.returncode == 130
    assert err == "interrupted\n"
    wait_gone(found, within_s=0.1)


@pytest.mark.slow
def test_the_command_line_tells_a_broken_tensor_once(tmp_path: Path) -> None:
    broken = write_tiny(tmp_path / "model")
    damage(broken, "model.layers.1.mlp.experts.7.up_proj.weight")
    process = subprocess.Popen(command(broken), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, err = finish(process, within_s=100)
    assert process.returncode == 2
    assert err.startswith("CheckpointError: ")
    assert err.count("experts.7.up_proj") == 1
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("timeout_s", [3.0, 0.8])
def test_idle_for_longer_than_the_timeout(folder: Path, timeout_s: float) -> None:
    with LLM(str(folder), ep=2, overrides=["launcher=process", f"comm_timeout_s={timeout_s}"]) as llm:
        time.sleep(timeout_s + 2)
        assert tokens(llm.generate([[5]], greedy(3))) == alone(folder, [[5]], greedy(3))
