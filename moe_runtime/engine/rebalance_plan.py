"""Rank 0's decision, made beside the steps, and how the other ranks hear of it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from torch import Tensor

from moe_runtime.balance.decision import Decision, Verdict
from moe_runtime.balance.schedule import LayerChange
from moe_runtime.engine.rebalance_state import Stage
from moe_runtime.parallel.placement import ExpertPlacement

Start = Callable[[Callable[[], Decision]], "Future[Decision]"]

_CLOSE_S: Final = 10.0
"""For a process to end, and its thread; they take milliseconds."""


class Cancellation:
    """Says that nobody waits any more, from one thread to another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._act: Callable[[], None] = lambda: None

    @property
    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """For good. Runs what was given to `on_set` last."""
        with self._lock:
            self._set = True
            self._act()

    def on_set(self, act: Callable[[], None]) -> None:
        """`act()` as soon as it is set; at once where it is. In place of what was given before."""
        with self._lock:
            self._act = act
            if self._set:
                act()


class Decide(Protocol):
    """Whether to move, from `loads [W, L, E]` of `steps` steps; on rank 0, on a thread of its own. What it raises is
    the failure of this plan. Once `cancelled` is set nobody waits for it, and it ends soon."""

    def __call__(
        self, loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement, cancelled: Cancellation
    ) -> Decision: ...


def in_background(work: Callable[[], Decision]) -> Future[Decision]:
    """On a thread of its own, beside the steps."""
    future: Future[Decision] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is taken
            future.set_exception(error)

    threading.Thread(target=run, name="rebalance-plan", daemon=True).start()
    return future


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Why there is none."""

    stage: Stage
    reason: str


class Planning:
    """The decisions of a run, one at a time. A late one is left to its thread: nobody waits for it, but no other begins
    before it has ended. `within_s`: seconds for each."""

    def __init__(self, start: Start, *, clock: Callable[[], float], within_s: float):
        self.start = start
        self.cancelled = Cancellation()
        self._clock = clock
        self._within_s = within_s
        self._future: Future[Decision] = _failed(RuntimeError("not begun"))
        self._began = 0.0
        self._longest = 0.0

    def begin(self, question: Callable[[], Callable[[], Decision]]) -> None:
        """What `question` returns, on a thread of its own, after the one before has ended. Whatever goes wrong is this
        plan's failure."""
        self._began = self._clock()
        try:
            self._future = self.start(question())
        except Exception as error:  # noqa: BLE001 - no thread, no memory: a failure like a planner's own
            self._future = _failed(error)
        self._future.add_done_callback(self._note_time)

    def tidings(self) -> bytes:
        """For all ranks: nothing yet (empty), the decision, or why there is none."""
        if not self._future.done():
            late = self._clock() - self._began > self._within_s
            return _failure(Stage.DEADLINE, f"no plan within {self._remedy()}") if late else b""
        try:
            return encode(self._future.result())
        except Exception as error:  # noqa: BLE001 - a planner's failure must not end serving
            return _failure(Stage.PLAN, f"{type(error).__name__}: {error}")

    def late_tidings(self) -> bytes:
        """For all ranks, of a plan that was late: empty where another can begin, else why not."""
        if self._future.done():
            return b""
        took_s = self._clock() - self._began
        return _failure(Stage.DEADLINE, f"the plan begun {took_s:.0f} s ago still runs, after {self._remedy()}")

    def close(self) -> None:
        """End a plan that is being made, with its process and thread; waits a few seconds at most."""
        self.cancelled.set()
        wait([self._future], timeout=_CLOSE_S)

    def _note_time(self, _: Future[Decision]) -> None:
        self._longest = max(self._longest, self._clock() - self._began)

    def _remedy(self) -> str:
        longest = max(self._clock() - self._began, self._longest)
        return f"balance.deadline_s={self._within_s:g}. Set balance.deadline_s={math.ceil(2 * longest)}"


def _failed(error: Exception) -> Future[Decision]:
    future: Future[Decision] = Future()
    future.set_exception(error)
    return future


def encode(decision: Decision) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(asdict(decision)).encode()


def decode(decision: bytes) -> Decision:
    """The inverse of `encode`."""
    return _decision(json.loads(decision))


def heard(tidings: bytes) -> Decision | NoPlan | None:
    """What `Planning.tidings` says; None where nothing is there yet."""
    if not tidings:
        return None
    values: dict[str, Any] = json.loads(tidings)
    return NoPlan(Stage(values["stage"]), values["failure"]) if "failure" in values else _decision(values)


def _decision(values: dict[str, Any]) -> Decision:
    changes = tuple([LayerChange(**change | {"row": tuple(change["row"])}) for change in values.pop("changes")])
    return Decision(**values | {"verdict": Verdict(values["verdict"])}, changes=changes)


def _failure(stage: Stage, text: str) -> bytes:
    return json.dumps({"stage": stage, "failure": text}).encode()
