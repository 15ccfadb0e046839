"""The lower bound, the exact solver, and how far `best` is from both."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from moe_runtime.balance.exact import exact_plan, lower_bound, optimality_gap
from moe_runtime.balance.planner import plan_placement, rank_loads
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from tests.balance.test_planner import Loads, draw_loads


def by_enumeration(loads: Loads, *, ep: int, slots: int, apart: bool) -> float:
    """Every table of slots there is."""
    least = float("inf")
    for table in product(range(len(loads)), repeat=ep * slots):
        ranks = [table[i * slots : (i + 1) * slots] for i in range(ep)]
        if len(set(table)) < len(loads) or (apart and any(len(set(rank)) < slots for rank in ranks)):
            continue
        least = min(least, max(sum(loads[e] / table.count(e) for e in rank) for rank in ranks))
    return least


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(("ep", "slots", "experts"), [(2, 2, 3), (3, 2, 4), (2, 3, 4), (3, 1, 2)])
def test_the_exact_solver_is_exact(ep: int, slots: int, experts: int, apart: bool) -> None:
    for seed in range(4):
        loads = draw_loads(seed, (experts,))
        least, plan = exact_plan(loads, ep=ep, num_slots=slots, apart=apart)
        assert least == pytest.approx(by_enumeration(loads, ep=ep, slots=slots, apart=apart))
        placement = ExpertPlacement(torch.from_numpy(plan).view(1, -1), experts, ep)
        assert rank_loads(loads[None], placement).max().item() == pytest.approx(least)


def test_best_against_the_optimum_of_small_cases() -> None:
    gaps: list[float] = []
    eplb_gaps: list[float] = []
    sizes = [(2, 3, 4), (3, 3, 6), (4, 2, 6), (3, 2, 5), (2, 4, 6), (4, 2, 5)]
    for seed in range(36):
        ep, slots, experts = sizes[seed % len(sizes)]
        loads = draw_loads(seed, (1, experts))
        optimum, _ = exact_plan(loads[0], ep=ep, num_slots=slots, apart=False)
        for policy, found in (("best", gaps), ("eplb", eplb_gaps)):
            plan = plan_placement(
                loads,
                ep=ep,
                ranks_per_node=8,
                num_redundant=ep * slots - experts,
                policy=policy,  # type: ignore[arg-type]
            )
            found.append(rank_loads(loads, plan).max().item() / optimum - 1)
            assert lower_bound(loads, ep=ep, num_slots=slots).item() <= optimum * (1 + 1e-12)
    assert min(gaps) > -1e-12
    assert np.mean(gaps) < 0.02 < np.mean(eplb_gaps), (np.mean(gaps), np.mean(eplb_gaps))


def test_one_slot_per_rank_is_planned_optimally() -> None:
    loads = draw_loads(1, (3, 40))
    plan = plan_placement(loads, ep=64, ranks_per_node=8)
    assert optimality_gap(loads, plan).tolist() == [0.0, 0.0, 0.0]


def test_bound_by_hand() -> None:
    # 4 slots for 3 experts on 2 ranks: 9 in two replicas of 4.5, beside one that is at least 1 / 2.
    assert lower_bound(torch.tensor([[9, 1, 1]]), ep=2, num_slots=2).tolist() == [5.5]
    assert lower_bound(torch.tensor([[9, 1]]), ep=2, num_slots=1).tolist() == [9.0]
    worst = ExpertPlacement(torch.tensor([[0, 1, 2, 2]]), 3, 2)
    assert optimality_gap(torch.tensor([[9, 1, 1]]), worst).item() == pytest.approx(10 / 5.5 - 1)
    assert optimality_gap(torch.zeros(1, 3), worst).tolist() == [0.0]


def test_bound_errors() -> None:
    with pytest.raises(ConfigError, match=r"ep=2 ranks of 1 slots do not hold 3 experts\. Use 2 slots"):
        lower_bound(torch.ones(1, 3), ep=2, num_slots=1)
    with pytest.raises(ConfigError, match=r"must be \[layers, experts\]"):
        lower_bound(torch.ones(1, 1, 3), ep=2, num_slots=2)
    for ep, slots in ((4, 3), (1, 2), (2, 4)):
        with pytest.raises(ConfigError, match="Use plan_placement"):
            exact_plan(np.ones(3), ep=ep, num_slots=slots)
