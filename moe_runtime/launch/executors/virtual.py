"""All ranks in this process, as greenlets on the cluster's thread."""

from __future__ import annotations

import threading
from contextlib import ExitStack, nullcontext

from moe_runtime.comm.together import virtual_together
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.comm.waiting import await_thread
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.errors import EngineClosedError
from moe_runtime.launch.build import LoadProgress, OnProgress, ProcessParts, build_engine, capture_graphs
from moe_runtime.launch.device import on_device
from moe_runtime.launch.executors.base import without_frames
from moe_runtime.launch.executors.threads import threads_of_virtual_ranks, torch_threads
from moe_runtime.launch.graphs import Capture, graphs_fit
from moe_runtime.parallel.mesh import ProcessMesh


class VirtualExecutor:
    """Builds every rank's engine and runs them until the owner stops; the thread that runs them cleans up."""

    serves_only = False

    def __init__(self, parts: ProcessParts, owner: RequestOwner, *, on_progress: OnProgress) -> None:
        config = parts.config
        cluster = VirtualCluster(config.pp * config.ep)
        modes = ExitStack()  # of the cluster's thread
        stopped = threading.Event()
        engines: list[RankEngine] = []

        def advance(progress: LoadProgress) -> None:
            if stopped.is_set():
                raise EngineClosedError("stopped while loading.")
            on_progress(progress)

        def enter_modes() -> None:
            modes.enter_context(torch_threads(threads_of_virtual_ranks(config)))
            modes.enter_context(on_device(parts.device))

        try:
            cluster_thread = cluster.call(threading.current_thread)
            cluster.call(enter_modes)
            engines += cluster.call(lambda: _build(cluster, parts, owner, advance))
            graphs = engines[0].graphs
            if graphs is not None or engines[0].fabric is not None:
                with nullcontext() if graphs is None else graphs_fit(graphs.sizes, parts.device):
                    cluster.run(lambda rank: engines[rank].prepare())
        except BaseException:
            stopped.set()  # the caller may have been interrupted while the cluster's thread goes on
            _leave(cluster, modes, engines)
            raise
        self._thread = threading.Thread(target=_run, args=(cluster, modes, engines, owner), name="engine", daemon=True)
        self._threads = (self._thread, cluster_thread)
        self._thread.start()

    def serve(self) -> None:
        raise AssertionError("the owner's process has nothing to serve")

    def close(self, error: BaseException | None = None) -> None:
        if threading.current_thread() not in self._threads:
            await_thread(self._thread)


def _build(
    cluster: VirtualCluster, parts: ProcessParts, owner: RequestOwner, on_progress: OnProgress
) -> list[RankEngine]:
    config = parts.config
    mesh = {"pp": config.pp, "dp": config.dp, "tp": config.tp, "ranks_per_node": config.ranks_per_node}
    groups = virtual_groups(cluster, config.pp, dp=config.dp, tp=config.tp, ranks_per_node=config.ranks_per_node)
    graphs = capture_graphs(parts, 0, on_progress)
    captures = [None if graphs is None else Capture(graphs, place) for place in virtual_together(cluster)]
    try:
        return [
            build_engine(
                parts, rank, own, owner=owner if rank.rank == 0 else None, capture=capture, on_progress=on_progress
            )
            for rank, own, capture in zip(ProcessMesh.enumerate(**mesh), groups, captures, strict=True)
        ]
    finally:
        parts.source.end_sharing()


def _run(cluster: VirtualCluster, modes: ExitStack, engines: list[RankEngine], owner: RequestOwner) -> None:
    failure: BaseException | None = None
    try:
        cluster.run(lambda rank: _serve(engines[rank]))
    except BaseException as error:  # noqa: BLE001 - handed to every thread that waits for a result
        failure = without_frames(error)
    owner.end(failure)
    _leave(cluster, modes, engines)


def _serve(engine: RankEngine) -> None:
    engine.serve()
    engine.groups.close()


def _leave(cluster: VirtualCluster, modes: ExitStack, engines: list[RankEngine]) -> None:
    def leave() -> None:
        for engine in engines:
            engine.close()
        engines.clear()
        modes.close()

    cluster.call(leave)
    cluster.close()
