"""How an LLM ends: closed, dropped, failed, with threads waiting; and that nothing of it stays."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_runtime import LLM, CheckpointError, CommunicationError, ConfigError, EngineClosedError
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.runner import Runner
from moe_runtime.launch.executors.virtual import VirtualExecutor
from tests.api.tiny import alone, damage, greedy, tokens, wait_until_idle, write_tiny

OVERRIDES = ["num_threads=1"]


class Tensors:
    """Weak references to the caches of the engines built while it watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.caches: list[weakref.ref[torch.Tensor]] = []
        serve = RankEngine.serve

        def watched(engine: RankEngine) -> None:
            cache = engine.runner.cache.layers[0]
            assert isinstance(cache, torch.Tensor)
            self.caches.append(weakref.ref(cache))
            serve(engine)

        monkeypatch.setattr(RankEngine, "serve", watched)

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(cache() is not None for cache in self.caches)


def test_with_releases_threads_memory_and_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors(monkeypatch)
    before = set(threading.enumerate())
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    num_threads = torch.get_num_threads()
    with LLM(str(folder), ep=8, tp=2) as llm:
        llm.generate([[5, 6, 7]], greedy(3))
        assert tensors.alive == 8
    assert set(threading.enumerate()) == before
    assert tensors.alive == 0
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert torch.get_num_threads() == num_threads
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [num_threads], "a new thread must find the setting as it was"


def test_dropping_the_llm_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors(monkeypatch)
    before = set(threading.enumerate())
    llm = LLM(str(folder), ep=2, overrides=OVERRIDES)
    llm.generate([[5]], greedy(2))
    del llm
    assert tensors.alive == 0
    assert set(threading.enumerate()) == before


def test_dropped_by_its_own_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run on the engine's thread, which cannot wait for itself."""
    before = set(threading.enumerate())
    box: list[LLM] = []
    run = Runner.run

    def dropping(self: Runner, *args: object) -> torch.Tensor:
        box.clear()
        gc.collect()
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "run", dropping)
    box.append(LLM(str(folder), ep=2, overrides=OVERRIDES))
    (handle,) = box[0]._service.submit([(5, 6)], [greedy(50)])  # unlike a stream, holds nothing
    assert handle.wait().outputs[0].finish_reason == "abort"
    until = time.monotonic() + 10
    while set(threading.enumerate()) != before and time.monotonic() < until:
        time.sleep(0.05)
    assert set(threading.enumerate()) == before


def test_close_while_requests_run(folder: Path) -> None:
    llm = LLM(str(folder), ep=4, tp=2, overrides=OVERRIDES)
    results: list[str | None] = []
    began = threading.Event()

    def generate() -> None:
        results.append(llm.generate([[5, 6]], greedy(250))[0].outputs[0].finish_reason)

    def stream() -> None:
        for output in llm.stream([7, 8], greedy(250)):
            if not output.finished:
                began.set()
        results.append(output.outputs[0].finish_reason)

    threads = [threading.Thread(target=work) for work in (generate, stream)]
    for thread in threads:
        thread.start()
    assert began.wait(30)
    llm.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert results == ["abort", "abort"]
    with pytest.raises(EngineClosedError, match="Make a new LLM"):
        llm.generate([[5]])


class FailsAt:
    """Makes a rank raise inside its `step`-th run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rank: int, step: int) -> None:
        run = RankEngine.step

        def failing(engine: RankEngine) -> bool:
            if engine.groups.world.rank == rank and engine._step == step:
                object.__setattr__(engine.runner, "model", self)
            return run(engine)

        monkeypatch.setattr(RankEngine, "step", failing)

    def rotary(self, positions: torch.Tensor) -> None:
        raise ValueError("a broken layer")


@pytest.mark.parametrize("rank", [0, 3])
def test_an_error_in_the_engine_releases_every_thread(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    with monkeypatch.context() as patch:
        tensors = Tensors(patch)
        FailsAt(patch, rank=rank, step=6)
        llm = LLM(str(folder), ep=4, tp=2, overrides=OVERRIDES)
        errors: list[BaseException] = []

        def work(prompt: list[int]) -> None:
            try:
                list(llm.stream(prompt, greedy(50))) if prompt[0] % 2 else llm.generate([prompt], greedy(50))
            except EngineClosedError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=([index],)) for index in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert len(errors) == len(threads)
        for error in errors:
            assert f"rank {rank} raised ValueError" in str(error)
            assert "a broken layer" in str(error)
            assert isinstance(error.__cause__, CommunicationError)
            assert isinstance(error.__cause__.__cause__, ValueError)
        for use in (lambda: llm.generate([[5]]), llm.expert_load):
            with pytest.raises(EngineClosedError, match="a broken layer"):
                use()
        assert llm.snapshot().state == "failed"
        llm.close()
        assert len(tensors.caches) == 4
        assert tensors.alive == 0, "an error that somebody keeps must not keep the engine"
    with LLM(str(folder), ep=4, tp=2, overrides=OVERRIDES) as fresh:
        assert tokens(fresh.generate([[5]], greedy(3))) == alone(folder, [[5]], greedy(3))


def test_a_caller_that_cannot_be_told(folder: Path) -> None:
    """Its request ends, the engine and the other callers go on."""

    def refuse(update: object) -> None:
        raise ValueError("no room")

    with LLM(str(folder), ep=2, overrides=OVERRIDES) as llm:
        (refused,) = llm._service.submit([(5, 6)], [greedy(250)], stream=True, deliver=refuse)
        (output,) = llm.generate([[7, 8]], greedy(30))
        assert output.outputs[0].finish_reason == "length"
        (completion,) = refused.output().outputs
        assert completion.finish_reason == "abort"
        assert completion.error == "its output could not be delivered: ValueError('no room')"
        wait_until_idle(llm)


def test_a_rank_that_only_serves_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualExecutor, "serves_only", True)
    uses: dict[str, Callable[[], object]] = {
        "load_report": llm.load_report,
        "expert_load": llm.expert_load,
        "stream": lambda: llm.stream([5]),
        "chat": lambda: llm.chat([]),
    }
    for name, use in uses.items():
        with pytest.raises(ConfigError, match=f"only serves: .*{name}.* on rank 0 .* generate.. or close.. here"):
            use()


@pytest.mark.usefixtures("interruptible")
def test_interrupted_generate_ends_its_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does: the waiting thread gets KeyboardInterrupt, the engine goes on without the request."""
    with LLM(str(folder), ep=2, overrides=OVERRIDES) as llm:
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6]] * 2000, greedy(250))
        timer.join()
        (output,) = llm.generate([[5, 6]], greedy(2))
        assert output.outputs[0].finish_reason == "length"
        assert llm.snapshot().num_live_requests == 0


def test_bad_checkpoints_and_settings_arrive_as_such(folder: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    broken = write_tiny(tmp_path / "model")
    damage(broken, "model.layers.1.mlp.experts.5.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"experts\.5\.up_proj"):
        LLM(str(broken), ep=4)
    with pytest.raises(ConfigError, match="tp=3"):
        LLM(str(folder), ep=6, tp=3)
    with pytest.raises(ConfigError, match=r"engine\.page_siz"):
        LLM(str(folder), overrides=["engine.page_siz=3"])
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        LLM(str(folder), overrides=["engine.kv_cache_bytes=1"])
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    "ending",
    [
        "raise SystemExit(7)",
        pytest.param("box = [llm]; box.append(box)", marks=pytest.mark.slow),
    ],
)
def test_a_script_that_never_closes(folder: Path, ending: str) -> None:
    script = f"""
from moe_runtime import LLM, SamplingParams
llm = LLM({str(folder)!r}, ep=2)
params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
print(len(llm.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
stream = llm.stream([5], params)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "3\n"
    assert done.stderr == ""
    assert done.returncode == (7 if "SystemExit" in ending else 0)
