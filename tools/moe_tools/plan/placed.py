"""The placements that a question's policy makes: for the replay, and as files for `placement.file=`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from moe_models.base import ModelConfig
from torch import Tensor

from moe_runtime.balance.planner import plan_placement
from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.plan.answer import Answer
from moe_tools.plan.deployment import Deployment
from moe_tools.plan.hardware import Machine
from moe_tools.plan.routes import open_trace, seen_loads
from moe_tools.plan.settings import PlanConfig

Files = Mapping[tuple[int, int], str]
"""(ep, redundant) → the placement file of such a unit."""
NO_FILES: Final[Files] = MappingProxyType({})


def planned(
    plan: PlanConfig, loads: Tensor, model: ModelConfig, machine: Machine, *, ep: int, redundant: int
) -> ExpertPlacement:
    """As live rebalancing plans: groups hold routed experts only, so they say nothing where shared ones are placed too.

    `loads [W, L, E'] int64`. ConfigError where there is no placement of that size.
    """
    assert plan.policy != "uniform", "even placements are not planned"
    return plan_placement(
        loads,
        ep=ep,
        ranks_per_node=machine.nvlink_ranks,
        num_groups=model.n_group if plan.groups and loads.shape[-1] == model.n_routed_experts else None,
        num_redundant=redundant,
        policy=plan.policy,
    )


def winners(answer: Answer) -> Iterator[tuple[str, Deployment]]:
    """The units whose commands are printed, with their names."""
    if answer.together:
        yield "one unit", answer.together[0].decode.deployment
    if answer.apart:
        yield "decode", answer.apart[0].decode.deployment
        yield "prefill", answer.apart[0].prefill.deployment


def write_placements(answer: Answer) -> Files:
    """A file for every (ep, redundant) among the winners, planned from the trace's loads in all layers: `placement=`
    for the first, the same name with `-ep32+0` for others. OSError where it cannot be written."""
    plan = answer.plan
    files: dict[tuple[int, int], str] = {}
    if plan.placement is None or plan.trace is None or plan.policy == "uniform":
        return files
    loads, first = seen_loads(open_trace(plan.trace, answer.model)), Path(plan.placement)
    for _, unit in winners(answer):
        key = (unit.layout.ep, unit.layout.redundant)
        if key in files:
            continue
        file = first if not files else first.with_name(f"{first.stem}-ep{key[0]}+{key[1]}{first.suffix}")
        made = planned(plan, loads, answer.model, answer.machine, ep=key[0], redundant=key[1])
        file.write_text(made.to_json(), encoding="utf-8")
        files[key] = str(file)
    return files


def command(unit: Deployment, files: Files) -> str:
    """Its command line, with its placement where there is a file."""
    return unit.command(placement_file=files.get((unit.layout.ep, unit.layout.redundant)))
