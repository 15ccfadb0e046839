"""All ranks in this process, as greenlets on the cluster's thread."""

from __future__ import annotations

import threading

from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.config import RuntimeConfig
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.launch.build import OnProgress, ProcessParts, build_engine
from moe_runtime.parallel.mesh import ProcessMesh

SMALL_OPS_FROM = 8
"""Virtual ranks from which on one thread is faster: each rank's operations are too small to split."""


def _num_threads(config: RuntimeConfig) -> int | None:
    """One thread in batch-invariant mode (sums depend on the number of threads) and where ranks are many."""
    if config.engine.batch_invariant:
        return 1
    return config.num_threads or (1 if config.ep >= SMALL_OPS_FROM else None)


class VirtualExecutor:
    """Builds every rank's engine and runs them until the owner stops."""

    serves_only = False

    def __init__(self, parts: ProcessParts, owner: RequestOwner, *, on_progress: OnProgress) -> None:
        config = parts.config
        self._owner = owner
        self._cluster = VirtualCluster(config.pp * config.ep, num_threads=_num_threads(config))
        try:
            self._engines = self._cluster.call(lambda: self._build(parts, on_progress))
        except BaseException:
            self._cluster.close()
            raise
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _build(self, parts: ProcessParts, on_progress: OnProgress) -> list[RankEngine]:
        config = parts.config
        mesh = {"pp": config.pp, "dp": config.dp, "tp": config.tp, "ranks_per_node": config.ranks_per_node}
        groups = virtual_groups(
            self._cluster, config.pp, dp=config.dp, tp=config.tp, ranks_per_node=config.ranks_per_node
        )
        return [
            build_engine(parts, rank, own, owner=self._owner if rank.rank == 0 else None, on_progress=on_progress)
            for rank, own in zip(ProcessMesh.enumerate(**mesh), groups, strict=True)
        ]

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._cluster.run(lambda rank: self._engines[rank].serve())
        except BaseException as error:  # noqa: BLE001 - handed to every thread that waits for a result
            failure = error
        self._owner.end(failure)

    def serve(self) -> None:
        raise AssertionError("the owner's process has nothing to serve")

    def close(self) -> None:
        self._thread.join()
        self._engines = []
        self._cluster.close()
