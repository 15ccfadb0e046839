"""Overdue: a clock for operations that the host does not wait for (NCCL), on one thread of the process.

The host runs ahead of the GPU, so nobody stands at the operation when it hangs. This thread looks at the oldest one
that has not completed; past the deadline it asks where the peers are, keeps the error for the next call of this
process, and aborts the groups, which frees a host that is blocked on the device.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from moe_runtime.comm.whereabouts import Whereabouts


class Completable(Protocol):
    """Something under way on the device, such as a `dist.Work`."""

    def is_completed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Reached:
    """The device's way through a stream, as something that completes."""

    event: torch.cuda.Event

    def is_completed(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Running:
    label: str
    ranks: tuple[int, ...]
    work: Completable
    began: float


class Overdue:
    """One per process. `groups` are aborted together, at most once, by the clock's thread."""

    def __init__(self, whereabouts: Whereabouts, *, deadline_s: float) -> None:
        self._whereabouts = whereabouts
        self._deadline_s = deadline_s
        self.groups: list[dist.ProcessGroup] = []
        self._running: deque[_Running] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="overdue", daemon=True)
        self._thread.start()

    def reach(self, label: str, ranks: Sequence[int]) -> None:
        """Watch that the device comes to where the current stream is now; nothing in a capture, which runs nothing.

        For an operation, once the stream waits for it. Its `dist.Work` would do as well, but holds its outputs: their
        memory would stay until the clock looks again.
        """
        if not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.add(label, ranks, _Reached(event))

    def add(self, label: str, ranks: Sequence[int], work: Completable) -> None:
        self._running.append(_Running(label, tuple(ranks), work, time.monotonic()))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._deadline_s / 10)):
            try:
                while self._running and self._running[0].work.is_completed():
                    self._running.popleft()
            except RuntimeError as error:  # the device has failed, and says so of everything from now on
                self._fail(self._running[0], error)
                return
            if not self._running:
                continue
            oldest = self._running[0]
            waited = time.monotonic() - oldest.began
            if waited > self._deadline_s:
                self._fail(oldest, TimeoutError(f"not complete on the device after {waited:.1f} s"))
                return

    def _fail(self, oldest: _Running, cause: Exception) -> None:
        self._whereabouts.report(oldest.label, oldest.ranks, cause)
        for group in self.groups:
            with suppress(RuntimeError):  # the others must hear of it whatever this one says
                group.abort()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.groups.clear()
