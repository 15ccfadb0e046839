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
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from moe_runtime.comm.whereabouts import Whereabouts


class Completable(Protocol):
    """Something under way on the device, such as a `dist.Work`."""

    def is_completed(self) -> bool: ...


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

    def add(self, label: str, ranks: Sequence[int], work: Completable) -> None:
        self._running.append(_Running(label, tuple(ranks), work, time.monotonic()))

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._deadline_s / 10)):
            while self._running and self._running[0].work.is_completed():
                self._running.popleft()
            if not self._running:
                continue
            oldest = self._running[0]
            waited = time.monotonic() - oldest.began
            if waited > self._deadline_s:
                cause = TimeoutError(f"not complete on the device after {waited:.1f} s")
                self._whereabouts.report(oldest.label, oldest.ranks, cause)
                for group in self.groups:
                    group.abort()
                return

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.groups.clear()
