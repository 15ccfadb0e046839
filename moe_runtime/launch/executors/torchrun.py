"""Under torchrun: each process is one rank."""

from __future__ import annotations

from moe_runtime.comm.process import init_process
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.executors.rank import OwnerExecutor, Rank, ServingExecutor, check_free
from moe_runtime.launch.executors.threads import threads_per_process
from moe_runtime.launch.meeting import Meeting


def torchrun_rank(
    composed: Composed, parts: ProcessParts, owner: RequestOwner, *, meeting: Meeting, on_progress: OnProgress
) -> OwnerExecutor | ServingExecutor:
    """This process's rank, joined to the others at torchrun's store; rank 0 owns the requests."""
    check_free()
    config, place = composed.config, meeting.place
    cuda = config.device == "cuda"
    process = init_process(
        place.rank,
        place.world_size,
        store=meeting.store,
        backend="nccl" if cuda else "gloo",
        deadline_s=config.comm_timeout_s,
        device=f"cuda:{place.local_rank}" if cuda else "cpu",
        run_id=meeting.run_id,
    )
    owns = place.rank == 0
    rank = Rank(
        lambda: parts,
        process,
        mesh=composed.topology.mesh(place.rank),
        owner=owner if owns else None,
        num_threads=threads_per_process(config, place.local_world_size),
        on_progress=on_progress,
    )
    return OwnerExecutor(rank, owner) if owns else ServingExecutor(rank)
