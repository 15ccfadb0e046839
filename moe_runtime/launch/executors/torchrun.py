"""Under torchrun: each process is one rank."""

from __future__ import annotations

from contextlib import nullcontext

from moe_runtime.comm.process import init_process
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import gloo_on_loopback
from moe_runtime.launch.executors.rank import OwnerExecutor, Rank, ServingExecutor, check_free
from moe_runtime.launch.executors.threads import threads_per_process
from moe_runtime.launch.meeting import Meeting


def torchrun_rank(
    composed: Composed, parts: ProcessParts, owner: RequestOwner, *, meeting: Meeting, on_progress: OnProgress
) -> OwnerExecutor | ServingExecutor:
    """This process's rank, joined to the others at torchrun's store; rank 0 owns the requests."""
    check_free()
    config, place = composed.config, meeting.place
    owns = place.rank == 0
    # gloo would listen on every interface of a machine; one that has the whole world needs none but loopback.
    with gloo_on_loopback() if place.local_world_size == place.world_size else nullcontext():
        process = init_process(
            place.rank,
            place.world_size,
            store=meeting.store,
            backend="nccl" if config.device == "cuda" else "gloo",
            deadline_s=config.comm_timeout_s,
            device=parts.device,
            run_id=meeting.run_id,
        )
        rank = Rank(
            lambda: parts,
            process,
            mesh=composed.topology.mesh(place.rank),
            owner=owner if owns else None,
            num_threads=threads_per_process(config, place.local_world_size),
            load_timeout_s=config.load_timeout_s,
            on_progress=on_progress,
        )
    return OwnerExecutor(rank, owner) if owns else ServingExecutor(rank)
