"""An agreed step with its plan, as a group's leader hands it to the other tp ranks: one row of integers."""

from __future__ import annotations

import numpy as np

from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.plan import StepPlan
from moe_runtime.engine.runner import GroupStep

_PHASES = tuple(Phase)
_HEADER = 10


def encode_step(step: GroupStep, plan: StepPlan, *, stop: bool, report: bool) -> bytes:
    """`stop`, `report`: as in GroupCommands."""
    header = [
        int(stop),
        int(report),
        _PHASES.index(step.phase),
        step.padded_tokens,
        step.capacity,
        step.num_chunks,
        step.chunk_tokens,
        int(step.graph),
        step.num_micro_batches,
        int(step.split_combine),
    ]
    return np.array(header + plan.to_ints(), dtype=np.int64).tobytes()


def decode_step(payload: bytes) -> tuple[GroupStep, StepPlan, bool, bool]:
    """The inverse of `encode_step`: step, plan, stop, report."""
    row = np.frombuffer(payload, dtype=np.int64).tolist()
    stop, report, phase, padded, capacity, num_chunks, chunk_tokens, graph, micro_batches, split = row[:_HEADER]
    step = GroupStep(
        _PHASES[phase], padded, capacity, num_chunks, chunk_tokens, bool(graph), micro_batches, bool(split)
    )
    return step, StepPlan.from_ints(row[_HEADER:]), bool(stop), bool(report)
