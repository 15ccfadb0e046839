"""Rebalancer: watches the experts' loads and moves experts between two steps, layer by layer, while serving goes on.

Every rank of the ep group has one and calls `advance` after every step. What they do follows from the number of steps,
from what rank 0 shares and from votes, so they stay together; a rank that fails at its part still comes to every
collective and votes against. A layer commits on all ranks between the same two steps, or on none.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from moe_runtime.balance.decision import Decision, LayerChange, MakePlan, Verdict, decide
from moe_runtime.balance.moves import layer_moves, rounds
from moe_runtime.comm.base import Communicator
from moe_runtime.engine.mover import LayerMove, Mover
from moe_runtime.engine.rebalance_plan import NoPlan, Planning, Start, heard, in_background
from moe_runtime.engine.rebalance_state import Activity, Counts, Failure, RebalanceState, Rules, Stage
from moe_runtime.errors import CommunicationError, EngineClosedError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import LayerTables, ReplicaSelector

T = TypeVar("T")

OnStage = Callable[[Stage, int, int | None], None]
"""(stage, ep rank, MoE layer) as a rank enters a stage; what it raises is that rank's failure."""


class Rebalancer:
    """One rank's. `placement`: the one that the slots were loaded by; `recorder` counts this rank's tokens."""

    def __init__(
        self,
        ep: Communicator,
        mover: Mover,
        selector: ReplicaSelector,
        recorder: Counts,
        placement: ExpertPlacement,
        plan: MakePlan,
        rules: Rules,
        *,
        start: Start = in_background,
        clock: Callable[[], float] = time.monotonic,
        on_stage: OnStage = lambda stage, rank, layer: None,
    ) -> None:
        self._ep = ep
        self._mover = mover
        self._selector = selector
        self._recorder = recorder
        self._first = placement
        self._rows: list[tuple[int, ...]] = [tuple(row) for row in placement.phy2log.tolist()]
        self._plan = plan
        self._rules = rules
        self._start = start
        self._clock = clock
        self._on_stage = on_stage
        self._counted = recorder.counts()
        self._addresses = list(selector.addresses)
        self._same_form: bool | None = None
        self._planning: Planning | None = None
        self._queue: deque[LayerChange] = deque()
        self._change: LayerMove | None = None
        self._round = 0
        self._ends_at = 0.0
        self._fault: tuple[Stage, str] | None = None
        self._unsaved = False
        self._step = 0
        self.state = RebalanceState(Activity.WATCHING)

    @property
    def moving(self) -> bool:
        """A step that waits for work would hold a migration up."""
        return self.state.activity is Activity.MOVING

    @property
    def placement(self) -> ExpertPlacement:
        """The one in force: all committed layers."""
        return ExpertPlacement(torch.tensor(self._rows), self._first.num_logical, self._first.ep)

    def advance(self, step: int, *, worked: bool) -> None:
        """After step number `step`, on all ranks; `worked`: it held tokens. Collective while something goes on."""
        self._step = step
        state = self.state
        if worked:
            self.state = state = replace(state, window_steps=state.window_steps + 1)
        match state.activity:
            case Activity.WATCHING if state.window_steps >= self._rules.interval_steps:
                self._decide()
            case Activity.PLANNING:
                self._await_plan()
            case Activity.MOVING:
                assert self._change is not None, "a migration has a layer until it ends"
                self._move(self._change)

    def close(self) -> None:
        """After the last step, on all ranks: the placement as it is now is saved. What was moving is left where it
        was."""
        self._save()

    # Decide

    def _decide(self) -> None:
        """Collective: the window's loads go to rank 0, which plans beside the next steps."""
        if self._same_form is None:
            forms = self._ep.exchange((zlib.crc32(self._mover.form.encode()),))
            self._same_form = len(set(forms)) == 1
        if not self._same_form:
            self._failed(Stage.PLAN, None, ("ranks hold their experts in different forms: nothing can move",))
            self.state = replace(self.state, activity=Activity.OFF)
            return
        counts, steps = self._recorder.counts(), self.state.window_steps
        loads = self._ep.all_reduce(counts - self._counted)
        self._counted = counts
        self.state = replace(self.state, activity=Activity.PLANNING, window_steps=0)
        if self._ep.rank == 0:
            self._planning = self._begin_plan(loads.cpu(), steps)
        self._await_plan()

    def _begin_plan(self, loads: Tensor, steps: int) -> Planning:
        now, first, rules = self.placement, self._first, self._rules

        def work() -> Decision:
            self._on_stage(Stage.PLAN, 0, None)
            return decide(loads, steps, now=now, first=first, plan=self._plan, terms=rules.terms)

        return Planning(work, self._start, clock=self._clock, within_s=rules.deadline_s)

    def _await_plan(self) -> None:
        """Collective: rank 0 tells whether there is a decision."""
        planning = self._planning
        found = heard(self._ep.share(None if planning is None else planning.tidings(), 0))
        if found is None:
            return
        self._planning = None
        self.state = replace(self.state, activity=Activity.WATCHING)
        if isinstance(found, NoPlan):
            self._failed(found.stage, None, (f"rank 0: {found.reason}",))
            return
        decision, count = replace(found, changes=()), self.state.num_decisions + 1
        self.state = replace(self.state, decision=decision, num_decisions=count)
        self._log(logging.INFO, f"step {self._step}: {found}")
        if found.verdict is Verdict.MOVE:
            self._queue.extend(found.changes)
            count = self.state.num_migrations + 1
            self.state = replace(self.state, activity=Activity.MOVING, num_migrations=count, promised=found.predicted)
            self._next_layer()

    # Move

    def _next_layer(self) -> None:
        """Begin with the next layer, or end the migration."""
        self._change, self._round, self._fault = None, 0, None
        if not self._queue:
            self.state = replace(self.state, activity=Activity.WATCHING, layer=None, layers_left=0, layer_progress=0.0)
            self._save()
            return
        wanted, terms, num_local = self._queue.popleft(), self._rules.terms, self._first.num_local
        old = self._rows[wanted.layer]
        moves = layer_moves(wanted.layer, old, wanted.row, num_local=num_local, ranks_per_node=terms.ranks_per_node)
        pieces = rounds(moves, slot_bytes=terms.slot_bytes, bytes_per_step=terms.bytes_per_step, num_local=num_local)
        self._change = LayerMove(wanted.layer, wanted.row, moves, pieces)
        self._ends_at = self._clock() + self._rules.deadline_s
        self.state = replace(self.state, layer=wanted.layer, layers_left=len(self._queue) + 1, layer_progress=0.0)

    def _move(self, change: LayerMove) -> None:
        """Collective: a layer's next round; after the last one its checks and its commit."""
        mover, number = self._mover, self._round
        if number == 0:
            self._try(Stage.SEND, partial(mover.copy_local, change))
        if change.rounds:
            out = self._try(Stage.SEND, partial(mover.outgoing, change, number))
            received = mover.exchange(change, number, mover.blank(change, number) if out is None else out)
            self._try(Stage.SEND, partial(mover.take_in, change, number, received))
        self._round += 1
        if self._round < len(change.rounds):
            self.state = replace(self.state, layer_progress=self._round / len(change.rounds))
            if not self._agreed(change):
                self._next_layer()
            return
        if self._checked(change):
            self._commit(change)
        self._next_layer()

    def _checked(self, change: LayerMove) -> bool:
        """Collective: every staged slot has its source's checksums."""
        mover = self._mover
        out = self._try(Stage.CHECKSUM, partial(mover.digests, change))
        mover.exchange_digests(change, mover.no_digests(change) if out is None else out)
        self._try(Stage.CHECKSUM, partial(mover.check_staged, change))
        return self._agreed(change)

    def _commit(self, change: LayerMove) -> None:
        """Collective, between two steps: write the slots, check them where they are, and switch the maps; or put the
        old slots back on all ranks."""
        mover, swapped = self._mover, list[int]()
        tables = self._try(Stage.COMMIT, partial(self._tables, change))
        self._try(Stage.COMMIT, partial(mover.swap, change, swapped))
        self._try(Stage.COMMIT, partial(mover.check_written, change))
        self._try(Stage.CANARY, partial(mover.check_canary, change))
        self._try(Stage.COMMIT, mover.check_addresses)
        if not self._agreed(change):
            mover.swap_back(change, swapped)
            return
        assert tables is not None, "no rank has failed"
        self._selector.write_(change.layer, tables)
        assert list(self._selector.addresses) == self._addresses, "maps are written in place"
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
        )

    def _tables(self, change: LayerMove) -> LayerTables:
        placement = ExpertPlacement(torch.tensor([change.row]), self._first.num_logical, self._first.ep)
        return self._selector.tables(placement)

    def _try(self, stage: Stage, act: Callable[[], T]) -> T | None:
        """`act()`, or None where this rank fails or has failed: what it raises is told to all at the next vote."""
        if self._fault is not None:
            return None
        try:
            self._on_stage(stage, self._ep.rank, self.state.layer)
            return act()
        except (CommunicationError, EngineClosedError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, serving goes on without this move
            self._fault = (stage, _text(error))
            return None

    def _agreed(self, change: LayerMove) -> bool:
        """Collective: whether no rank has failed and the layer's time is not over; else why not is known to all."""
        if self._ep.rank == 0 and self._fault is None and self._clock() > self._ends_at:
            late = f"round {self._round} of {len(change.rounds)} after balance.deadline_s={self._rules.deadline_s:g}"
            self._fault = (Stage.DEADLINE, late)
        fault = self._fault
        if not any(failed for (failed,) in self._ep.exchange((int(fault is not None),))):
            return True
        told = self._ep.collect(b"" if fault is None else json.dumps(fault).encode())
        causes = [(rank, *json.loads(payload)) for rank, payload in enumerate(told) if payload]
        causes.sort(key=lambda one: list(Stage).index(Stage(one[1])))  # the cause before what follows from it
        self.state = replace(self.state, num_layers_abandoned=self.state.num_layers_abandoned + 1)
        self._failed(Stage(causes[0][1]), change.layer, tuple([f"rank {rank}: {text}" for rank, _, text in causes]))
        return False

    # Tell

    def _failed(self, stage: Stage, layer: int | None, reasons: tuple[str, ...]) -> None:
        failure = Failure(stage, self._step, layer, reasons)
        self.state = replace(self.state, last_failure=failure)
        self._log(logging.WARNING, str(failure))

    def _save(self) -> None:
        """On rank 0, where something has changed since."""
        if self._ep.rank or not self._unsaved:
            return
        try:
            self._rules.save(self.placement)
            self._unsaved = False
        except OSError as error:
            self._failed(Stage.SAVE, None, (f"rank 0: {_text(error)}",))

    def _log(self, level: int, text: str) -> None:
        if self._ep.rank == 0:
            logging.getLogger(__name__).log(level, "rebalance: %s", text)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
