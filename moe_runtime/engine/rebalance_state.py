"""What live rebalancing goes by, and what it shows of itself. L layers, E logical experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms
from moe_runtime.parallel.placement import ExpertPlacement


class Counts(Protocol):
    """Where loads come from."""

    def counts(self) -> Tensor:
        """[L, E] int64: this rank's tokens per layer and logical expert since the start."""

    def copy_counts_(self, out: Tensor) -> None:
        """The same into `out`."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`interval_steps`: steps with tokens from one decision until the next is begun. `deadline_s`: seconds for a plan,
    and for each layer. `save`: called on rank 0 with the placement after each migration and at the end. `window_steps`:
    of a window of the loads that are decided by; the interval has at least one."""

    interval_steps: int
    deadline_s: float
    terms: Terms
    save: Callable[[ExpertPlacement], None] = lambda _: None
    window_steps: int = 100


class Activity(StrEnum):
    OFF = "off"
    WATCHING = "watching"
    """Loads are counted until the next decision."""
    PLANNING = "planning"
    MOVING = "moving"


class Stage(StrEnum):
    """Where a migration can fail."""

    PLAN = "plan"
    SEND = "send"
    CHECKSUM = "checksum"
    CANARY = "canary"
    COMMIT = "commit"
    DEADLINE = "deadline"
    SAVE = "save"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a plan or a layer was abandoned, or a placement not saved. `layer`: the MoE layer, counted from 0, if it is
    of one."""

    stage: Stage
    step: int
    layer: int | None
    reasons: tuple[str, ...]
    """Of each rank that failed: "rank 3: …"."""

    def __str__(self) -> str:
        why = "; ".join(self.reasons)
        if self.stage is Stage.SAVE:
            return (
                f"the placement was not saved at step {self.step}: {why}. What was saved before stays. See that the "
                "folder of balance.save_placement is there, may be written to and has room."
            )
        what = "the plan" if self.layer is None else f"MoE layer {self.layer}"
        return f"{what} was abandoned at step {self.step} ({self.stage}): {why}"


@dataclass(frozen=True, slots=True)
class RebalanceState:
    """Now, and totals since the start. Equal on all ranks, but that only rank 0 knows of a placement that could not be
    saved: its `last_failure` may be one of SAVE."""

    activity: Activity = Activity.OFF
    window_steps: int = 0
    """Steps with tokens since the loads of the last decision were taken"""
    layer: int | None = None
    """MoE layer that moves now"""
    layers_left: int = 0
    """Layers of this migration that have not ended, `layer` among them"""
    layer_progress: float = 0.0
    """Share of the layer's rounds that are done"""
    decision: Decision | None = None
    """The last one, without its `changes`"""
    num_decisions: int = 0
    num_migrations: int = 0
    """Decisions that moved something"""
    num_layers_committed: int = 0
    num_layers_abandoned: int = 0
    num_layers_dropped: int = 0
    """Not begun, because a layer of the same migration missed its deadline"""
    intervals: int = 1
    """From one decision to the next: twice as many after each deadline missed, by a plan or a layer, at most 8; 1 again
    after a commit, or a decision in time that moves nothing"""
    promised: float | None = None
    """Utilisation that the last migration was begun for; `decision.utilisation` is what came of it"""
    num_slots_moved: int = 0
    moved_bytes: int = 0
    """Between ranks, of committed layers; sum over ranks"""
    last_commit_step: int | None = None
    last_failure: Failure | None = None


REBALANCE_OFF = RebalanceState()
