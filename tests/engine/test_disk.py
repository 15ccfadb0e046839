"""What is written beside the steps: in order or the newest only, up to a bound, and waited for no longer than said."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_runtime.balance.trace import Change, TraceHeader, TraceWriter, Window, read_header, read_trace
from moe_runtime.engine.disk import DiskThread
from moe_runtime.engine.trace_thread import TraceThread

HEADER = TraceHeader(
    model="m", num_layers=1, num_logical=2, num_routed=2, top_k=1, ep=2, dp=2, phy2log=((0, 1),), mode="per_token"
)


class SlowDisk:
    """Holds the first write until `go`."""

    def __init__(self) -> None:
        self.go, self.reached = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.go.wait(30)


def blocked(disk: SlowDisk, *, most_bytes: int | None) -> tuple[DiskThread[int], list[int]]:
    """A thread that is in the middle of writing 0, of 4 bytes."""
    written: list[int] = []

    def write(item: int) -> None:
        disk.wait()
        written.append(item)

    thread = DiskThread(write, name="test", most_bytes=most_bytes)
    assert thread.offer(0, 4) and disk.reached.wait(30)
    return thread, written


def test_items_are_written_in_order_up_to_a_bound() -> None:
    disk = SlowDisk()
    thread, written = blocked(disk, most_bytes=10)
    assert [thread.offer(item, 3) for item in (1, 2, 3)] == [True, True, False], "4 + 3 + 3 bytes fill it"
    assert thread.offer(9), "what takes nothing always fits"
    began = time.monotonic()
    assert not thread.wait(0.05) and time.monotonic() - began < 5
    disk.go.set()
    assert thread.wait(30) and written == [0, 1, 2, 9] and thread.take_failure() is None
    assert thread.offer(4, 100) and thread.wait(30) and written[-1] == 4, "one alone may be larger"


def test_of_what_waits_the_newest_is_written() -> None:
    disk = SlowDisk()
    thread, written = blocked(disk, most_bytes=None)
    assert [thread.offer(item, 100) for item in (1, 2, 3)] == [True] * 3
    disk.go.set()
    assert thread.wait(30) and written == [0, 3]


def test_a_thread_lingers_and_ends() -> None:
    """It takes the next item too, and has ended when `wait` returns."""
    seen: list[threading.Thread] = []
    done = threading.Semaphore(0)

    def write(_: int) -> None:
        seen.append(threading.current_thread())
        done.release()

    thread = DiskThread(write, name="test")
    for item in range(3):
        thread.offer(item)
        assert done.acquire(timeout=30)
    assert len(set(seen)) == 1 and thread.wait(30)
    assert not seen[0].is_alive()
    thread.offer(3)
    assert thread.wait(30) and len(seen) == 4 and len(set(seen)) == 2


def window(step: int) -> Window:
    loads = torch.tensor([[1, 0]])
    return Window(
        phase="decode", first_step=step, last_step=step, num_steps=1, num_tokens=1, loads=loads, rank_loads=loads
    )


def tokens(step: int) -> dict[str, torch.Tensor]:
    one = torch.tensor([step])
    return {
        "routes": torch.zeros(1, 1, 1, dtype=torch.int16),
        "request": one,
        "position": one,
        "step": one,
        "home": one * 0,
        "is_prompt": one < 0,
        "window": one * 0,
    }


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """Every window is a part of its own, and the first one hangs."""
    disk, add = SlowDisk(), TraceWriter.add

    def slow(writer: TraceWriter, *args: object) -> None:
        disk.wait()
        add(writer, *args)  # type: ignore[arg-type]
        writer.flush()

    monkeypatch.setattr(TraceWriter, "add", slow)
    return disk


def test_windows_that_find_no_room_are_left_out_and_counted(
    tmp_path: Path, disk: SlowDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """What moved in them goes to the next one, so the placement is right at every step that is there."""
    trace = TraceThread(TraceWriter(tmp_path, HEADER), within_s=30, most_bytes=250)
    trace.add([window(0)], tokens(0), [])
    assert disk.reached.wait(30)
    for step in (1, 2, 3):
        trace.add([window(step)], tokens(step), [Change(step, 0, (0, 1) if step == 3 else (1, 0))])
    assert trace.num_dropped == 2 and trace.error is None
    assert read_header(tmp_path).next_part == 0, "readable meanwhile"
    disk.go.set()
    assert trace._disk.wait(30)
    trace.add([window(4)], tokens(4), [])
    trace.end(complete=True)
    trace.close()
    found = read_trace(tmp_path)
    assert found.first_step.tolist() == found.step.tolist() == [0, 1, 4], "in order"
    assert (found.header.dropped_windows, found.header.dropped_tokens, found.header.complete) == (2, 2, False)
    at = [found.placement_at(step) for step in (0, 1, 4)]
    assert [placement.phy2log.tolist() for placement in at if placement] == [[[0, 1]], [[1, 0]], [[0, 1]]]
    assert "the disk is slower than what is recorded" in caplog.text and "2 windows were left out" in caplog.text


def test_the_end_waits_for_a_while_and_tells(tmp_path: Path, disk: SlowDisk, caplog: pytest.LogCaptureFixture) -> None:
    trace = TraceThread(TraceWriter(tmp_path, HEADER), within_s=0.1)
    for step in range(3):
        trace.add([window(step)], None, [])
    began = time.monotonic()
    trace.end(complete=True)
    assert time.monotonic() - began < 0.09, "other ranks wait for this one here"
    with caplog.at_level(logging.WARNING):
        trace.close()
    assert 0.1 <= time.monotonic() - began < 5
    assert "not all was written within 0.1 s of the run's end: 3 windows wait for the disk" in caplog.text
    assert not read_header(tmp_path).complete
    disk.go.set()
    assert trace._disk.wait(30)
    assert read_header(tmp_path).complete and read_trace(tmp_path).first_step.tolist() == [0, 1, 2]


def test_no_thread_for_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    trace = TraceThread(TraceWriter(tmp_path, HEADER), within_s=30)
    for step in range(3):
        with monkeypatch.context() as patch:
            if step != 1:
                patch.setattr(threading.Thread, "start", none_left)
            trace.add([window(step)], None, [])
        assert trace._disk.wait(30)
    trace.end(complete=True)
    trace.close()
    found = read_trace(tmp_path)
    assert found.first_step.tolist() == [1] and found.header.dropped_windows == 2 and not found.header.complete
