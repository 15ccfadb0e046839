"""Rank 0's decision, made beside the steps, and how the other ranks hear of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from moe_runtime.balance.decision import Decision, Verdict
from moe_runtime.balance.schedule import LayerChange
from moe_runtime.engine.rebalance_state import Stage
from moe_runtime.parallel.placement import ExpertPlacement

Start = Callable[[Callable[[], Decision]], "Future[Decision]"]


class Decide(Protocol):
    """Whether to move, from `loads [W, L, E]` of `steps` steps; on rank 0, on a thread of its own. What it raises is
    the failure of this plan."""

    def __call__(self, loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement) -> Decision: ...


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
    before it has ended."""

    def __init__(self, start: Start, *, clock: Callable[[], float], within_s: float):
        self.start = start
        self._clock = clock
        self._within_s = within_s
        self._future: Future[Decision] | None = None
        self._began = 0.0
        self._late = False

    def begin(self, work: Callable[[], Decision]) -> None:
        """Unless the one before still runs."""
        if self._late and self._future is not None and not self._future.done():
            return
        self._future, self._began, self._late = self.start(work), self._clock(), False

    def tidings(self) -> bytes:
        """For all ranks: nothing yet (empty), the decision, or why there is none."""
        assert self._future is not None, "begun before"
        took, within = self._clock() - self._began, self._within_s
        remedy = f"balance.deadline_s={within:g}. Raise balance.deadline_s, e.g. to {2 * max(took, within):.3g}"
        if self._late:
            return _failure(Stage.DEADLINE, f"the plan begun {took:.0f} s ago still runs, after {remedy}")
        if not self._future.done():
            self._late = took > within
            return _failure(Stage.DEADLINE, f"no plan within {remedy}") if self._late else b""
        try:
            return encode(self._future.result())
        except Exception as error:  # noqa: BLE001 - a planner's failure must not end serving
            return _failure(Stage.PLAN, f"{type(error).__name__}: {error}")


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
