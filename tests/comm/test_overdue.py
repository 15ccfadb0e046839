"""The clock of operations that the host does not wait for: a device that fails is told, not only one that stands."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_runtime.comm.overdue import Overdue
from moe_runtime.comm.process import Process
from moe_runtime.comm.torch_dist import Lines, TorchCommunicator


class Told:
    """What the clock reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str]] = []
        self.told = threading.Event()

    def report(self, label: str, ranks: tuple[int, ...], cause: BaseException) -> None:
        self.reports.append((label, str(cause)))


class Group:
    def __init__(self, told: Told, error: str | None = None) -> None:
        self.told, self.error, self.aborted = told, error, False

    def abort(self) -> None:
        self.aborted = True
        self.told.told.set()
        if self.error is not None:
            raise RuntimeError(self.error)


class Work:
    def __init__(self, outcome: bool | str) -> None:
        self.outcome = outcome

    def is_completed(self) -> bool:
        if isinstance(self.outcome, str):
            raise RuntimeError(self.outcome)
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "cause"), [("device-side assert", "device-side assert"), (False, "not complete on the device")]
)
def test_a_device_that_fails_or_stands_is_reported_and_all_groups_are_aborted(outcome: bool | str, cause: str) -> None:
    told: Any = Told()
    clock = Overdue(told, deadline_s=0.1)
    first, second = Group(told, "aborted before"), Group(told)
    clock.groups += [first, second]  # type: ignore[list-item]
    clock.add("all_to_all #0 of ep", (0, 1), Work(True))
    clock.add("all_to_all #1 of ep", (0, 1), Work(outcome))
    assert told.told.wait(timeout=10)
    clock._thread.join(timeout=10)
    assert first.aborted and second.aborted, "an abort that fails keeps no other group waiting"
    (report,) = told.reports
    assert report[0] == "all_to_all #1 of ep" and cause in report[1]
    clock.close()


class Whereabouts:
    fault = None

    def enter(self, label: str) -> None: ...

    def leave(self) -> None: ...


class Wire:
    """What NCCL gives: work that holds its outputs for as long as it lives."""

    def all_reduce(self, x: torch.Tensor) -> tuple[Any, Any]:
        out = x.clone()
        self.outputs = weakref.ref(out)
        return SimpleNamespace(wait=lambda: True, outputs=out), lambda: out


def test_what_is_watched_holds_no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock looks once in a while; until then the memory of a whole step would be kept."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    told: Any = Told()
    clock, wire = Overdue(told, deadline_s=60.0), Wire()
    process: Any = SimpleNamespace(rank=0, overdue=clock, whereabouts=Whereabouts())
    lines: Any = Lines((0,), wire, None)  # type: ignore[arg-type]
    ep = TorchCommunicator("ep", lines, process=process)
    result: torch.Tensor | None = ep.all_reduce(torch.ones(2))
    assert result is not None and wire.outputs() is result
    result = None
    assert wire.outputs() is None and [running.label for running in clock._running] == ["all_reduce #0 of ep"]
    capturing[0] = True
    ep.all_reduce(torch.ones(2))
    assert len(clock._running) == 1, "what is captured does not run"
    clock.close()


def test_leaving_a_failed_device_hides_no_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("NCCL error: unhandled cuda error")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", fails)
    whereabouts: Any = SimpleNamespace(close=lambda error: None)
    process = Process(0, 1, "nccl", torch.device("cuda:0"), 1.0, whereabouts, None)
    process.close(RuntimeError("device-side assert"))
    with pytest.raises(RuntimeError, match="unhandled cuda error"):
        process.close()
