"""Local processes: this one is rank 0 and owns the requests, its children are the other ranks.

A child learns from its standard input where to meet, and that its parent is gone: the pipe ends with the parent,
however that ends. Children are a session of their own: Ctrl-C reaches rank 0 alone, which ends them. No port is fixed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from moe_runtime.comm.process import host_store, init_process
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.errors import CommunicationError
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import child_environment, gloo_on_loopback
from moe_runtime.launch.executors.rank import OwnerExecutor, Rank, check_free
from moe_runtime.launch.executors.threads import threads_per_process
from moe_runtime.launch.wire import encode_run

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

RUN_KEY = "run"
START_DEADLINE_S = 120.0
"""How long a child may take to import its libraries on a busy machine."""
EXIT_GRACE_S = 10.0
"""How long a child may take to leave after the last step before it is killed."""
EXIT_TOLD = 3
"""Exit code of a child that left because of an error which rank 0 knows as well."""
_DEATH_NOTICE_S = 1.0
"""A connection breaks a moment before its process can be seen to have ended."""


def ready_key(rank: int) -> str:
    """Set by a child that is about to join."""
    return f"ready/{rank}"


def start_processes(
    composed: Composed, parts: ProcessParts, owner: RequestOwner, *, on_progress: OnProgress
) -> OwnerExecutor:
    """Start the children, join them as rank 0 and load."""
    check_free()
    config, world = composed.config, composed.topology.world
    store = host_store(deadline_s=config.comm_timeout_s)
    store.set(RUN_KEY, encode_run(composed))
    children = Children(store)
    try:
        children.start(world, deadline_s=config.comm_timeout_s)
        children.wait_until_ready()
        with gloo_on_loopback():
            process = init_process(
                0,
                world,
                store=store,
                backend="nccl" if config.device == "cuda" else "gloo",
                deadline_s=config.comm_timeout_s,
                device=parts.device,
            )
            rank = Rank(
                lambda: parts,
                process,
                mesh=composed.topology.mesh(),
                owner=owner,
                num_threads=threads_per_process(config, world),
                load_timeout_s=config.load_timeout_s,
                on_progress=on_progress,
            )
    except CommunicationError as error:
        known = children.explain(error)
        children.end()
        raise known from error
    except BaseException:
        children.end()
        raise
    return OwnerExecutor(rank, owner, peers=children)


class Children:
    """The processes of ranks 1, 2, …; also keeps the store where all meet."""

    def __init__(self, store: TCPStore) -> None:
        self._store: TCPStore | None = store
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, world: int, *, deadline_s: float) -> None:
        assert self._store is not None, "not ended yet"
        for rank in range(1, world):
            child = subprocess.Popen(
                # -P: not the current folder, where a queue.py may lie.
                [sys.executable, "-P", "-m", "moe_runtime.launch.worker"],
                stdin=subprocess.PIPE,
                env=child_environment(),
                start_new_session=True,
            )
            self._processes.append(child)
            place = {"rank": rank, "world": world, "port": self._store.port, "deadline_s": deadline_s}
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already: `wait_until_ready` says so
                child.stdin.write(json.dumps(place).encode() + b"\n")
                child.stdin.flush()

    def wait_until_ready(self) -> None:
        """CommunicationError where a child has ended or takes too long."""
        assert self._store is not None, "not ended yet"
        keys = [ready_key(rank) for rank in range(1, len(self._processes) + 1)]
        until = time.monotonic() + START_DEADLINE_S
        while not self._store.check(keys):
            if any(child.poll() is not None for child in self._processes):
                raise CommunicationError("not all ranks have started; what they wrote is above.")
            if time.monotonic() > until:
                late = [key.partition("/")[2] for key in keys if not self._store.check([key])]
                raise CommunicationError(
                    f"ranks {', '.join(late)} have not started within {START_DEADLINE_S:g} s: is this machine too busy?"
                )
            time.sleep(0.02)

    def explain(self, failure: BaseException) -> BaseException:
        """The failure and which processes have ended, and how."""
        until = time.monotonic() + _DEATH_NOTICE_S
        while not (ended := self._ended()) and time.monotonic() < until:
            time.sleep(0.02)
        if not ended or not isinstance(failure, CommunicationError):
            return failure
        return CommunicationError(f"{'; '.join(ended)}. {failure}")

    def _ended(self) -> list[str]:
        return [
            f"rank {rank}'s process {child.pid} {_ending(code)}"
            for rank, child in enumerate(self._processes, start=1)
            if (code := child.poll()) is not None and code != EXIT_TOLD
        ]

    def end(self) -> None:
        """Close the children's pipes, wait a little, then kill what is left. Idempotent."""
        until = time.monotonic() + EXIT_GRACE_S
        for child in self._processes:
            if child.stdin is not None and not child.stdin.closed:
                with suppress(BrokenPipeError):  # what a dead child has not read
                    child.stdin.close()
        for child in self._processes:
            try:
                child.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._store = None
        self._processes = []


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
