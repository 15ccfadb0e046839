"""When experts move, which, in which order, and what is said of it."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms, Verdict, _most, decide, utilisation
from moe_runtime.balance.moves import ROW_BYTES, layer_moves, num_rounds, steps_of_slot
from moe_runtime.balance.planner import PlanPolicy
from moe_runtime.balance.schedule import LayerChange, in_turn, payback_steps, total_net
from moe_runtime.engine.rebalance_plan import Cancellation, decode, encode
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


def test_moves_within_ranks_take_a_step_and_cost_nothing() -> None:
    """Rank 0 gives up its copy of expert 1 for a second one of expert 0, which it holds: no byte travels."""
    now = ExpertPlacement(torch.tensor([[0, 1, 2, 0, 1, 3]]), 4, 2)
    planned = ExpertPlacement(torch.tensor([[0, 0, 2, 0, 1, 3]]), 4, 2)
    loads = torch.tensor([[0, 400, 900, 300]])
    found = decide(loads, 10, now=now, first=now, plan=lambda *_: [planned], terms=TERMS)
    (one,) = found.changes
    assert (one.num_moves, one.num_steps, one.moved_bytes, one.saved_bytes_per_step) == (1, 1, 0, 200 / 10 * 100)
    assert found.payback_steps == 0.0


def test_nodes_count_in_what_a_move_costs() -> None:
    """Ranks of a slot. Experts 3 and 4 give way to copies of 0, on the node of one of its two holders: that one sends
    both. Without nodes each holder sends one."""
    now = ExpertPlacement(torch.tensor([[0, 1, 2, 0, 3, 4, 3, 4]]), 5, 8)
    planned = ExpertPlacement(torch.tensor([[0, 1, 2, 0, 0, 0, 3, 4]]), 5, 8)
    loads = torch.tensor([[8000, 10, 10, 10, 10]])
    for ranks_per_node, slots in ((3, 2), (1, 1)):
        terms = replace(TERMS, ranks_per_node=ranks_per_node)
        found = decide(loads, 10, now=now, first=now, plan=lambda *_: [planned], terms=terms)
        assert [one.moved_bytes for one in found.changes] == [slots * ROW_BYTES]


def test_a_plan_is_asked_for_what_has_time() -> None:
    """Slots of 3 rows, one row a step, 10 steps: 3 slots for each of 2 ranks. All 8 where a step carries more."""
    asked: list[int | None] = []

    def plan(loads: Tensor, now: ExpertPlacement, budget: int | None) -> list[ExpertPlacement]:
        asked.append(budget)
        return [now]

    for bytes_per_step in (ROW_BYTES, 2 * ROW_BYTES):
        terms = replace(TERMS, slot_bytes=3 * ROW_BYTES, bytes_per_step=bytes_per_step)
        decide(torch.tensor([[900, 900, 0, 0]] * 2), 10, now=NOW, first=NOW, plan=plan, terms=terms)
    assert asked == [6, None]


@pytest.mark.parametrize("budget", [0, 2, 5])
def test_a_planner_heeds_what_has_time(budget: int) -> None:
    loads = torch.tensor([[100 * expert for expert in range(16)]])
    now = ExpertPlacement.uniform(1, 16, ep=4)
    moves = [int((plan.phy2log != now.phy2log).sum()) for plan in BEST(loads, now, None)]
    assert moves[0] > 5
    moves = [int((plan.phy2log != now.phy2log).sum()) for plan in BEST(loads, now, budget)]
    assert max(moves) <= budget


@pytest.mark.parametrize("policy", ["best", "eplb"])
def test_experts_of_a_group_stay_on_one_node(policy: PlanPolicy) -> None:
    """Four groups of four experts, two nodes of two ranks; the plan without groups parts them."""
    torch.manual_seed(1)
    loads = (torch.exp(2 * torch.randn(3, 16)) * 1e5).long()
    now = ExpertPlacement.uniform(3, 16, ep=4)
    terms = replace(TERMS, threshold=1.0, horizon_steps=1000, ranks_per_node=2)

    def groups_together(num_groups: int | None) -> bool:
        rule = PlanRule(policy, 2, num_groups)
        found = decide(loads, 10, now=now, first=now, plan=rule, terms=terms)
        assert found.verdict is Verdict.MOVE
        for one in found.changes:
            on_node = [{expert // 4 for expert in one.row[8 * node : 8 * node + 8]} for node in range(2)]
            if on_node[0] & on_node[1]:
                return False
        return True

    assert groups_together(4) and not groups_together(None)


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


def test_first_comes_what_nets_most_per_step() -> None:
    """The slow one nets more by itself; the other is through in a step, and then both have most of the time."""
    slow, fast = change(0, 10.0, 0, 5), change(1, 5.0, 0, 1)
    assert slow.net_bytes(10) > fast.net_bytes(10)
    assert in_turn([slow, fast], 10) == (fast, slow)


def test_a_large_change_gives_way_to_several() -> None:
    """Layer 0's whole plan nets most of all, and leaves layer 1 no time."""
    large, small, other = change(0, 100.0, 0, 5), change(0, 50.0, 0, 1), change(1, 60.0, 0, 6)
    assert in_turn([large, small, other], 10) == (large,)
    assert _most([[large], [small, other]], 10) == (small, other)
    assert _most([[large], [small]], 10) == (large,)


def test_of_a_layer_one_change_is_taken() -> None:
    large, small = change(0, 100.0, 10, 6), change(0, 60.0, 10, 1)
    assert in_turn([large, small], 100) == (large,)
    assert in_turn([large, small], 8) == (small,)


def test_payback_by_hand() -> None:
    """5 bytes a step after 2 steps, 10 after 4: of 30 bytes 10 are saved by then, the others in 2 steps."""
    assert payback_steps([change(0, 5.0, 10, 2), change(1, 5.0, 20, 2)]) == 6.0
    assert payback_steps([change(0, 20.0, 10, 2), change(1, 5.0, 20, 2)]) == 3.5, "before the second commits"
    assert payback_steps([change(0, 0.0, 10, 2)]) == float("inf")
    assert payback_steps([change(0, 5.0, 0, 2)]) == payback_steps([]) == 0.0, "nothing to pay back"


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
        each = steps_of_slot(bytes_per_step, slot_bytes=terms.slot_bytes, num_local=9)
        old = now.phy2log[one.layer].tolist()
        moves = layer_moves(one.layer, old, one.row, num_local=9, ranks_per_node=8, slot_steps=each)
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
    """The question is larger than a pipe's buffer."""
    torch.manual_seed(0)
    loads = (torch.exp(torch.randn(16, 40, 16)) * 1e4).long()
    now = ExpertPlacement.uniform(40, 16, ep=4, num_redundant=4)
    terms = replace(TERMS, horizon_steps=100)
    there = decide_apart(loads, 100, now=now, first=now, rule=BEST, terms=terms, within_s=60, cancelled=Cancellation())
    here = decide(loads, 100, now=now, first=now, plan=BEST, terms=terms)
    assert there == here and here.verdict is Verdict.MOVE
    assert decode(encode(here)) == here


def test_what_fails_there_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done(contextlib.nullcontext[None]):
        returncode, stderr = 0, b""

        def __init__(self, words: object, **others: object) -> None:
            super().__init__()

        def communicate(self, asked: bytes, timeout: float) -> tuple[bytes, bytes]:
            return answer(io.BytesIO(asked)), self.stderr

        def kill(self) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Done)
    going = Cancellation()
    now = ExpertPlacement.uniform(2, 4, ep=2, num_redundant=0)
    loads = torch.tensor([[100, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(ConfigError, match="layer 1 has no tokens at all"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=1, cancelled=going)
    Done.returncode, Done.stderr = -9, b"Traceback\nMemoryError: no room\n"
    with pytest.raises(MoeRuntimeError, match="exit code -9: MemoryError: no room"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=1, cancelled=going)
    monkeypatch.undo()
    monkeypatch.setattr(planning, "GRACE_S", 0.0)
    with pytest.raises(MoeRuntimeError, match="timed out"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=0.05, cancelled=going)
    going.set()
    with pytest.raises(MoeRuntimeError, match="the run has ended"):
        decide_apart(loads, 1, now=now, first=now, rule=BEST, terms=TERMS, within_s=60, cancelled=going)


def test_a_process_that_is_left_alone_ends_itself() -> None:
    """As after a parent that has died: nobody closes its input."""
    command = [sys.executable, "-m", "moe_runtime.launch.plan_worker", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.wait(timeout=30) == -signal.SIGALRM
