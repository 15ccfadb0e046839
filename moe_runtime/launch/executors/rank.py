"""One rank in its own process, over torch.distributed. Rank 0 owns the requests, the others serve."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist

from moe_runtime.comm.process import Process
from moe_runtime.comm.together import ProcessTogether
from moe_runtime.comm.torch_dist import patient_world, torch_dist_groups
from moe_runtime.comm.waiting import await_thread
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.errors import ConfigError
from moe_runtime.launch.build import OnProgress, ProcessParts, build_engine, capture_graphs
from moe_runtime.launch.device import on_device
from moe_runtime.launch.executors.base import without_frames
from moe_runtime.launch.executors.threads import torch_threads
from moe_runtime.launch.graphs import Capture, graphs_fit
from moe_runtime.launch.wire import decode_error, encode_error
from moe_runtime.parallel.mesh import ProcessMesh


class Rank:
    """This process's rank, loaded; all ranks agree that every one is loaded before any runs.

    `open_parts` is part of loading, so its errors too are told to all. Raises the error of the first rank that failed,
    on every rank. `load_timeout_s`: how long a loaded rank waits for the others. `serve` or `leave` it in every case.
    """

    def __init__(
        self,
        open_parts: Callable[[], ProcessParts],
        process: Process,
        *,
        mesh: ProcessMesh,
        owner: RequestOwner | None,
        num_threads: int,
        load_timeout_s: float,
        on_progress: OnProgress,
    ) -> None:
        self._process = process
        self._num_threads = num_threads
        self._engine: RankEngine | None = None
        try:
            self._engine = self._load(open_parts, mesh, owner, load_timeout_s, on_progress)
            graphs = self._engine.graphs
            with (
                torch.inference_mode(),
                on_device(process.device),
                nullcontext() if graphs is None else graphs_fit(graphs.sizes, process.device),
            ):
                self._engine.prepare()
        except BaseException as error:
            _leave(self._engine, process, error)
            raise

    def _load(
        self,
        open_parts: Callable[[], ProcessParts],
        mesh: ProcessMesh,
        owner: RequestOwner | None,
        load_timeout_s: float,
        on_progress: OnProgress,
    ) -> RankEngine:
        groups = torch_dist_groups(mesh, self._process)
        all_loaded = patient_world(self._process, deadline_s=load_timeout_s)
        engine: RankEngine | None = None
        failure: Exception | None = None
        try:
            with torch.inference_mode(), on_device(self._process.device):
                parts = open_parts()
                graphs = capture_graphs(parts, mesh.rank, on_progress)
                capture = None if graphs is None else Capture(graphs, ProcessTogether(self._process))
                engine = build_engine(parts, mesh, groups, owner=owner, capture=capture, on_progress=on_progress)
                parts.source.end_sharing()
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank must hear of it
            failure = error
        told = all_loaded.collect(b"" if failure is None else encode_error(failure).encode())
        failed = [rank for rank, payload in enumerate(told) if payload]
        if engine is None or failed:
            first = decode_error(told[failed[0]])
            more = f" ({len(failed) - 1} more ranks failed too)" if len(failed) > 1 else ""
            raise type(first)(f"rank {failed[0]} could not load its part{more}: {first}") from failure
        return engine

    def serve(self) -> None:
        """Run until the owner stops; the second time, return at once."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        failure: BaseException | None = None
        try:
            with torch.inference_mode(), torch_threads(self._num_threads), on_device(self._process.device):
                engine.serve()
                engine.groups.world.barrier()
                engine.groups.close()
        except BaseException as error:
            failure = error
            raise
        finally:
            _leave(engine, self._process, failure)

    def leave(self, error: BaseException) -> None:
        """Leave without serving; the others learn why."""
        engine, self._engine = self._engine, None
        if engine is not None:
            _leave(engine, self._process, error)


def _leave(engine: RankEngine | None, process: Process, error: BaseException | None) -> None:
    """Each part also where another one raises."""
    with ExitStack() as last_first:
        if engine is not None:
            last_first.callback(engine.close)  # may wait for a disk: no rank waits for this one by then
        last_first.callback(process.close, error)
        if engine is not None and engine.graphs is not None:
            last_first.callback(engine.graphs.close)  # graphs hold the process groups' communicators


class Peers(Protocol):
    """The processes of the other ranks, where this one started them."""

    def explain(self, failure: BaseException) -> BaseException:
        """The failure, with what is known of processes that have ended."""

    def end(self) -> None: ...


class OwnerExecutor:
    """Rank 0: its engine runs on a thread of its own, which also cleans up when it ends."""

    serves_only = False

    def __init__(self, rank: Rank, owner: RequestOwner, *, peers: Peers | None = None) -> None:
        self._thread = threading.Thread(target=_run, args=(rank, owner, peers), name="engine", daemon=True)
        self._thread.start()

    def serve(self) -> None:
        raise AssertionError("rank 0 owns the requests")

    def close(self, error: BaseException | None = None) -> None:
        if threading.current_thread() is not self._thread:
            await_thread(self._thread)


def _run(rank: Rank, owner: RequestOwner, peers: Peers | None) -> None:
    failure: BaseException | None = None
    try:
        rank.serve()
    except BaseException as error:  # noqa: BLE001 - handed to every thread that waits for a result
        failure = without_frames(error if peers is None else peers.explain(error))
    owner.end(failure)
    if peers is not None:
        peers.end()


class ServingExecutor:
    """Every other rank: serves on the thread that asks, at the latest the one that closes."""

    serves_only = True

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def serve(self) -> None:
        self._rank.serve()

    def close(self, error: BaseException | None = None) -> None:
        if error is None:
            self._rank.serve()
        else:
            self._rank.leave(error)


def check_free() -> None:
    """ConfigError where this process already takes part in a torch.distributed run."""
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is already initialised in this process, by another LLM or by the program. "
            "Close that first, or use launcher=virtual."
        )
