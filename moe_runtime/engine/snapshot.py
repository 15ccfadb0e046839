"""EngineSnapshot: what the engine shows of itself. Read-only; terminal views and metrics read this and nothing else."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.graphs import NO_GRAPHS, GraphCounts
from moe_runtime.engine.rebalance_state import REBALANCE_OFF, RebalanceState
from moe_runtime.engine.recording import LoadWindow
from moe_runtime.engine.scheduler import SchedulerStats
from moe_runtime.parallel.mesh import ProcessMesh

EngineState = Literal["running", "closed", "failed"]

RATE_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment. Counts are totals since the start unless they say otherwise."""

    mesh: ProcessMesh
    """As seen from world rank 0"""
    state: EngineState
    step: int
    """Steps taken, idle ones included"""
    phase: Phase
    """Of the last step"""
    groups: tuple[SchedulerStats, ...]
    """Per DP group, when the last step was planned"""
    num_pages: int
    """Of each group's cache"""
    num_live_requests: int
    """Submitted and not finished now"""
    num_finished_requests: int
    num_prompt_tokens: int
    """Of completions that gave a token: a prompt counts once for each"""
    num_output_tokens: int
    uptime_s: float
    busy_s: float
    """Time in steps that ran the model"""
    last_step_s: float
    """Of the last step that ran the model"""
    output_tokens_per_s: float
    """Over the last RATE_WINDOW_S seconds of work"""
    graphs: GraphCounts
    """CUDA graphs of world rank 0's process, when the last step ended"""
    num_eager_decode_steps: int
    """Decode steps that ran without one"""
    num_two_batch_steps: int
    """Steps cut into two micro-batches that overlap"""
    num_split_steps: int
    """Steps whose experts' outputs came home in two parts"""
    rebalance: RebalanceState = REBALANCE_OFF
    """Moves of experts while the engine serves"""
    window: LoadWindow | None = None
    """The last window of loads; None before the first, and where neither a trace nor a snapshot file is written"""

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that the prefix caches held, 0..1; of prompts that were looked up there."""
        queries = sum(group.prefix_query_tokens for group in self.groups)
        return sum(group.prefix_hit_tokens for group in self.groups) / queries if queries else 0.0


@dataclass(slots=True)
class StepCounts:
    """What the owner of the requests counts, as in EngineSnapshot."""

    groups: tuple[SchedulerStats, ...]
    steps: int = 0
    phase: Phase = Phase.IDLE
    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_s: float = 0.0
    last_step_s: float = 0.0
    graphs: GraphCounts = NO_GRAPHS
    two_batch_steps: int = 0
    split_steps: int = 0
    eager_decode_steps: int = 0
    rebalance: RebalanceState = REBALANCE_OFF
    window: LoadWindow | None = None


class TokenRate:
    """Tokens per second over the recent steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, int]] = deque()

    def add(self, began: float, ended: float, num_tokens: int) -> None:
        """A step from `began` to `ended`, in seconds of one clock."""
        self._steps.append((began, ended, num_tokens))
        while self._steps[0][1] < ended - RATE_WINDOW_S:
            self._steps.popleft()

    def per_second(self, now: float) -> float:
        """0 where no step ended within the window."""
        recent = [step for step in self._steps if step[1] >= now - RATE_WINDOW_S]
        if not recent:
            return 0.0
        elapsed = recent[-1][1] - recent[0][0]
        return sum(step[2] for step in recent) / elapsed if elapsed > 0 else 0.0
