"""A pool of processes that run one program after the other as gloo ranks; only their fork server imports torch."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from moe_runtime.comm.base import Groups
from moe_runtime.comm.process import host_store, init_process, join_store
from moe_runtime.comm.torch_dist import torch_dist_groups
from moe_runtime.errors import CommunicationError
from moe_runtime.parallel.mesh import ProcessMesh

GlooProgram = Callable[[Groups, int], list[str]]
PATIENCE_S = 90


@dataclass(frozen=True)
class Job:
    program: str
    mesh: ProcessMesh
    port: int
    run_id: str
    seed: int = 0
    deadline_s: float = 60.0
    verify: bool = False


@dataclass(frozen=True)
class Outcome:
    """`error` is the type's name, `threads` the Python threads that outlived the run."""

    value: list[str] = field(default_factory=list)
    error: str | None = None
    text: str = ""
    threads: tuple[str, ...] = ()


def serve(pipe: Connection, programs: Mapping[str, GlooProgram]) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        while (job := pipe.recv()) is not None:
            pipe.send(_run(job, programs[job.program]))


def _run(job: Job, program: GlooProgram) -> Outcome:
    store = join_store("127.0.0.1", job.port, deadline_s=job.deadline_s)
    process = init_process(
        job.mesh.rank, job.mesh.world, store=store, backend="gloo", deadline_s=job.deadline_s, run_id=job.run_id
    )
    error: BaseException | None = None
    value: list[str] = []
    try:
        groups = torch_dist_groups(job.mesh, process, verify=job.verify)
        value = program(groups, job.seed)
        groups.close()
    except Exception as caught:  # noqa: BLE001 - told to the test
        error = caught
    process.close(error)
    threads = tuple(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
    if error is None:
        return Outcome(value=value, threads=threads)
    kind = "CommunicationError" if isinstance(error, CommunicationError) else type(error).__name__
    return Outcome(error=kind, text=str(error), threads=threads)


class GlooPool:
    """`size` processes; `run` uses the first `mesh.world` of them."""

    def __init__(self, size: int, programs: Mapping[str, GlooProgram]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.comm.gloo_pool", "tests.comm.contract"])
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, programs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._store = host_store(deadline_s=PATIENCE_S)
        self._runs = 0

    def run(
        self, program: str, *, dp: int = 1, tp: int = 1, seed: int = 0, deadline_s: float = 60.0, verify: bool = False
    ) -> list[Outcome | None]:
        """The outcome of every rank, None for a process that died."""
        self._runs += 1
        for mesh in ProcessMesh.enumerate(dp=dp, tp=tp):
            job = Job(program, mesh, self._store.port, str(self._runs), seed, deadline_s, verify)
            self.pipes[mesh.rank].send(job)
        return [self._outcome(pipe) for pipe in self.pipes[: dp * tp]]

    def _outcome(self, pipe: Connection) -> Outcome | None:
        assert pipe.poll(PATIENCE_S), "a rank neither answered nor died"
        try:
            outcome = pipe.recv()
        except EOFError:
            return None
        assert isinstance(outcome, Outcome)
        return outcome

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            if process.is_alive():
                pipe.send(None)
            process.join(timeout=PATIENCE_S)
            assert not process.is_alive(), "a rank did not end"
