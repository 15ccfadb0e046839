"""GPU timing: contenders take turns in one run, the L2 cache is flushed before each, medians of CUDA events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def measure(contenders: Mapping[str, Callable[[], object]], *, turns: int = 30, warmups: int = 3) -> dict[str, Timing]:
    """Time every contender `turns` times on the current CUDA device, one after the other in each turn.

    A contender is captured into a CUDA graph, so that launches from Python cost nothing; one that cannot be captured
    (it waits for the device, say) runs as it is, and its Timing says so.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    runs = {name: _captured(fn, warmups) for name, fn in contenders.items()}
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


def _captured(fn: Callable[[], object], warmups: int) -> tuple[Callable[[], object], bool]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            fn()
    except RuntimeError:
        torch.cuda.synchronize()
        return fn, False
    return graph.replay, True
