"""How ranks run: in this process, as local processes, or under torchrun."""

from __future__ import annotations

from moe_runtime.engine.owner import RequestOwner
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.executors.base import Executor
from moe_runtime.launch.meeting import Meeting


def start_executor(
    composed: Composed, parts: ProcessParts, owner: RequestOwner, *, meeting: Meeting | None, on_progress: OnProgress
) -> Executor:
    """The executor of `composed.topology.launcher`, its ranks loaded and running."""
    match composed.topology.launcher:
        case "virtual":
            from moe_runtime.launch.executors.virtual import VirtualExecutor

            return VirtualExecutor(parts, owner, on_progress=on_progress)
        case "process":
            from moe_runtime.launch.executors.process import start_processes

            return start_processes(composed, parts, owner, on_progress=on_progress)
        case "torchrun":
            from moe_runtime.launch.executors.torchrun import torchrun_rank

            assert meeting is not None, "a torchrun world meets before it starts"
            return torchrun_rank(composed, parts, owner, meeting=meeting, on_progress=on_progress)
