"""Capturing and replaying what a process puts on its device: a small protocol, and torch's CUDA graphs behind it.

Rules for what is captured: shapes and Python values are baked in, only memory changes between replays; nothing may wait
for the device; memory that it reads and did not allocate itself must live as long as the graph.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import torch


class Graph(Protocol):
    """One captured piece of work."""

    def replay(self) -> None:
        """Do it again, on the same memory."""

    def release(self) -> None:
        """Free what it holds; no further replays. Idempotent."""


class GraphApi(Protocol):
    """Capture for one process, one graph at a time: `warm`, a run of the work, `begin`, the work, `end`.

    What the work allocates between `begin` and `end` comes from a pool that all graphs share. Whoever calls, on which
    greenlet, does not matter, as long as it is one thread.
    """

    def warm(self) -> None:
        """The work that follows runs as usual, where the capture will be: what is made on first use is made now."""

    def begin(self) -> None:
        """The work that follows is captured and not run. RuntimeError inside a capture."""

    def end(self) -> Graph:
        """The captured work. RuntimeError where something in it cannot be captured."""

    def abandon(self) -> None:
        """Leave warm-up or capture after a failure; never raises."""


class CudaGraphs:
    """`GraphApi` over `torch.cuda.CUDAGraph`, on the current device of the thread that makes it.

    Not yet run on hardware.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._outside: torch.cuda.Stream | None = None
        self._capturing: torch.cuda.CUDAGraph | None = None

    def warm(self) -> None:
        if self._outside is None:
            self._outside = torch.cuda.current_stream()
            self._stream.wait_stream(self._outside)
            torch.cuda.set_stream(self._stream)

    def begin(self) -> None:
        if self._capturing is not None:
            raise RuntimeError("a capture begins inside a capture: end the first one")
        self.warm()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may call CUDA meanwhile: NCCL's watchdog, the clock of overdue operations.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._capturing = graph

    def end(self) -> Graph:
        graph, self._capturing = self._capturing, None
        if graph is None:
            raise RuntimeError("no capture has begun")
        try:
            graph.capture_end()
        finally:
            self._leave()
        return _CudaGraph(graph, self._stream.device)

    def abandon(self) -> None:
        graph, self._capturing = self._capturing, None
        try:
            if graph is not None:
                graph.capture_end()
                graph.reset()
        except RuntimeError:
            pass  # a capture that failed ends with an error of its own; the first one is reported
        finally:
            with suppress(RuntimeError):  # a device that has failed refuses this too
                self._leave()

    def _leave(self) -> None:
        outside, self._outside = self._outside, None
        if outside is not None:
            torch.cuda.set_stream(outside)
            outside.wait_stream(self._stream)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph: torch.cuda.CUDAGraph | None = graph
        self._device = device

    def replay(self) -> None:
        assert self._graph is not None, "a released graph cannot be replayed"
        self._graph.replay()

    def release(self) -> None:
        graph, self._graph = self._graph, None
        if graph is None:
            return
        with suppress(RuntimeError):  # a device that has failed has nothing under way
            torch.cuda.synchronize(self._device)  # by number: whoever releases may have another one current
        with suppress(RuntimeError):
            graph.reset()
