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
from moe_tools.expert_load.analysis import Floats, balancedness, check_fits, predicted_rank_loads


def make_plan(
    trace: Trace,
    *,
    ep: int | None = None,
    ranks_per_node: int | None = None,
    num_redundant: int | None = None,
    policy: PlanPolicy = "best",
    move_budget: int | None = None,
) -> ExpertPlacement:
    """A placement for the loads of all windows. What is None is as recorded, but where the recording had no spare
    slot, each rank gets one more.

    The recorded placement is what moves are counted from, where the plan has the same ranks and slots. ConfigError as
    the planner raises it, and where a budget of moves has no placement to move from.
    """
    header = trace.header
    ep = header.ep if ep is None else ep
    before = header.placement()
    if num_redundant is None:
        spare = 0 if before is None else before.num_physical - before.num_logical
        num_redundant = spare if spare and ep == header.ep else ep
    slots = num_physical_experts(header.num_logical, ep=ep, num_redundant=num_redundant)
    same = before is not None and ep == header.ep and slots == before.num_physical
    if move_budget is not None and not same:
        raise ConfigError(
            f"move_budget={move_budget}: there is nothing to move from: the plan has {slots} slots on ep={ep}, the "
            f"recording {'none known' if before is None else before.num_physical} on ep={header.ep}. Leave it out."
        )
    return plan_placement(
        trace.loads,
        ep=ep,
        ranks_per_node=header.ranks_per_node if ranks_per_node is None else ranks_per_node,
        num_redundant=num_redundant,
        policy=policy,
        previous=before if same else None,
        move_budget=move_budget,
    )


def read_plan(file: str, trace: Trace) -> ExpertPlacement:
    """A placement file. ConfigError where it cannot be read or is for another model than the trace."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan={file}: cannot be read: {error}. Make one: plan trace=… output=plan.json.") from None
    plan = ExpertPlacement.from_json(text, name=f"plan={file}")
    check_fits(plan, trace)
    return plan


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A plan's promise, made from one trace, and what was measured under it. [L, ep] rows each."""

    predicted: Floats
    exact: bool
    """Each token's route was sent through the plan; else experts' tokens spread evenly over their replicas"""
    measured: Floats
    same_routing: bool
    """Both traces have the same load for every expert of every layer"""

    def off_by(self) -> float:
        """Mean over ranks and layers of |predicted − measured| rows, over the mean of measured rows."""
        mean = float(self.measured.mean())
        return float(np.abs(self.predicted - self.measured).mean()) / mean if mean else 0.0

    def balances(self) -> tuple[Floats, Floats]:
        """[L] balancedness, predicted and measured."""
        return balancedness(self.predicted), balancedness(self.measured)


def compare(before: Trace, plan: ExpertPlacement, measured: Trace, *, choice: ReplicaChoice) -> Comparison:
    """What `plan` promises by `before`, against `measured`, which was recorded under it.

    ConfigError where they are of different models, or `measured` ran under another placement.
    """
    check_fits(plan, before)
    check_fits(plan, measured)
    ran = measured.header.placement()
    if ran is None or ran.ep != plan.ep or not ran.phy2log.equal(plan.phy2log):
        raise ConfigError(
            "measured: was recorded under another placement than the plan. Run the plan first: "
            "apply trace=… plan=plan.json."
        )
    rows, exact = predicted_rank_loads(before, plan, choice)
    return Comparison(
        predicted=rows.sum(axis=0),
        exact=exact,
        measured=measured.total_rank_loads.double().numpy(),
        same_routing=before.total_loads.equal(measured.total_loads),
    )
