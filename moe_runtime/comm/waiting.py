"""Waits without an end that signals can end: one that came just before an endless wait would be lost."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

SIGNAL_POLL_S = 1.0
"""How often a waiting thread looks for signals."""


def await_result(future: Future[T]) -> T:
    """The future's result, or its exception raised."""
    while not wait([future], timeout=SIGNAL_POLL_S).done:
        pass
    return future.result()


def await_thread(thread: threading.Thread) -> None:
    """Until the thread has ended."""
    while thread.is_alive():
        thread.join(timeout=SIGNAL_POLL_S)
