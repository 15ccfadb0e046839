"""Where experts and their copies go, from measured loads. Pure functions.

W windows of time, L MoE layers, E' logical experts, P slots on ep ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import torch

from moe_runtime.balance.arrays import Bools, Grid, Ints, Loads, windows
from moe_runtime.balance.best import best, measures, objective, over_nodes
from moe_runtime.balance.eplb import eplb
from moe_runtime.balance.kept import Ways, keep
from moe_runtime.balance.measures import balancedness, rank_loads
from moe_runtime.errors import ConfigError, nearest, nearest_divisor
from moe_runtime.parallel.placement import ExpertPlacement, num_physical_experts

__all__ = ["GainAtMoves", "PlanPolicy", "balancedness", "gain_at_moves", "plan_placement", "plans_beside", "rank_loads"]

PlanPolicy = Literal["best", "eplb"]
FRACTIONS: Final = (0.05, 0.1, 0.25, 0.5, 1.0)
PARTS: Final = (2, 4, 8, 16)


def plan_placement(
    loads: Loads,
    *,
    ep: int,
    ranks_per_node: int,
    num_groups: int | None = None,
    num_redundant: int = 0,
    policy: PlanPolicy = "best",
    previous: ExpertPlacement | None = None,
    move_budget: int | None = None,
) -> ExpertPlacement:
    """A placement for `loads [L, E']` or `[W, L, E']` (tokens per logical expert, int or float).

    `eplb`: DeepSeek's policies on the sum of the windows. `best`: in every layer at least as even as `eplb`: for the
    load itself where there is one window, else over time and in the worst window, at which the load's sum may be less
    even than `eplb` leaves it (docs/balance.md). With `num_groups` experts of one group stay on one node
    where the nodes divide the groups; without, all ranks are alike. `previous`: ranks and slots are numbered so that
    most slots keep their expert; `best` keeps layers that it cannot improve. `move_budget`: at most so many slots
    change, summed over layers, best gain first.

    Raises ConfigError for loads that are not finite, not negative counts or all 0 in a layer, and for shapes, groups,
    redundancy, a previous placement or a budget that do not fit.
    """
    values = windows(loads)
    request = _Request.checked(values, ep, ranks_per_node, num_groups, num_redundant)
    if policy not in get_args(PlanPolicy):
        raise ConfigError(f"policy={policy!r}; choose best or eplb.{nearest(str(policy), get_args(PlanPolicy))}")
    if move_budget is not None and (previous is None or policy == "eplb" or move_budget < 0):
        raise ConfigError(
            f"move_budget={move_budget} with policy={policy} and {'no' if previous is None else 'a'} previous "
            f"placement: a budget is a number of slots of at least 0, counted from a previous placement, and eplb "
            f"plans from nothing. Use policy=best with previous=…, or no budget."
        )
    old = None if previous is None else _slots_of(previous, request, len(values[0]))
    return _placement(request.plan(values, policy, old, move_budget), request)


def plans_beside(
    loads: Loads,
    previous: ExpertPlacement,
    *,
    ranks_per_node: int,
    num_groups: int | None = None,
    policy: PlanPolicy = "best",
    move_budget: int | None = None,
) -> tuple[ExpertPlacement, ...]:
    """The plan of `plan_placement`, then those with at most 1/2, 1/4, 1/8 and 1/16 of its moves, from the same search:
    few moves often bring most of the gain. `eplb` plans from nothing and heeds no budget: one plan.

    Errors as `plan_placement`.
    """
    values = windows(loads)
    sizes = previous.num_logical, previous.ep, previous.num_local
    request = _Request.of_slots(*sizes, ranks_per_node, num_groups)
    old = _slots_of(previous, request, len(values[0]))
    plans = request.plans(values, policy, old, None if policy == "eplb" else move_budget, PARTS)
    return tuple([_placement(slots, request) for slots in plans])


@dataclass(frozen=True, slots=True)
class GainAtMoves:
    """`num_moves` slots changed (`fraction` of what the unlimited plan changes) -> mean of the layers' `balancedness`
    under the whole load; `gain` is the share of the unlimited plan's improvement of the objective."""

    fraction: float
    num_moves: int
    balancedness: float
    gain: float


def gain_at_moves(
    loads: Loads,
    previous: ExpertPlacement,
    *,
    ranks_per_node: int,
    num_groups: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> tuple[GainAtMoves, ...]:
    """What `best` gains from `previous` when it may make only some of its moves. Errors as `plan_placement`."""
    values = windows(loads)
    if values.shape[2] != previous.num_logical:
        raise ConfigError(
            f"previous: {previous.num_logical} logical experts, but the loads have {values.shape[2]}. Use the load and "
            f"the placement of one model."
        )
    request = _Request.of_slots(values.shape[2], previous.ep, previous.num_local, ranks_per_node, num_groups)
    old = _slots_of(previous, request, len(values[0]))
    ways = Ways(values, old, request.plan(values, "best", old, None), node=request.node)
    full = ways.full
    weight = values.sum(axis=(0, 2))

    def cost(slots: Ints) -> float:
        return float((objective(measures(values, slots)) * weight).sum())

    before, after = cost(old), cost(full)
    points = []
    for fraction in fractions:
        budget = int(fraction * int((old != full).sum()))
        slots = ways.within(budget)
        gain = (before - cost(slots)) / (before - after) if before > after else 1.0
        even = float((1 / measures(values, slots)[0]).mean())
        points.append(GainAtMoves(fraction, int((old != slots).sum()), even, gain))
    return tuple(points)


@dataclass(frozen=True, slots=True)
class _Request:
    """Checked sizes. `nodes` is 1 for the global policy; `num_nodes`: the nodes that there are, 1 where they differ in
    size."""

    num_logical: int
    ep: int
    num_slots: int
    num_nodes: int
    nodes: int = 1
    num_groups: int = 1

    @classmethod
    def checked(
        cls, values: Grid, ep: int, ranks_per_node: int, num_groups: int | None, num_redundant: int
    ) -> _Request:
        experts = values.shape[2]
        if ep < 1:
            raise ConfigError(f"ep={ep}: must be at least 1.")
        if not 0 <= num_redundant <= experts * ep:
            raise ConfigError(
                f"num_redundant={num_redundant}: must lie in 0..{experts * ep}, where each of {ep} ranks has a copy of "
                f"each of {experts} experts. Nearest: {min(max(num_redundant, 0), experts * ep)}."
            )
        slots = num_physical_experts(experts, ep=ep, num_redundant=num_redundant) // ep
        return cls.of_slots(experts, ep, slots, ranks_per_node, num_groups)

    @classmethod
    def of_slots(cls, experts: int, ep: int, slots: int, ranks_per_node: int, num_groups: int | None) -> _Request:
        if ranks_per_node < 1:
            raise ConfigError(f"ranks_per_node={ranks_per_node}: must be at least 1.")
        nodes = ep // ranks_per_node if ep % ranks_per_node == 0 else 1
        if num_groups is None:
            return cls(experts, ep, slots, nodes)
        if num_groups < 1 or experts % num_groups:
            raise ConfigError(
                f"num_groups={num_groups}: must divide the {experts} logical experts. Nearest: "
                f"{nearest_divisor(max(num_groups, 1), experts)}; without groups all ranks are alike."
            )
        grouped = nodes > 1 and num_groups % nodes == 0
        return cls(experts, ep, slots, nodes, *((nodes, num_groups) if grouped else ()))

    def plan(self, values: Grid, policy: PlanPolicy, old: Ints | None, budget: int | None) -> Ints:
        return next(self.plans(values, policy, old, budget))

    def plans(
        self, values: Grid, policy: PlanPolicy, old: Ints | None, budget: int | None, parts: Sequence[int] = ()
    ) -> Iterator[Ints]:
        """The plan, and beside `old` those with at most 1/part of its moves."""
        total = values.sum(axis=0)
        base = eplb(total, ep=self.ep, num_slots=self.num_slots, nodes=self.nodes, num_groups=self.num_groups)
        slots = base if policy == "eplb" else best(values, base, nodes=self.nodes, num_groups=self.num_groups)
        if old is None:
            deals = policy == "best" and self.nodes == 1
            yield over_nodes(total, slots, nodes=self.num_nodes) if deals else slots
            return
        slots = keep(slots, old, nodes=self.nodes, num_experts=self.num_logical)
        if policy == "eplb":
            yield slots
            return
        ways = Ways(values, old, slots, node=self.node)
        near = ways.nearest(base, self._grouped(old))
        whole = near if budget is None or int((near != old).sum()) <= budget else ways.within(budget)
        yield whole
        moves = int((whole != old).sum())
        yield from (ways.within(moves // part) for part in parts if moves >= part)

    def _grouped(self, slots: Ints) -> Bools:
        """[L]: each group of `slots [L, D, S]` is on one node."""
        layers = len(slots)
        on = np.zeros((layers, self.nodes, self.num_groups), dtype=np.bool_)
        groups = slots.reshape(layers, self.nodes, -1) * self.num_groups // self.num_logical
        np.put_along_axis(on, groups, True, axis=2)
        one: Bools = (on.sum(axis=1) == 1).all(axis=1)
        return one

    @property
    def node(self) -> Ints:
        """[ep]: the node whose experts a rank keeps to."""
        return np.arange(self.ep) // (self.ep // self.nodes)


def _slots_of(previous: ExpertPlacement, request: _Request, num_layers: int) -> Ints:
    """[L, D, S]; ConfigError where the placement is one of other sizes."""
    if previous.num_layers != num_layers:
        raise ConfigError(
            f"previous: {previous.num_layers} layers, but the loads have {num_layers}. Use the load and the placement "
            f"of one model."
        )
    seen = (previous.num_logical, previous.ep, previous.num_local)
    wanted = (request.num_logical, request.ep, request.num_slots)
    if seen != wanted:
        raise ConfigError(
            f"previous: [experts, ep, slots per rank]={list(seen)}, but the plan asked for has {list(wanted)}; slots "
            f"cannot move between sizes. Set num_redundant={previous.num_physical - previous.num_logical} and the same "
            f"ep, or leave previous out."
        )
    return previous.phy2log.numpy().reshape(previous.num_layers, previous.ep, -1)


def _placement(slots: Ints, request: _Request) -> ExpertPlacement:
    table = torch.from_numpy(np.ascontiguousarray(slots, dtype=np.int64).reshape(len(slots), -1))
    return ExpertPlacement(table, request.num_logical, request.ep)
