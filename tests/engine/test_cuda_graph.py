"""torch's own graphs, in front of a stand-in for torch.cuda: the order of the calls, and what watches a replay."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from moe_runtime.comm.overdue import Completable, Overdue
from moe_runtime.comm.together import ProcessTogether
from moe_runtime.engine.cuda_graph import CudaGraphs
from moe_runtime.errors import CommunicationError


class FakeCuda:
    """What `CudaGraphs` calls, written down. `fails`: the call that raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails = ""
        self.current = "main"
        cuda = self

        class Stream:
            device = torch.device("cuda", 1)

            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                cuda.call(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(self, pool: str, capture_error_mode: str) -> None:
                cuda.call(f"begin in {pool}, {capture_error_mode}, on {cuda.current}")

            def capture_end(self) -> None:
                cuda.call("end")

            def replay(self) -> None:
                cuda.call(f"replay on {cuda.current}")

            def reset(self) -> None:
                cuda.call("reset")

        def set_stream(stream: Stream) -> None:
            self.current = stream.name

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(self.current))
        monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device="": self.call(f"synchronize {device}".rstrip()))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.call("empty_cache"))

    def call(self, what: str) -> None:
        self.calls.append(what)
        if self.fails and what.startswith(self.fails):
            raise RuntimeError(f"CUDA refuses {what}")


def test_torch_graphs_capture_beside_the_stream_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    api = CudaGraphs()
    api.warm()
    assert cuda.current == "side", "what is made on first use is made for the stream of the capture"
    api.begin()
    graph = api.end()
    assert cuda.current == "main"
    graph.replay()
    graph.release()
    graph.release()
    assert cuda.calls == [
        "side waits for main",
        "synchronize",
        "empty_cache",
        "begin in pool, thread_local, on side",
        "end",
        "main waits for side",
        "replay on main",
        "synchronize cuda:1",  # whoever releases, it may have another device current
        "reset",
    ]


@pytest.mark.parametrize("fails", ["synchronize", "begin", "end"])
def test_torch_graphs_leave_the_stream_after_a_failure(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    cuda = FakeCuda(monkeypatch)
    api = CudaGraphs()
    api.warm()
    cuda.fails = fails
    if fails == "end":
        api.begin()
    with pytest.raises(RuntimeError, match=f"CUDA refuses {fails}"):
        (api.end if fails == "end" else api.begin)()
    api.abandon()
    api.abandon()
    assert cuda.current == "main"
    cuda.fails = ""
    api.begin()
    with pytest.raises(RuntimeError, match="inside a capture"):
        api.begin()
    api.abandon()
    assert cuda.current == "main" and cuda.calls[-2:] == ["reset", "main waits for side"]


def test_a_failed_device_hides_no_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    api = CudaGraphs()
    api.warm()
    cuda.fails = "main waits for side"
    api.abandon()
    assert cuda.current == "main" and cuda.calls[-1] == cuda.fails


class Clock(Overdue):
    """Says what it is given to watch."""

    def __init__(self, added: list[tuple[str, tuple[int, ...], bool]]) -> None:
        self._added = added

    def add(self, label: str, ranks: Sequence[int], work: Completable) -> None:
        self._added.append((label, tuple(ranks), work.is_completed()))


def test_a_replay_that_hangs_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it on the host, so the clock of the process's operations watches it."""
    added: list[tuple[str, tuple[int, ...], bool]] = []
    process = SimpleNamespace(
        whereabouts=SimpleNamespace(fault=None),
        overdue=Clock(added),
        world=3,
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    together, acts = ProcessTogether(process), list[int]()  # type: ignore[arg-type]
    together.once("replay", lambda: acts.append(1))
    capturing[0] = True
    together.once("capture", lambda: acts.append(2))
    assert acts == [1, 2] and added == [("replay", (0, 1, 2), False)]
    process.whereabouts.fault = CommunicationError("rank 2 is gone")
    with pytest.raises(CommunicationError, match="rank 2 is gone"):
        together.once("replay", lambda: acts.append(3))
