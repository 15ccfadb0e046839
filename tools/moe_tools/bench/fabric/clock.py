"""Times of calls that no graph can hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

TURNS: Final = 20
_WARMUPS: Final = 3

Times = tuple[float, float, float]
"""Microseconds: median, least, largest."""


def by_events(call: Callable[[], object]) -> Times:
    """Between two events on the current stream, calls queued one behind the other."""
    pairs = []
    for _ in range(_WARMUPS + TURNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return _times([1e3 * start.elapsed_time(end) for start, end in pairs[_WARMUPS:]])


def by_host(call: Callable[[], object], *, before: Callable[[], object]) -> Times:
    """Until the device is done, which sees waits for other processes; `before` each call, all are brought together."""
    us = []
    for _ in range(_WARMUPS + TURNS):
        before()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        us.append(1e6 * (time.perf_counter() - start))
    return _times(us[_WARMUPS:])


def _times(us: list[float]) -> Times:
    return statistics.median(us), min(us), max(us)
