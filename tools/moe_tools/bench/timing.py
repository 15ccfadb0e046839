"""GPU timing: contenders take turns in one run, the L2 cache is flushed before each, medians of CUDA events."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import median

import torch

FLUSH_BYTES = 256 << 20
"""Five times the L2 of an H200."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: median, least and largest of the turns. `graph`: replayed from a CUDA graph."""

    us: float
    low_us: float
    high_us: float
    graph: bool


Run = Callable[[], object]


def measure(
    contenders: Mapping[str, Run], *, turns: int = 30, warmups: int = 3, optional: Collection[str] = ()
) -> dict[str, Timing]:
    """Time every contender `turns` times on the current CUDA device, one after the other in each turn.

    A contender is captured into a CUDA graph, so that launches from Python cost nothing; one that cannot be captured
    (it waits for the device, say) runs as it is, and its Timing says so. Of the `optional` ones, those that fail are
    named on standard error and left out.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    runs = _runs(contenders, warmups, optional)
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, _graph) in runs.items():
            flush.zero_()  # also keeps the GPU busy while the host queues what follows
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            samples[name].append((start, end))
    torch.cuda.synchronize()
    timings = {}
    for name, pairs in samples.items():
        us = sorted(1e3 * start.elapsed_time(end) for start, end in pairs)
        timings[name] = Timing(median(us), us[0], us[-1], runs[name][1])
    return timings


def _runs(contenders: Mapping[str, Run], warmups: int, optional: Collection[str]) -> dict[str, tuple[Run, bool]]:
    runs = {}
    for name, fn in contenders.items():
        try:
            runs[name] = _captured(fn, warmups)
        except Exception as error:  # another library's, and the others are still worth their figures
            if name not in optional:
                raise
            sys.stderr.write(f"{name} is left out: {type(error).__name__}: {error}\n")
    return runs


def _captured(fn: Run, warmups: int) -> tuple[Run, bool]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if _waits(fn):
        return fn, False
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may ask for events meanwhile: NCCL's watchdog, the clock of overdue operations.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            fn()
    except RuntimeError:
        torch.cuda.synchronize()
        return fn, False
    return graph.replay, True


def _waits(fn: Run) -> bool:
    """Whether it waits for the device: known beforehand, since a capture that fails leaves the allocator in it."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False
