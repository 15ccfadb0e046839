"""One rank in its own process, over torch.distributed. Rank 0 owns the requests, the others serve."""

from __future__ import annotations

import threading

import torch

from moe_runtime.comm.process import Process
from moe_runtime.comm.torch_dist import torch_dist_groups
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.errors import CheckpointError, ConfigError, MoeRuntimeError
from moe_runtime.launch.build import OnProgress, ProcessParts, build_engine
from moe_runtime.parallel.mesh import ProcessMesh


class RankExecutor:
    """Builds this process's rank; all ranks agree that every one is loaded before any runs."""

    def __init__(
        self, parts: ProcessParts, process: Process, *, owner: RequestOwner | None, on_progress: OnProgress
    ) -> None:
        self._process = process
        self._owner = owner
        self._thread: threading.Thread | None = None
        self._engine: RankEngine | None = None
        try:
            self._engine = self._build(parts, on_progress)
        except BaseException as error:
            process.close(error)
            raise
        if owner is not None:
            self._thread = threading.Thread(target=self._run, args=(owner,), name="engine", daemon=True)
            self._thread.start()

    @property
    def serves_only(self) -> bool:
        return self._owner is None

    def _build(self, parts: ProcessParts, on_progress: OnProgress) -> RankEngine:
        config = parts.config
        mesh = ProcessMesh(
            pp=config.pp, dp=config.dp, tp=config.tp, rank=self._process.rank, ranks_per_node=config.ranks_per_node
        )
        groups = torch_dist_groups(mesh, self._process)
        engine, failure = None, ""
        try:
            with torch.inference_mode():
                engine = build_engine(parts, mesh, groups, owner=self._owner, on_progress=on_progress)
        except (MoeRuntimeError, OSError, MemoryError) as error:
            failure = f"{type(error).__name__}: {error}"
            if isinstance(error, CheckpointError | ConfigError):
                failure = str(error)
        failures = [text.decode() for text in groups.world.collect(failure.encode())]
        failed = [(rank, text) for rank, text in enumerate(failures) if text]
        if failed or engine is None:
            rank, text = failed[0]
            more = f" ({len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
            raise CheckpointError(f"rank {rank} could not load its part{more}: {text}")
        return engine

    def _run(self, owner: RequestOwner) -> None:
        failure: BaseException | None = None
        try:
            self.serve()
        except BaseException as error:  # noqa: BLE001 - handed to every thread that waits for a result
            failure = error
        owner.end(failure)

    def serve(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return  # served before: the owner has stopped
        failure: BaseException | None = None
        try:
            with torch.inference_mode():
                engine.serve()
                engine.groups.world.barrier()
        except BaseException as error:
            failure = error
            raise
        finally:
            self._process.close(failure)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
        elif self._engine is not None:
            self.serve()  # a rank that nobody asked to generate still serves the owner
