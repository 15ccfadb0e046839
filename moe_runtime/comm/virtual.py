"""Virtual cluster: N ranks in one process, as greenlets of one thread that the cluster owns.

A rank switches only where it waits for others, in the order in which ranks became ready, so runs are deterministic.
Rules for programs of ranks:
* thread-local torch modes (`inference_mode`, default dtype, `cuda.stream`) belong to the cluster's thread: enter them
  around everything with `inference_mode=True` or `cluster.call`, never inside a rank across a communicator call;
* results of collectives may be shared between ranks: they are immutable; an input stays unchanged until its operation
  has been waited for;
* after a run that failed, the communicators start afresh, so the cluster can run again; what the programs themselves
  kept (caches, counters) is theirs to discard.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_runtime.comm import checks
from moe_runtime.comm import collectives as c
from moe_runtime.comm.base import Groups, Location
from moe_runtime.comm.checks import Counts
from moe_runtime.comm.hub import Hub, Interruption
from moe_runtime.comm.rendezvous import Rendezvous
from moe_runtime.comm.waiting import await_result, await_thread
from moe_runtime.errors import CommunicationError, ConfigError, EngineClosedError
from moe_runtime.parallel.mesh import AXES, Axis, ProcessMesh
from moe_runtime.types import Pending

T = TypeVar("T")
Job = tuple[Callable[[], Any], "Future[Any]"]


class VirtualCommunicator:
    """`Communicator` of one virtual rank; see comm/base.py for the laws."""

    __slots__ = ("_closed", "_group", "_rank")

    def __init__(self, group: Rendezvous, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._closed = False

    @property
    def name(self) -> str:
        return self._group.name

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._group.ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._group.ranks

    def _join(self, op: c.Op[c.P, c.R], payload: c.P) -> Pending[c.R]:
        if self._closed:
            raise EngineClosedError(f"{op.name} on a closed communicator ({self.name}). Build new groups.")
        return self._group.join(self._rank, op, payload)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_reduce_begin(x).wait()

    def all_reduce_begin(self, x: Tensor) -> Pending[Tensor]:
        checks.check_summable(x, "all_reduce")
        return self._join(c.ALL_REDUCE, x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self.all_gather_begin(x).wait()

    def all_gather_begin(self, x: Tensor) -> Pending[Tensor]:
        checks.check_has_rows(x, "all_gather")
        return self._join(c.ALL_GATHER, x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.reduce_scatter_begin(x).wait()

    def reduce_scatter_begin(self, x: Tensor) -> Pending[Tensor]:
        checks.check_summable(x, "reduce_scatter")
        checks.check_divisible(x, self.size)
        return self._join(c.REDUCE_SCATTER, x)

    def all_to_all(self, x: Tensor, send_counts: Counts, recv_counts: Counts, out: Tensor | None = None) -> Tensor:
        return self.all_to_all_begin(x, send_counts, recv_counts, out).wait()

    def all_to_all_begin(
        self, x: Tensor, send_counts: Counts, recv_counts: Counts, out: Tensor | None = None
    ) -> Pending[Tensor]:
        checks.check_all_to_all(x, send_counts, recv_counts, out, self.size)
        return self._join(c.ALL_TO_ALL, (x, send_counts, recv_counts, out))

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        return self.broadcast_begin(x, src).wait()

    def broadcast_begin(self, x: Tensor, src: int) -> Pending[Tensor]:
        checks.check_member(src, self.size, "src")
        return self._join(c.BROADCAST, (x, src))

    def send(self, x: Tensor, dst: int) -> None:
        checks.check_member(dst, self.size, "dst")
        self._group.send(x, self._rank, dst)

    def recv(self, like: Tensor, src: int) -> Tensor:
        checks.check_member(src, self.size, "src")
        return self._group.recv(like, self._rank, src)

    def barrier(self) -> None:
        self._join(c.BARRIER, None).wait()

    def exchange(self, row: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return self._join(c.EXCHANGE, checks.pack_ints(row)).wait()

    def share(self, payload: bytes | None, src: int) -> bytes:
        checks.check_share(payload, src, rank=self._rank, size=self.size)
        return self._join(c.SHARE, (payload, src)).wait()

    def collect(self, payload: bytes) -> tuple[bytes, ...]:
        return self._join(c.COLLECT, payload).wait()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._group.leave(self._group.ranks[self._rank])


class VirtualCluster:
    """`size` ranks and the thread that runs them; usable from any thread, one call at a time in order of arrival.

    `deadline_s`: a run in which no rank yields for this long is given up with a CommunicationError naming the rank
    that holds the thread (nothing can stop it from outside; the cluster is closed). None waits for ever; every other
    fault is found at once, without a clock. `num_threads`: torch's intra-op threads for the cluster's thread; None
    leaves them alone. `inference_mode`: the thread lives in `torch.inference_mode()`.
    """

    def __init__(
        self,
        size: int,
        *,
        deadline_s: float | None = None,
        num_threads: int | None = None,
        inference_mode: bool = True,
    ) -> None:
        if size < 1:
            raise ConfigError(f"size={size}: a virtual cluster needs at least 1 rank.")
        self._hub = Hub(size)
        self._deadline_s = deadline_s
        self._closed = False
        self._closing = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._jobs, num_threads, inference_mode), name="virtual-cluster", daemon=True
        )
        self._thread.start()
        # A cluster that nobody closed ends its thread when it is collected, and at interpreter exit.
        self._end = weakref.finalize(self, self._jobs.put, None)

    @property
    def size(self) -> int:
        return self._hub.size

    @property
    def hub(self) -> Hub:
        """For `virtual_groups`."""
        return self._hub

    def call(self, fn: Callable[[], T]) -> T:
        """`fn()` on the cluster's thread, after the runs and calls that came before it."""
        if threading.current_thread() is self._thread:
            return fn()
        return await_result(self._submit(fn))

    def run(self, fn: Callable[[int], T]) -> list[T]:
        """`fn(rank)` on every rank until all have returned; their results in rank order.

        Raises CommunicationError as soon as a rank raises (the cause), leaves early or meets others wrongly; every
        rank has been unwound by then. An exception in the calling thread, such as KeyboardInterrupt, stops the ranks
        where they next wait, and is raised once they have ended.
        """
        if threading.current_thread() is self._thread:
            raise CommunicationError("VirtualCluster.run called from a rank or call of the same cluster: return first.")
        started = threading.Event()
        interruption = Interruption()
        hub = self._hub

        def job() -> list[T]:
            started.set()
            return hub.run(fn, interruption)

        future = self._submit(job)
        try:
            return self._await_run(future, started, interruption)
        except BaseException as error:
            if not future.done() and not future.cancel() and interruption.error is None:
                interruption.error = CommunicationError(f"stopped by {type(error).__name__} in the calling thread.")
                wait([future])
            raise

    def _await_run(self, future: Future[list[T]], started: threading.Event, interruption: Interruption) -> list[T]:
        if self._deadline_s is not None:
            started.wait()
            seen = self._hub.switches
            while not wait([future], timeout=self._deadline_s).done:
                if self._hub.switches == seen:
                    interruption.error = self._give_up()
                    raise interruption.error
                seen = self._hub.switches
        return await_result(future)

    def _give_up(self) -> CommunicationError:
        rank = self._hub.running
        place = f" ({self._hub.locations[rank]})" if rank is not None else ""
        error = CommunicationError(
            f"rank {rank}{place} has held the cluster's thread for {self._deadline_s} s without waiting for anyone. "
            "The cluster is closed; raise deadline_s if this was honest work."
        )
        with self._closing:
            self._closed = True
            self._end()
        return error

    def _submit(self, fn: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise EngineClosedError("this virtual cluster is closed. Build a new one.")
            self._jobs.put((fn, future))
        return future

    def close(self) -> None:
        """End the thread once the work given to it is done. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._end()
        if threading.current_thread() is not self._thread:
            await_thread(self._thread)

    def __enter__(self) -> VirtualCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(jobs: queue.SimpleQueue[Job | None], num_threads: int | None, inference_mode: bool) -> None:
    """The cluster's thread. It must not hold the cluster itself, or a forgotten cluster would never be collected."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    with torch.inference_mode(inference_mode):
        while (job := jobs.get()) is not None:
            fn, future = job
            del job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = fn()
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del fn, future


def virtual_groups(
    cluster: VirtualCluster, pp: int = 1, *, dp: int = 1, tp: int = 1, ranks_per_node: int = 8
) -> list[Groups]:
    """The groups of every rank of a pp × dp × tp mesh on `cluster`, in rank order. Raises ConfigError on a misfit."""
    meshes = list(ProcessMesh.enumerate(pp=pp, dp=dp, tp=tp, ranks_per_node=ranks_per_node))
    if len(meshes) != cluster.size:
        raise ConfigError(
            f"pp={pp}, dp={dp}, tp={tp}: their product {len(meshes)} must be the cluster's size {cluster.size}."
        )
    meeting_places: dict[tuple[Axis, tuple[int, ...]], Rendezvous] = {}

    def communicator(mesh: ProcessMesh, axis: Axis) -> VirtualCommunicator:
        key = (axis, mesh.ranks(axis))
        if key not in meeting_places:
            meeting_places[key] = Rendezvous(cluster.hub, axis, key[1])
        return VirtualCommunicator(meeting_places[key], mesh.rank_in_group(axis))

    def groups(mesh: ProcessMesh, location: Location) -> Groups:
        world, pipeline, data, tensor, expert = (communicator(mesh, axis) for axis in AXES)
        return Groups(world=world, pp=pipeline, dp=data, tp=tensor, ep=expert, location=location)

    return [groups(mesh, location) for mesh, location in zip(meshes, cluster.hub.locations, strict=True)]
