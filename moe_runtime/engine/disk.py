"""Writes beside the steps: a slow disk holds nobody up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

LINGER_S: Final = 2.0
"""To begin a thread costs the caller milliseconds where others use the cores."""


class DiskThread(Generic[T]):
    """`write` runs on a thread of its own, on one item at a time. The thread ends in `wait`, and where nothing was
    offered for LINGER_S.

    Without `most_bytes` only the newest of the items that wait is kept. With it all are kept, in the order of their
    offers, up to so many bytes, the item that is being written among them.
    """

    def __init__(self, write: Callable[[T], None], *, name: str, most_bytes: int | None = None) -> None:
        self._write = write
        self._name = name
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[T, int]] = deque()
        self._held_bytes = 0
        self._running = self._leaving = False
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def offer(self, item: T, num_bytes: int = 0) -> bool:
        """To be written after what waits; False where it is not taken. Returns at once. An item is always taken where
        nothing else is held, and one of no bytes too."""
        with self._changed:
            if self._most_bytes is None:
                self._waiting.clear()
            elif num_bytes and self._held_bytes and self._held_bytes + num_bytes > self._most_bytes:
                return False
            self._waiting.append((item, num_bytes))
            self._held_bytes += num_bytes
            if self._running:
                self._changed.notify_all()
                return True
            self._running = True
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            with self._changed:
                self._waiting.clear()
                self._running, self._held_bytes, self._failure = False, 0, f"{type(error).__name__}: {error}"
            return False
        self._thread = thread
        return True

    def take_failure(self) -> str | None:
        """What went wrong since the last call, if anything."""
        with self._changed:
            failure, self._failure = self._failure, None
            return failure

    def wait(self, within_s: float) -> bool:
        """Whether all that was taken has been tried, at the latest after so many seconds."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._running, timeout=within_s)
            self._leaving = False
        if done and self._thread is not None:
            self._thread.join()  # it only has to return
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._leaving, timeout=LINGER_S)
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
                item, num_bytes = self._waiting.popleft()
            try:
                self._write(item)
            except Exception as error:  # noqa: BLE001 - told where serving goes on
                with self._changed:
                    self._failure = f"{type(error).__name__}: {error}"
            del item  # its memory goes before its bytes do
            with self._changed:
                self._held_bytes -= num_bytes
