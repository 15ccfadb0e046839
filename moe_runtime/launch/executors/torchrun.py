"""Under torchrun: each process is one rank."""

from __future__ import annotations

import torch

from moe_runtime.comm.process import init_process
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.executors.process import threads_per_process
from moe_runtime.launch.executors.rank import RankExecutor
from moe_runtime.launch.meeting import Meeting


def torchrun_rank(
    composed: Composed, parts: ProcessParts, owner: RequestOwner, *, meeting: Meeting, on_progress: OnProgress
) -> RankExecutor:
    """This process's rank, joined to the others at torchrun's store; rank 0 owns the requests."""
    config, place = composed.config, meeting.place
    cuda = config.device == "cuda"
    torch.set_num_threads(threads_per_process(composed, place.local_world_size))
    process = init_process(
        place.rank,
        place.world_size,
        store=meeting.store,
        backend="nccl" if cuda else "gloo",
        deadline_s=config.comm_timeout_s,
        device=f"cuda:{place.local_rank}" if cuda else "cpu",
        run_id=meeting.run_id,
    )
    return RankExecutor(parts, process, owner=owner if place.rank == 0 else None, on_progress=on_progress)
