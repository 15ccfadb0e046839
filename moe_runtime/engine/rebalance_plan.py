"""Rank 0's decision, made beside the steps, and how the other ranks hear of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from moe_runtime.balance.decision import Decision, LayerChange, Verdict
from moe_runtime.engine.rebalance_state import Stage

Start = Callable[[Callable[[], Decision]], "Future[Decision]"]


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
    """A decision that is being made. A plan that is late is left to its thread; nobody waits for it."""

    def __init__(self, work: Callable[[], Decision], start: Start, *, clock: Callable[[], float], within_s: float):
        self._future = start(work)
        self._clock = clock
        self._within_s = within_s
        self._ends_at = clock() + within_s

    def tidings(self) -> bytes:
        """For all ranks: nothing yet (empty), the decision, or why there is none."""
        if not self._future.done():
            if self._clock() <= self._ends_at:
                return b""
            return _failure(Stage.DEADLINE, f"no plan within balance.deadline_s={self._within_s:g}")
        try:
            return json.dumps(asdict(self._future.result())).encode()
        except Exception as error:  # noqa: BLE001 - a planner's failure must not end serving
            return _failure(Stage.PLAN, f"{type(error).__name__}: {error}")


def heard(tidings: bytes) -> Decision | NoPlan | None:
    """What `Planning.tidings` says; None where nothing is there yet."""
    if not tidings:
        return None
    values: dict[str, Any] = json.loads(tidings)
    if "failure" in values:
        return NoPlan(Stage(values["stage"]), values["failure"])
    changes = tuple([LayerChange(**change | {"row": tuple(change["row"])}) for change in values.pop("changes")])
    return Decision(**values | {"verdict": Verdict(values["verdict"])}, changes=changes)


def _failure(stage: Stage, text: str) -> bytes:
    return json.dumps({"stage": stage, "failure": text}).encode()
