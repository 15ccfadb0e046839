"""What the balance tables are made with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moe_tools.bench.balance import write_between
from moe_tools.bench.balance_choice import replayed, synthetic
from moe_tools.bench.balance_loads import SYNTHETIC, Recorded

from moe_runtime.parallel.replicas import ReplicaChoice


def test_tables_go_between_their_markers() -> None:
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    assert write_between(text, "x", ["1", "2"]) == "a\n<!-- x: begin -->\n1\n2\n<!-- x: end -->\nb\n"
    with pytest.raises(SystemExit, match="no markers"):
        write_between(text, "y", [])


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_loads_are_counts(name: str) -> None:
    loads = SYNTHETIC[name](np.random.default_rng(0))
    assert loads.shape == (58, 256)
    assert (loads >= 0).all() and (loads == np.round(loads)).all()


def test_the_hot_group_has_its_share() -> None:
    loads = SYNTHETIC["one hot group"](np.random.default_rng(0))
    assert loads[3, 96:128].sum() / loads[3].sum() == pytest.approx(0.6, abs=0.01)


def test_waterfill_is_evenest_after_a_drift() -> None:
    even = synthetic(drift=0.5, tokens=32, shared=1, ep=8)
    assert max(even, key=lambda choice: even[choice]) is ReplicaChoice.WATERFILL
    assert all(0 < value <= 1 for value in even.values())


def test_replay_leaves_small_steps_out() -> None:
    routes = torch.stack([torch.randperm(256)[:8] for _ in range(600)]).unsqueeze(1)
    request, step = torch.arange(600), torch.arange(600) // 400
    recorded = Recorded(np.ones((1, 256)), routes, request, step)
    assert set(replayed(recorded, ep=4)) == set(ReplicaChoice)  # step 1 has 100 tokens of the second half
