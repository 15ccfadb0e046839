"""Plans beside a previous one: what stays, what a budget of moves buys, and that it buys the best first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.balance.best import measures, objective
from moe_runtime.balance.kept import keep
from moe_runtime.balance.planner import PARTS, gain_at_moves, plan_placement, plans_beside
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from tests.balance.test_planner import Loads, clashing_layers, draw_loads, slots_of

WORDS = {"ep": 8, "ranks_per_node": 4, "num_redundant": 8}


def plan(loads: Loads, **words: object) -> ExpertPlacement:
    return plan_placement(loads, **(WORDS | words))  # type: ignore[arg-type]


def cost(loads: Loads, placement: ExpertPlacement) -> float:
    return float(objective(measures(loads[None], slots_of(placement))).sum())


def drifted(seed: int) -> tuple[Loads, Loads]:
    """[L, E]: a load, and the same after a while."""
    rng = np.random.default_rng(seed)
    before = np.round(rng.lognormal(0.0, 1.0, (6, 64)) * 1000)
    return before, np.round(before * rng.lognormal(0.0, 0.4, before.shape))


@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.booleans())
def test_keeping_renames_and_nothing_else(seed: int, nodes: int, shuffle: bool) -> None:
    rng = np.random.default_rng(seed)
    new = rng.permuted(np.tile(np.arange(12), (2, 2)), axis=1).reshape(2, 4, 6)
    old = rng.permuted(new.reshape(2, nodes, -1, 6), axis=3)
    if shuffle:
        old = rng.permuted(old.reshape(2, nodes, -1), axis=2).reshape(old.shape)
    kept = keep(new, old.reshape(2, 4, 6), nodes=nodes, num_experts=12)
    for layer in range(2):
        sets = [
            [sorted(tuple(sorted(rank)) for rank in node) for node in slots[layer].reshape(nodes, -1, 6).tolist()]
            for slots in (new, kept)
        ]
        assert sorted(sets[0]) == sorted(sets[1])
    if not shuffle:
        assert np.array_equal(kept, old.reshape(2, 4, 6))


def num_moves(old: ExpertPlacement, new: ExpertPlacement) -> int:
    return int((old.phy2log != new.phy2log).sum())


def test_same_load_moves_nothing() -> None:
    loads, _ = drifted(0)
    first = plan(loads)
    assert num_moves(plan(loads, previous=first), first) == 0
    assert torch.equal(plan(loads, policy="eplb", previous=(eplb := plan(loads, policy="eplb"))).phy2log, eplb.phy2log)


@pytest.mark.parametrize("groups", [None, 8])
def test_a_previous_placement_saves_moves_and_no_balance(groups: int | None) -> None:
    before, after = drifted(1)
    old = plan(before, num_groups=groups)
    fresh, beside = plan(after, num_groups=groups), plan(after, num_groups=groups, previous=old)
    assert num_moves(old, beside) < 0.8 * num_moves(old, fresh)
    assert cost(after, beside) <= cost(after, fresh) + 6 * 0.001 + 1e-9
    limit = measures(after[None], slots_of(plan(after, num_groups=groups, policy="eplb")))
    assert (measures(after[None], slots_of(beside)) <= limit + 1e-9).all(), "never worse than eplb"
    assert groups or not clashing_layers(beside)


def test_a_renamed_eplb_plan_is_as_even_and_moves_less() -> None:
    before, after = drifted(2)
    old = plan(before, policy="eplb")
    fresh, beside = plan(after, policy="eplb"), plan(after, policy="eplb", previous=old)
    assert num_moves(old, beside) < num_moves(old, fresh)
    assert cost(after, beside) == pytest.approx(cost(after, fresh))


@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(0, 120))
def test_a_budget_is_kept_and_never_costs_balance(seed: int, budget: int) -> None:
    loads = draw_loads(seed, (2, 3, 24))
    old = ExpertPlacement.uniform(3, 24, ep=8, num_redundant=8)
    new = plan_placement(loads, ep=8, ranks_per_node=4, num_redundant=8, previous=old, move_budget=budget)
    assert num_moves(old, new) <= budget
    before, after = (objective(measures(loads, slots_of(placement))) for placement in (old, new))
    assert (after <= before + 1e-9).all()


def test_budgets_buy_the_best_first() -> None:
    before, after = drifted(3)
    old = plan(before)
    points = gain_at_moves(after, old, ranks_per_node=4)
    assert [point.fraction for point in points] == [0.05, 0.1, 0.25, 0.5, 1.0]
    full = plan(after, previous=old)
    assert points[-1].num_moves == num_moves(old, full) > 0
    assert points[-1].gain == pytest.approx(1.0)
    gains = [point.gain for point in points]
    assert gains == sorted(gains)
    for point in points[1:]:
        assert point.num_moves <= point.fraction * points[-1].num_moves
        assert point.gain > point.fraction + 0.05 or point.fraction == 1.0, "the first moves gain more than the last"
    assert num_moves(plan(after, previous=old, move_budget=0), old) == 0
    assert torch.equal(plan(after, previous=old, move_budget=10**6).phy2log, full.phy2log)


@pytest.mark.parametrize(("groups", "budget"), [(None, None), (4, None), (None, 40)])
def test_plans_beside_come_from_one_search(groups: int | None, budget: int | None) -> None:
    """The plan first, then those that `plan_placement` gives for parts of its moves."""
    loads, later = drifted(3)
    old = plan(loads, num_groups=groups)
    words = {"ranks_per_node": 4, "num_groups": groups}
    whole, *parts = plans_beside(later, old, move_budget=budget, **words)  # type: ignore[arg-type]
    assert torch.equal(whole.phy2log, plan(later, num_groups=groups, previous=old, move_budget=budget).phy2log)
    moves = num_moves(whole, old)
    assert len(parts) == sum(moves >= part for part in PARTS) >= 3
    for part, placement in zip(PARTS, parts, strict=False):
        assert num_moves(placement, old) <= moves // part
        wanted = plan(later, num_groups=groups, previous=old, move_budget=moves // part)
        assert torch.equal(placement.phy2log, wanted.phy2log)
    (alone,) = plans_beside(later, old, policy="eplb", move_budget=budget, **words)  # type: ignore[arg-type]
    assert torch.equal(alone.phy2log, plan(later, num_groups=groups, policy="eplb", previous=old).phy2log)
    assert num_moves(plans_beside(loads, old, **words)[0], old) == 0  # type: ignore[arg-type]


def test_gain_of_nothing_to_gain() -> None:
    loads, _ = drifted(4)
    points = gain_at_moves(loads, plan(loads), ranks_per_node=4, fractions=[0.5])
    assert (points[0].num_moves, points[0].gain) == (0, 1.0)


def test_gain_from_a_placement_of_another_model() -> None:
    old = plan(drifted(0)[0])
    for shape, text in (
        ((2, 64), "6 layers, but the loads have 2"),
        ((6, 32), "64 logical experts, but the loads have 32"),
    ):
        with pytest.raises(ConfigError, match=text):
            gain_at_moves(draw_loads(0, shape), old, ranks_per_node=4)
    with pytest.raises(ConfigError, match="ranks_per_node=0"):
        gain_at_moves(drifted(0)[0], old, ranks_per_node=0)
