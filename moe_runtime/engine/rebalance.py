"""Rebalancer: watches the experts' loads and moves experts between two steps, layer by layer, while serving goes on.

Every rank of the ep group has one and calls `advance` after every step. What they do follows from the number of steps,
from what rank 0 shares and from votes, so they stay together; a rank that fails at its part still comes to every
collective and votes against (engine/migration.py). A layer commits on all ranks between the same two steps, or on none.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from moe_runtime.balance.decision import Decision, Verdict
from moe_runtime.balance.schedule import LayerChange
from moe_runtime.comm.base import Communicator
from moe_runtime.engine.disk import DiskThread
from moe_runtime.engine.load_windows import LoadWindows
from moe_runtime.engine.migration import Migration, OnStage
from moe_runtime.engine.mover import LayerMove, Mover
from moe_runtime.engine.rebalance_plan import Decide, NoPlan, Planning, Start, heard, in_background
from moe_runtime.engine.rebalance_state import Activity, Counts, Failure, RebalanceState, Rules, Stage
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaSelector

_MOST_INTERVALS: Final = 8
"""Between two decisions, after deadlines that were missed"""


class Rebalancer:
    """One rank's. `placement`: the one that the slots were loaded by; `recorder` counts this rank's tokens."""

    def __init__(
        self,
        ep: Communicator,
        mover: Mover,
        *,
        selector: ReplicaSelector,
        recorder: Counts,
        placement: ExpertPlacement,
        decide: Decide,
        rules: Rules,
        start: Start = in_background,
        clock: Callable[[], float] = time.monotonic,
        on_stage: OnStage = lambda stage, rank, layer: None,
    ) -> None:
        self._ep = ep
        self._mover = mover
        self._selector = selector
        self._first = placement
        self._rows: list[tuple[int, ...]] = [tuple(row) for row in placement.phy2log.tolist()]
        self._make_decision = decide
        self._rules = rules
        self._clock = clock
        self._on_stage = on_stage
        self._windows = LoadWindows(recorder, interval_steps=rules.interval_steps, window_steps=rules.window_steps)
        self._same_form: bool | None = None
        self._heard_at = 0
        self._late_plan = False
        self._planning = Planning(start, clock=clock, within_s=rules.deadline_s)
        self._queue: deque[LayerChange] = deque()
        self._migration = Migration(
            ep,
            mover,
            selector,
            num_logical=placement.num_logical,
            terms=rules.terms,
            deadline_s=rules.deadline_s,
            clock=clock,
            on_stage=on_stage,
        )
        self._saver = DiskThread(rules.save, name="placement-saver")
        self._unsaved = False
        self._closed = False
        self._step = 0
        self.state = RebalanceState(Activity.WATCHING)

    @property
    def moving(self) -> bool:
        """A step that waits for work would hold a migration up."""
        return self.state.activity is Activity.MOVING

    @property
    def phy2log(self) -> tuple[tuple[int, ...], ...]:
        """[L][P] logical ids: the placement in force, for steps from now on."""
        return tuple(self._rows)

    @property
    def placement(self) -> ExpertPlacement:
        """The one in force: all committed layers."""
        return ExpertPlacement(torch.tensor(self._rows), self._first.num_logical, self._first.ep)

    def advance(self, step: int, *, worked: bool) -> None:
        """After step number `step`, on all ranks; `worked`: it held tokens. Collective while something goes on."""
        self._step = step
        self._hear_saver()
        state, interval = self.state, self._rules.interval_steps
        if worked:
            self.state = state = replace(state, window_steps=state.window_steps + 1)
            self._windows.step()
        match state.activity:
            case Activity.WATCHING if state.window_steps - self._heard_at >= interval * state.intervals:
                self._decide()
            case Activity.PLANNING:
                self._await_plan()
            case Activity.MOVING:
                self._move()

    def close(self) -> None:
        """After the last step, also after one that failed: a plan that is being made is ended, and the placement of all
        committed layers saved, if that is possible within `rules.deadline_s`. What was moving is left where it was. Not
        collective: no rank should wait for another one's disk. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._planning.close()
        self._hear_saver()
        self._save()
        if not self._saver.wait(self._rules.deadline_s):
            late = f"rank 0: not written within balance.deadline_s={self._rules.deadline_s:g}"
            self._failed(Stage.SAVE, None, (late,))
        self._hear_saver()

    # Decide

    def _decide(self) -> None:
        """Collective: the windows' loads go to rank 0, which plans beside the next steps. While a late plan still runs,
        they are kept for the next time."""
        if self._same_form is None:
            forms = self._ep.exchange((zlib.crc32(self._mover.form.encode()),))
            self._same_form = len(set(forms)) == 1
        if not self._same_form:
            self._failed(Stage.PLAN, None, ("ranks hold their experts in different forms: nothing can move",))
            self.state = replace(self.state, activity=Activity.OFF)
            return
        if self._late_plan:
            late = heard(self._ep.share(None if self._ep.rank else self._planning.late_tidings(), 0))
            if isinstance(late, NoPlan):
                self._no_plan(late)
                return
        steps, loads = self.state.window_steps, self._windows.take(self._ep)
        self.state = replace(self.state, activity=Activity.PLANNING, window_steps=0)
        if self._ep.rank == 0:
            self._planning.begin(partial(self._question, loads, steps))
        self._await_plan()

    def _question(self, loads: Tensor, steps: int) -> Callable[[], Decision]:
        """On the engine's thread; what it returns is called on the planning one."""
        loads, now = loads.cpu(), self.placement

        def decide() -> Decision:
            self._on_stage(Stage.PLAN, 0, None)
            return self._make_decision(loads, steps, now=now, first=self._first, cancelled=self._planning.cancelled)

        return decide

    def _await_plan(self) -> None:
        """Collective: rank 0 tells whether there is a decision."""
        found = heard(self._ep.share(None if self._ep.rank else self._planning.tidings(), 0))
        if found is None:
            return
        if isinstance(found, NoPlan):
            self._no_plan(found)
            return
        self._heard_at, self._late_plan = self.state.window_steps, False
        self.state = replace(self.state, activity=Activity.WATCHING)
        decision, count = replace(found, changes=()), self.state.num_decisions + 1
        self.state = replace(self.state, decision=decision, num_decisions=count)
        self._log(logging.INFO, f"step {self._step}: {found}")
        if found.verdict is Verdict.MOVE:
            self._queue.extend(found.changes)
            count = self.state.num_migrations + 1
            self.state = replace(self.state, activity=Activity.MOVING, num_migrations=count, promised=found.predicted)
            self._next_layer()
        else:
            self.state = replace(self.state, intervals=1)

    def _no_plan(self, why: NoPlan) -> None:
        self._heard_at, self._late_plan = self.state.window_steps, why.stage is Stage.DEADLINE
        self.state = replace(self.state, activity=Activity.WATCHING)
        self._failed(why.stage, None, (f"rank 0: {why.reason}",))
        if self._late_plan:
            self._wait_longer()

    # Move

    def _next_layer(self) -> None:
        """Begin with the next layer, or end the migration."""
        if not self._queue:
            self.state = replace(self.state, activity=Activity.WATCHING, layer=None, layers_left=0, layer_progress=0.0)
            self._save()
            return
        wanted = self._queue.popleft()
        self._migration.begin(wanted.layer, self._rows[wanted.layer], wanted.row)
        self.state = replace(self.state, layer=wanted.layer, layers_left=len(self._queue) + 1, layer_progress=0.0)

    def _move(self) -> None:
        """Collective: go on with the layer that moves; where it has ended, begin with the next one."""
        ended = self._migration.advance()
        if ended is None:
            self.state = replace(self.state, layer_progress=self._migration.progress)
            return
        if ended.stage is None:
            self._committed(ended.change)
        else:
            self.state = replace(self.state, num_layers_abandoned=self.state.num_layers_abandoned + 1)
            self._failed(ended.stage, ended.change.layer, ended.reasons)
            if ended.stage is Stage.DEADLINE:
                self._missed()
        self._next_layer()

    def _committed(self, change: LayerMove) -> None:
        self._rows[change.layer] = change.row
        self._unsaved = True
        state, num_local = self.state, self._first.num_local
        far = sum(move.source // num_local != move.target // num_local for move in change.moves)
        self.state = replace(
            state,
            num_layers_committed=state.num_layers_committed + 1,
            num_slots_moved=state.num_slots_moved + len(change.moves),
            moved_bytes=state.moved_bytes + far * self._rules.terms.slot_bytes,
            last_commit_step=self._step,
            intervals=1,
        )

    def _missed(self) -> None:
        """A layer's time was over: the next ones would fare alike, so the migration ends."""
        self.state = replace(self.state, num_layers_dropped=self.state.num_layers_dropped + len(self._queue))
        self._queue.clear()
        self._wait_longer()

    def _wait_longer(self) -> None:
        self.state = replace(self.state, intervals=min(2 * self.state.intervals, _MOST_INTERVALS))

    # Tell

    def _failed(self, stage: Stage, layer: int | None, reasons: tuple[str, ...]) -> None:
        failure = Failure(stage, self._step, layer, reasons)
        self.state = replace(self.state, last_failure=failure)
        self._log(logging.WARNING, str(failure))

    def _save(self) -> None:
        """On rank 0, where something has changed since: beside the steps."""
        if self._ep.rank or not self._unsaved:
            return
        try:
            self._saver.offer(self.placement)
            self._unsaved = False
        except Exception as error:  # noqa: BLE001 - no memory for it: tried again after the next migration
            self._failed(Stage.SAVE, None, (f"rank 0: {type(error).__name__}: {error}",))

    def _hear_saver(self) -> None:
        if (failure := self._saver.take_failure()) is not None:
            self._unsaved = True
            self._failed(Stage.SAVE, None, (f"rank 0: {failure}",))

    def _log(self, level: int, text: str) -> None:
        if self._ep.rank == 0:
            logging.getLogger(__name__).log(level, "rebalance: %s", text)
