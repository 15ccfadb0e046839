"""A trace written beside the steps: windows wait for the disk, steps never do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from moe_runtime.balance.trace import Change, TraceWriter, Window
from moe_runtime.balance.trace_parts import part_bytes
from moe_runtime.engine.disk import DiskThread

MOST_BYTES: Final = 64 * 2**20
"""Of windows that wait for the disk. One that alone is larger is taken where nothing else waits."""


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], None]
    when: str
    num_windows: int = 0


class TraceThread:
    """`writer`, on a thread of its own. Called by the thread that steps; only `close` waits, at most `within_s`.

    Windows that find `most_bytes` waiting are left out and counted in the trace's header; what moved in them goes to
    the next ones. A write that fails ends the trace, not the run. Both are logged.
    """

    def __init__(self, writer: TraceWriter, *, within_s: float, most_bytes: int = MOST_BYTES) -> None:
        self.error: str | None = None
        """Why the trace ended before the run did"""
        self.num_dropped = 0
        """Rows of windows that were left out"""
        self._writer = writer
        self._within_s = within_s
        self._disk: DiskThread[_Job] = DiskThread(self._do, name="trace", most_bytes=most_bytes)
        self._moved: dict[int, Change] = {}
        self._lost = (0, 0)
        self._num_offered = self._num_tried = 0
        self._ended = self._closed = False

    def add(self, windows: Sequence[Window], tokens: Mapping[str, Tensor] | None, changes: Sequence[Change]) -> None:
        """As TraceWriter.add, later."""
        if self.error is not None:
            return
        count = 0 if tokens is None else len(tokens["routes"])
        lost, moved = self._lost, [*sorted(self._moved.values()), *changes]

        def work() -> None:
            self._writer.drop(*lost)
            self._writer.add(windows, tokens, moved)

        job = _Job(work, f"step {windows[-1].last_step}", len(windows))
        size = part_bytes(self._writer.header, windows=len(windows), tokens=count, changes=len(moved))
        if self._disk.offer(job, size):
            self._num_offered += len(windows)
            self._lost, self._moved = (0, 0), {}
            return
        if not self.num_dropped:
            _log(f"windows up to {job.when} are left out: the disk is slower than what is recorded")
        self.num_dropped += len(windows)
        self._lost = lost[0] + len(windows), lost[1] + count
        self._moved |= {change.layer: change for change in changes}

    def end(self, *, complete: bool) -> None:
        """Nothing more is added. `complete`: the run has ended well. Returns at once; the first call counts."""
        if self._ended:
            return
        self._ended = True
        lost = self._lost

        def work() -> None:
            self._writer.drop(*lost)
            # What was written of a run that failed stays readable, and is not marked as complete.
            self._writer.close() if complete else self._writer.flush()

        if not self._disk.offer(_Job(work, "the run's end")):
            self._fail("the run's end", self._disk.take_failure() or "it was not begun")

    def close(self) -> None:
        """Wait for what was added, and tell in the log what was not written. Idempotent."""
        self.end(complete=False)
        if self._closed:
            return
        self._closed = True
        if not self._disk.wait(self._within_s):
            left = self._num_offered - self._num_tried
            _log(f"not all was written within {self._within_s:g} s of the run's end: {left} windows wait for the disk")
        if self.num_dropped:
            _log(f"{self.num_dropped} windows were left out: the disk was slower than what was recorded")

    def _do(self, job: _Job) -> None:
        if self.error is None:
            try:
                job.work()
            except Exception as error:  # noqa: BLE001 - ends the trace, not the run
                self._fail(job.when, error)
        self._num_tried += job.num_windows

    def _fail(self, when: str, error: object) -> None:
        self.error = f"the trace ended at {when}: {error}"
        _log(self.error)


def _log(text: str) -> None:
    logging.getLogger(__name__).warning("balance.trace: %s", text)
