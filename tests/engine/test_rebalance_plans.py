"""Plans beside the steps: how they are asked for and heard of, and what one that fails or is late leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

import pytest
from torch import Tensor

from moe_runtime.balance.decision import Decision, Verdict
from moe_runtime.cli.generate import _moves_rows
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.migration import Migration
from moe_runtime.engine.rebalance_plan import Cancellation, Planning, heard, in_background
from moe_runtime.engine.rebalance_state import Activity, Failure, RebalanceState, Stage
from moe_runtime.parallel.placement import ExpertPlacement
from tests.engine import moving_world
from tests.engine.moving_world import Make, Row, forced

OLD: Final[list[Row]] = [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 5, 6, 6]]
NEW: Final[list[Row]] = [[4, 1, 0, 3, 2, 6, 5, 3], [6, 1, 2, 0, 4, 5, 3, 2]]
STAY: Final = Decision(
    verdict=Verdict.NO_GAIN, steps=1, num_tokens=1, utilisation=0.5, without=0.5, planned=0.9, predicted=0.5
)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 decides for NEW."""
    monkeypatch.setattr(moving_world, "decide", lambda *args, **kwargs: forced(dict(enumerate(NEW))))


class ByHand:
    """Plans that are through when the test says so."""

    def __init__(self) -> None:
        self.begun = list[Future[Decision]]()

    def __call__(self, work: Callable[[], Decision]) -> Future[Decision]:
        self.begun.append(Future())
        return self.begun[-1]


def test_a_planner_that_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("no plan today")

    monkeypatch.setattr(moving_world, "decide", fail)
    world = make(OLD)
    state = world.step()
    assert state.activity is Activity.WATCHING and state.last_failure is not None
    assert str(state.last_failure) == "the plan was abandoned at step 0 (plan): rank 0: ValueError: no plan today"
    world.check(OLD)
    assert world.step().activity is Activity.WATCHING, "and it is tried again"


def test_a_plan_is_made_beside_the_steps(make: Make, decided: None) -> None:
    go = threading.Event()
    world = make(OLD, on_stage=lambda stage, rank, layer: go.wait(30) and None if stage is Stage.PLAN else None)
    for rank in world.ranks:
        rank._planning.start = in_background
    assert [world.step().activity for _ in range(3)] == [Activity.PLANNING] * 3
    go.set()
    while world.step().activity is Activity.PLANNING:
        pass
    assert world.state.window_steps > 2, "their tokens are part of the next decision's loads"
    planned = world.state.window_steps
    while world.ranks[0].moving:
        world.step(worked=False)
    assert (world.state.num_migrations, world.state.num_decisions, world.state.window_steps) == (1, 1, planned)
    assert world.step(worked=False).activity is Activity.WATCHING, "the interval begins with the decision"
    assert world.step().activity is not Activity.WATCHING


def test_a_plan_that_is_late_is_left_alone() -> None:
    """What it has taken so far, or what took longest, says what would do."""
    now, start = [0.0], ByHand()
    planning = Planning(start, clock=lambda: now[0], within_s=2.0)
    planning.begin(lambda: partial(forced, {}))
    assert planning.tidings() == b""
    now[0] = 2.5
    assert b"no plan within balance.deadline_s=2. Set balance.deadline_s=5" in planning.tidings()
    now[0] = 9.0
    assert b"the plan begun 9 s ago still runs, after balance.deadline_s=2. Set balance.deadline_s=18" in (
        planning.late_tidings()
    )
    start.begun[0].set_result(forced({}))
    assert planning.late_tidings() == b"", "nobody wants it"
    now[0] = 20.0
    planning.begin(lambda: partial(forced, {}))
    now[0] = 22.1
    assert b"Set balance.deadline_s=18" in planning.tidings(), "not 5"
    start.begun[1].set_result(forced({0: NEW[0]}))
    assert heard(planning.tidings()) == forced({0: NEW[0]})


def test_late_plans_become_rare_and_keep_the_loads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next decision waits longer after each; while a late one runs the loads of all steps stay, for the next."""
    world, start = make(OLD, deadline_s=10.0), ByHand()
    taken = list[int]()

    def note(loads: Tensor, steps: int, **others: Any) -> Decision:
        taken.append(steps)
        return STAY

    monkeypatch.setattr(moving_world, "decide", note)
    for rank in world.ranks:
        rank._planning.start = start
    assert world.step().activity is Activity.PLANNING
    world.now = 11.0
    assert (state := world.step()).activity is Activity.WATCHING and state.intervals == 2
    assert state.last_failure is not None and state.last_failure.stage is Stage.DEADLINE
    for intervals in (2, 4, 8, 8):
        assert world.state.intervals == intervals
        told = world.state.last_failure
        for _ in range(intervals - 1):
            assert world.step().last_failure is told
        world.now += 7.0
        assert "still runs" in str(world.step().last_failure) and world.state.activity is Activity.WATCHING
    waited = world.state.window_steps
    assert waited == 1 + 2 + 4 + 8 + 8 and len(start.begun) == 1
    start.begun[0].set_result(STAY)
    for rank in world.ranks:
        rank._planning.start = moving_world.inline
    while world.step().activity is Activity.WATCHING and not taken:
        pass
    assert taken == [waited + 8] and world.state.intervals == 1, "a decision in time"


def test_no_thread_for_a_plan(make: Make, decided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(OLD)
    for rank in world.ranks:
        rank._planning.start = in_background

    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        state = world.step()
    assert state.activity is Activity.WATCHING
    assert "(plan): rank 0: RuntimeError: can't start new thread" in str(state.last_failure)
    while world.step().num_layers_committed < 2:
        pass
    world.check(NEW)


def test_a_rank_that_cannot_begin(make: Make, decided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It votes against before anything is sent; the next layer goes on."""
    world = make(OLD, bytes_per_step=4096)
    moves = Migration._moves

    def fail(self: Migration, layer: int, *rows: Any) -> Any:
        if (self._ep.rank, layer) == (2, 0):
            raise MemoryError("no room")
        return moves(self, layer, *rows)

    monkeypatch.setattr(Migration, "_moves", fail)
    state = world.migrate()
    assert (state.num_layers_committed, state.num_layers_abandoned) == (1, 1)
    assert state.last_failure is not None and state.last_failure.reasons == ("rank 2: MemoryError: no room",)
    world.check([OLD[0], NEW[1]])


def test_no_memory_for_a_placement(make: Make, decided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the question of a plan nor for what is saved: both are told, and tried again."""
    world = make(OLD)

    def fail(self: object) -> ExpertPlacement:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(world.ranks[0]), "placement", property(fail))
        assert "(plan): rank 0: MemoryError: no room" in str(world.step().last_failure)
    world.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(world.ranks[0]), "placement", property(fail))
        while world.ranks[0].moving:
            world.cluster.run(lambda rank: world.ranks[rank].advance(9, worked=False))
    assert world.ranks[0].state.last_failure is not None and world.ranks[0].state.last_failure.stage is Stage.SAVE
    world.ranks[0].close()
    assert [placement.phy2log.tolist() for placement in world.saved] == [NEW]


def test_closing_ends_a_plan(make: Make) -> None:
    """Its thread is gone when `close` returns."""
    world, ended = make(OLD), threading.Event()
    first = world.ranks[0]
    first._planning.start = in_background

    def decide(*args: object, cancelled: Cancellation, **others: object) -> Decision:
        told = threading.Event()
        cancelled.on_set(told.set)
        assert told.wait(30)
        ended.set()
        raise RuntimeError("cancelled")

    first._make_decision = decide
    assert world.step().activity is Activity.PLANNING
    first.close()
    assert ended.is_set() and first._planning.tidings()


def test_the_end_waits_for_no_disk_while_ranks_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` ends before the last barrier; `close` comes after it, and closes each part whatever the others raise."""
    closed = list[str]()

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            raise OSError(f"{self.name} would not close")

    parts: dict[str, Any] = {name: Part(name) for name in ("recording", "graphs", "rebalancer")}
    rest: dict[str, Any] = dict.fromkeys(("groups", "runner", "recorder", "limits", "leader"))
    engine = RankEngine(**rest, **parts)
    monkeypatch.setattr(RankEngine, "step", lambda self: False)
    engine.serve()
    assert closed == []
    with pytest.raises(OSError, match="rebalancer would not close"):
        engine.close()
    assert closed == ["recording", "graphs", "rebalancer"]


def test_what_decides_is_the_window(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of all ranks since the last decision, and the placement as it is now."""
    seen = []

    def note(loads: Tensor, steps: int, **kwargs: Any) -> Any:
        seen.append((loads.clone(), steps, kwargs["now"].phy2log.tolist(), kwargs["first"].phy2log.tolist()))
        return forced({0: NEW[0]})

    monkeypatch.setattr(moving_world, "decide", note)
    world = make(OLD)
    for rank in world.ranks:
        rank._windows._recorder.loads = rank._windows._recorder.loads * 3  # type: ignore[attr-defined]
    world.migrate()
    world.migrate()
    assert (seen[0][0] == 4 * 2).all() and (seen[1][0] == 0).all()
    assert seen[0][2:] == (OLD, OLD) and seen[1][2:] == ([NEW[0], *OLD[1:]], OLD)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (RebalanceState(Activity.WATCHING, window_steps=24), "no decision was due after 24 steps with tokens"),
        (RebalanceState(Activity.PLANNING), "the first decision was still being made"),
        (
            RebalanceState(Activity.WATCHING, last_failure=Failure(Stage.PLAN, 3, None, ("none",))),
            "no decision was made",
        ),
        (RebalanceState(Activity.WATCHING, num_decisions=1, num_slots_moved=2), "2 slots of 0 layers moved"),
    ],
)
def test_a_run_says_what_became_of_its_experts(state: RebalanceState, text: str) -> None:
    assert _moves_rows(RebalanceState()) == []
    (name, told), *failures = _moves_rows(state)
    assert name == "experts" and text in told and len(failures) == (state.last_failure is not None)
