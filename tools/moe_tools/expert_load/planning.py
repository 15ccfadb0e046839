"""`plan` and `compare`: a placement made for a trace, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_runtime.balance.planner import PlanPolicy, plan_placement
from moe_runtime.balance.trace import Trace
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement, num_physical_experts
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_tools.expert_load.analysis import Floats, check_fits, predicted_rank_loads, time_used


def make_plan(
    trace: Trace,
    *,
    ep: int | None = None,
    ranks_per_node: int | None = None,
    num_redundant: int | None = None,
    num_groups: int | None = None,
    policy: PlanPolicy = "best",
    move_budget: int | None = None,
) -> ExpertPlacement:
    """A placement for the loads of all windows. What is None is as recorded, but where the recording had no spare
    slot, each rank gets one more, unless a budget of moves says that slots stay. `num_groups`: the model's, as live
    rebalancing has them.

    The recorded placement is what moves are counted from, where the plan has the same ranks and slots. ConfigError as
    the planner raises it, and where a budget of moves has no placement to move from.
    """
    header = trace.header
    ep = header.ep if ep is None else ep
    before = trace.placement_at(int(trace.last_step.max()))
    spare = 0 if before is None else before.num_physical - before.num_logical
    if num_redundant is None:
        as_recorded = ep == header.ep and (spare or move_budget is not None)
        num_redundant = spare if as_recorded else ep
    slots = num_physical_experts(header.num_logical, ep=ep, num_redundant=num_redundant)
    same = before is not None and ep == header.ep and slots == before.num_physical
    if move_budget is not None and not same:
        raise ConfigError(
            f"move_budget={move_budget}: there is nothing to move from: the plan has {slots} slots on ep={ep}, the "
            f"recording {'none known' if before is None else before.num_physical} on ep={header.ep}. "
            + (
                "Leave it out."
                if before is None
                else f"Set ep={header.ep} placement.num_redundant_experts={spare}, or leave it out."
            )
        )
    return plan_placement(
        trace.loads,
        ep=ep,
        ranks_per_node=header.ranks_per_node if ranks_per_node is None else ranks_per_node,
        num_groups=num_groups,
        num_redundant=num_redundant,
        policy=policy,
        previous=before if same else None,
        move_budget=move_budget,
    )


def read_plan(file: str) -> ExpertPlacement:
    """A placement file. ConfigError where it cannot be read or is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan={file}: cannot be read: {error}. Make one: plan trace=… output=plan.json") from None
    try:
        return ExpertPlacement.from_json(text, name=f"plan={file}")
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith("plan=") else f"plan={file}: {said}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A plan's promise, made from one trace, and what was measured under it. `[W, L, ep]` rows each; where the runs
    differ, so may W."""

    predicted: Floats
    exact: bool
    """Each token's route was sent through the plan; else experts' tokens spread evenly over their replicas"""
    measured: Floats
    same_routing: bool
    """Both traces have the same load for every expert of every layer"""

    @property
    def totals(self) -> tuple[Floats, Floats]:
        """[L, ep] rows of all windows, predicted and measured."""
        return self.predicted.sum(axis=0), self.measured.sum(axis=0)

    def off_by(self) -> float:
        """Mean over ranks and layers of |predicted − measured| rows in all, over the mean of measured rows."""
        predicted, measured = self.totals
        mean = float(measured.mean())
        return float(np.abs(predicted - measured).mean()) / mean if mean else 0.0

    def used(self) -> tuple[float, float]:
        """`time_used`, predicted and measured: what `plan` promises."""
        return time_used(self.predicted), time_used(self.measured)


def compare(
    before: Trace, plan: ExpertPlacement, measured: Trace, *, choice: ReplicaChoice | None = None
) -> Comparison:
    """What `plan` promises by `before`, against `measured`, which was recorded under it. `choice` None: as measured.

    ConfigError where they are of different models, or `measured` did not run under the plan from start to end.
    """
    choice = choice or (ReplicaChoice(own) if (own := measured.header.replica_choice) else None)
    check_fits(plan, before.header)
    check_fits(plan, measured.header)
    ran = measured.header.placement()
    if ran is None or ran.ep != plan.ep or not ran.phy2log.equal(plan.phy2log):
        raise ConfigError(
            "measured: was recorded under another placement than the plan. Run the plan first: "
            "apply trace=… plan=plan.json"
        )
    if len(measured.change_step):
        raise ConfigError(
            f"measured: experts moved away from the plan at step {int(measured.change_step[0])}. Record it with "
            "balance.rebalance=off."
        )
    rows, exact = predicted_rank_loads(before, plan, choice)
    return Comparison(
        predicted=rows,
        exact=exact,
        measured=measured.rank_loads.double().numpy(),
        same_routing=before.total_loads.equal(measured.total_loads),
    )
