"""When experts move, which, in which order, and what is said of it."""

from __future__ import annotations

import io
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms, Verdict, decide, utilisation
from moe_runtime.balance.moves import ROW_BYTES, layer_moves, num_rounds
from moe_runtime.balance.schedule import LayerChange, in_turn, payback_steps, total_net
from moe_runtime.engine.rebalance_plan import decode, encode
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.launch import planning
from moe_runtime.launch.planning import PlanRule, answer, decide_apart
from moe_runtime.parallel.placement import ExpertPlacement

TERMS = Terms(
    threshold=0.9, horizon_steps=10, row_bytes=100, slot_bytes=ROW_BYTES, bytes_per_step=ROW_BYTES, ranks_per_node=8
)
NOW = ExpertPlacement(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2)
BETTER = ExpertPlacement(torch.tensor([[0, 2, 1, 3], [0, 2, 1, 3]]), 4, 2)
BEST = PlanRule("best", 8, None)


def decision(loads: object, *, planned: ExpertPlacement = BETTER, terms: Terms = TERMS) -> Decision:
    def plan(loads: Tensor, previous: ExpertPlacement, budget: int | None) -> list[ExpertPlacement]:
        assert previous is NOW
        return [planned]

    return decide(torch.tensor(loads), 10, now=NOW, first=NOW, plan=plan, terms=terms)


def test_layers_move_where_that_pays() -> None:
    """Layer 0: 1800 rows on the busiest rank become 1000, 80 a step: 8000 bytes in each of the 9 steps that are left
    after the one that its move takes. Layer 1: 10 rows are saved in 10 steps, 1000 bytes in all."""
    found = decision([[900, 900, 100, 100], [55, 55, 45, 45]])
    assert found.verdict is Verdict.MOVE
    (change,) = found.changes
    assert (change.layer, change.row, change.num_moves, change.num_steps) == (0, (0, 2, 1, 3), 2, 1)
    assert (change.moved_bytes, change.saved_bytes_per_step) == (ROW_BYTES, 8000.0)
    assert change.net_bytes(10) == 9 * 8000 - ROW_BYTES
    assert found.utilisation == pytest.approx(1100 / 1910)
    assert found.predicted == pytest.approx(1100 / 1110)
    assert found.num_steps == 1 and found.payback_steps == pytest.approx(1 + ROW_BYTES / 8000)
    assert "utilisation 0.576" in str(found) and "0.991 with 2 slots of 1 layers moved in 1 steps: 4096" in str(found)


def test_the_layer_that_pays_most_comes_first() -> None:
    found = decision([[500, 500, 0, 0], [5000, 5000, 0, 0]])
    assert [change.layer for change in found.changes] == [1, 0]
    assert found.num_steps == 2


def test_what_moves_nothing() -> None:
    assert decision([[0] * 4] * 2).verdict is Verdict.NO_LOAD
    assert decision([[10, 10, 10, 9]] * 2).verdict is Verdict.BALANCED, "above the threshold: nothing is planned"
    few = decision([[9, 9, 1, 1]] * 2)
    assert few.verdict is Verdict.NO_GAIN, "too few tokens to pay for a slot"
    assert (few.planned, few.predicted) == (1.0, few.utilisation) and "a plan reaches 1.000, but" in str(few)
    assert decision([[900, 900, 100, 100]] * 2, planned=NOW).verdict is Verdict.NO_GAIN


def test_few_moves_where_many_do_not_pay() -> None:
    """Two slots change hands, the busiest rank has half as much to do; seven bring little more at twice the cost."""
    now = ExpertPlacement(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]), 12, 6)
    few = ExpertPlacement(torch.tensor([[0, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]]), 12, 6)
    many = ExpertPlacement(torch.tensor([[0, 3, 1, 5, 4, 7, 6, 9, 8, 11, 10, 2]]), 12, 6)
    loads = torch.tensor([[500, 500, 20, 10, *[10] * 8]])
    terms = replace(TERMS, slot_bytes=40_000, bytes_per_step=100_000)
    found = decide(loads, 10, now=now, first=now, plan=lambda *_: [many, few], terms=terms)
    assert [change.row for change in found.changes] == [(0, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    dear = decide(loads, 10, now=now, first=now, plan=lambda *_: [many], terms=terms)
    assert dear.verdict is Verdict.NO_GAIN, "the many are judged as they are where a planner heeds no budget"


def test_a_plan_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(\(2, 4\), 4, 1\); the run has \(\(2, 4\), 4, 2\)"):
        decision([[900, 900, 100, 100]] * 2, planned=ExpertPlacement(NOW.phy2log, 4, 1))


# Windows


def test_utilisation_is_what_a_step_waits_for() -> None:
    assert utilisation(torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]]), NOW) == pytest.approx((2 + 2) / (4 + 2))
    assert utilisation(torch.zeros(2, 4, dtype=torch.int64), NOW) == 1.0
    in_turns = torch.tensor([[[2, 2, 0, 0]] * 2, [[0, 0, 2, 2]] * 2])
    assert utilisation(in_turns, NOW) == 0.5, "in each window one rank rests"
    assert utilisation(in_turns.sum(0), NOW) == 1.0, "which their sum does not show"


def test_peaks_that_hide_each_other_are_seen() -> None:
    """Two pairs of experts take turns. Their sum is even; in each window one rank has all the work."""
    windows = [[[900, 900, 0, 0], [1] * 4], [[0, 0, 900, 900], [1] * 4]]
    assert decision(torch.tensor(windows).sum(0).tolist()).verdict is Verdict.BALANCED
    found = decision(windows)
    assert found.verdict is Verdict.MOVE and [change.layer for change in found.changes] == [0]
    assert found.changes[0].saved_bytes_per_step == 2 * 900 / 10 * 100, "900 rows fewer at the busiest, twice"
    assert (found.num_windows, found.predicted) == (2, 1.0) and "over 10 steps in 2 windows" in str(found)


def test_best_plans_for_the_windows() -> None:
    """From the sum nothing can be learned; from the windows, which experts are busy at the same time."""
    windows = torch.tensor([[[900, 900, 0, 0]], [[0, 0, 900, 900]]])
    now = ExpertPlacement(torch.tensor([[0, 1, 2, 3]]), 4, 2)
    found = decide(windows, 10, now=now, first=now, plan=BEST, terms=TERMS)
    assert (found.utilisation, found.planned, found.predicted) == (0.5, 1.0, 1.0)


# Time


def change(layer: int, saved: float, moved: int, steps: int) -> LayerChange:
    return LayerChange(layer, (), 1, moved, saved, steps)


def test_a_gain_counts_from_the_commit_on() -> None:
    one = change(0, 10.0, 50, 4)
    assert one.net_bytes(10) == 10 * 6 - 50
    assert in_turn([one], 10) == (one,) and in_turn([one], 9) == (), "by then it does not pay any more"
    pair = [change(0, 10.0, 0, 4), change(1, 30.0, 0, 4)]
    assert in_turn(pair, 10) == (pair[1], pair[0]) and total_net(in_turn(pair, 10), 10) == 30 * 6 + 10 * 2
    assert in_turn(pair, 8) == (pair[1],), "the second would commit as the time ends"
    assert in_turn([], 10) == ()


def test_of_a_layer_one_change_is_taken() -> None:
    large, small = change(0, 100.0, 10, 6), change(0, 60.0, 10, 1)
    assert in_turn([large, small], 100) == (large,)
    assert in_turn([large, small], 8) == (small,)


def test_payback_by_hand() -> None:
    """5 bytes a step after 2 steps, 10 after 4: of 30 bytes 10 are saved by then, the others in 2 steps."""
    assert payback_steps([change(0, 5.0, 10, 2), change(1, 5.0, 20, 2)]) == 6.0
    assert payback_steps([change(0, 20.0, 10, 2), change(1, 5.0, 20, 2)]) == 3.5, "before the second commits"
    assert payback_steps([change(0, 0.0, 10, 2)]) == float("inf")


small_changes = st.lists(
    st.builds(change, st.integers(0, 2), st.integers(1, 9).map(float), st.integers(0, 20), st.integers(1, 4)),
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(changes=small_changes, horizon=st.integers(1, 10))
def test_what_is_taken_has_time_and_pays(changes: list[LayerChange], horizon: int) -> None:
    found = in_turn(changes, horizon)
    left = horizon
    for one in found:
        assert one.net_bytes(left) > 0
        left -= one.num_steps
    assert left >= 0 and len({one.layer for one in found}) == len(found)
    assert bool(found) == any(one.net_bytes(horizon) > 0 for one in changes)


@pytest.mark.parametrize("policy", ["best", "eplb"])
@pytest.mark.parametrize("bytes_per_step", [4096, 1 << 16, 1 << 20])
def test_moves_fit_the_horizon(policy: str, bytes_per_step: int) -> None:
    """Whatever the planner heeds: the layers' rounds, one after the other, are through before the next decision."""
    torch.manual_seed(0)
    loads = (torch.exp(torch.randn(4, 64)) * 1e6).long()
    now = ExpertPlacement.uniform(4, 64, ep=8, num_redundant=8)
    terms = Terms(0.99, 500, 1000, 100 * ROW_BYTES, bytes_per_step, 8)
    rule = PlanRule("best" if policy == "best" else "eplb", 8, None)
    found = decide(loads, 500, now=now, first=now, plan=rule, terms=terms)
    steps = 0
    for one in found.changes:
        moves = layer_moves(one.layer, now.phy2log[one.layer].tolist(), one.row, num_local=9, ranks_per_node=8)
        taken = num_rounds(moves, slot_bytes=terms.slot_bytes, bytes_per_step=bytes_per_step, num_local=9)
        assert taken == one.num_steps and one.net_bytes(500 - steps) > 0
        steps += taken
    assert found.num_steps == steps <= 500
    assert len(found.changes) == 4 or bytes_per_step == 4096, "where there is time all layers move"
    if (policy, bytes_per_step) == ("eplb", 4096):
        assert found.verdict is Verdict.NO_TIME, "a layer's whole plan takes 900 steps"
        assert "too late before the next decision. Raise balance.bytes_per_step or balance.interval_steps" in str(found)
    else:
        assert found.verdict is Verdict.MOVE and found.predicted > found.utilisation


# In a process of its own


def test_a_decision_is_the_same_in_a_process_of_its_own() -> None:
    torch.manual_seed(0)
    loads = (torch.exp(torch.randn(2, 3, 16)) * 1e4).long()
    now = ExpertPlacement.uniform(3, 16, ep=4, num_redundant=4)
    terms = replace(TERMS, horizon_steps=100)
    there = decide_apart(loads, 100, now=now, first=now, rule=BEST, terms=terms, within_s=60)
    here = decide(loads, 100, now=now, first=now, plan=BEST, terms=terms)
    assert there == here and here.verdict is Verdict.MOVE
    assert decode(encode(here)) == here


def test_what_fails_there_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    class Done:
        returncode, stderr = 0, b""

        def __init__(self, words: object, *, input: bytes, **others: object) -> None:  # noqa: A002 - subprocess's name
            asked.append(input)
            self.stdout = answer(io.BytesIO(input))

    monkeypatch.setattr(subprocess, "run", Done)
    now = ExpertPlacement.uniform(2, 4, ep=2, num_redundant=0)
    loads = torch.tensor([[100, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(ConfigError, match="layer 1 has no tokens at all"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=1)
    Done.returncode, Done.stderr = -9, b"Traceback\nMemoryError: no room\n"
    with pytest.raises(MoeRuntimeError, match="exit code -9: MemoryError: no room"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=1)
    monkeypatch.undo()
    monkeypatch.setattr(planning, "GRACE_S", 0.0)
    with pytest.raises(MoeRuntimeError, match="timed out"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=0.05)
