"""Local processes: this one is rank 0 and owns the requests, its children are the other ranks.

A child learns from its standard input where to meet, and that its parent is gone: the pipe ends with the parent, however
that ends. Nothing is inherited through the environment, and no port is fixed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import torch

from moe_runtime.comm.process import host_store, init_process
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.executors.rank import RankExecutor
from moe_runtime.launch.wire import encode_run

RUN_KEY = "run"
EXIT_GRACE_S = 10.0
"""How long a child may take to leave after the last step before it is killed."""


class ProcessExecutor:
    """Starts the children, joins them as rank 0 and ends them."""

    serves_only = False

    def __init__(
        self, composed: Composed, parts: ProcessParts, owner: RequestOwner, *, on_progress: OnProgress
    ) -> None:
        config = composed.config
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads_before = torch.get_num_threads()
        self._store = host_store(deadline_s=config.comm_timeout_s)
        self._store.set(RUN_KEY, encode_run(composed))
        world = composed.topology.world
        try:
            for rank in range(1, world):
                self._children.append(_start(rank, world, port=self._store.port, deadline_s=config.comm_timeout_s))
            torch.set_num_threads(threads_per_process(composed, world))
            process = init_process(
                0,
                world,
                store=self._store,
                backend="nccl" if config.device == "cuda" else "gloo",
                deadline_s=config.comm_timeout_s,
                device="cuda:0" if config.device == "cuda" else "cpu",
            )
            self._rank = RankExecutor(parts, process, owner=owner, on_progress=on_progress)
        except BaseException:
            self._end()
            raise

    def serve(self) -> None:
        raise AssertionError("rank 0 owns the requests")

    def close(self) -> None:
        self._rank.close()
        self._end()

    def _end(self) -> None:
        """Close the children's pipes, wait a little, then kill what is left."""
        torch.set_num_threads(self._threads_before)
        until = time.monotonic() + EXIT_GRACE_S
        for child in self._children:
            if child.stdin is not None and not child.stdin.closed:
                child.stdin.close()
        for child in self._children:
            try:
                child.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children = []


def threads_per_process(composed: Composed, local_world: int) -> int:
    """`num_threads`, or this machine's cores shared out; one in batch-invariant mode."""
    if composed.config.engine.batch_invariant:
        return 1
    return composed.config.num_threads or max(1, (os.cpu_count() or 1) // local_world)


def _start(rank: int, world: int, *, port: int, deadline_s: float) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-m", "moe_runtime.launch.worker"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    place = {"rank": rank, "world": world, "host": "127.0.0.1", "port": port, "deadline_s": deadline_s}
    child.stdin.write(json.dumps(place).encode() + b"\n")
    child.stdin.flush()
    return child
