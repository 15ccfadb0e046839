"""Where decisions to move are made: in a process of their own, so that no step waits for Python's lock.

The process lives for one decision. It is ended when its plan is given up or the run ends, and by its own alarm where
nobody is left to do so. It reads a line of JSON and the loads' bytes from its standard input, and writes JSON: the
decision, or an error as `launch.wire` encodes it. 58 layers of 288 slots take seconds, of which importing torch is two,
on a core that serving does not use.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import IO, Final

import torch
from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms, decide
from moe_runtime.balance.planner import PlanPolicy, plans_beside
from moe_runtime.engine.rebalance_plan import Cancellation, decode, encode
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.launch.env import child_environment
from moe_runtime.launch.wire import decode_error, encode_error
from moe_runtime.parallel.placement import ExpertPlacement

GRACE_S: Final = 5.0
"""A process that is this late is ended; its plan was given up before, but how long it takes is worth knowing."""


@dataclass(frozen=True, slots=True)
class PlanRule:
    """How a run plans: `MakePlans`. `num_groups`: None where experts may go anywhere."""

    policy: PlanPolicy
    ranks_per_node: int
    num_groups: int | None

    def __call__(self, loads: Tensor, now: ExpertPlacement, budget: int | None) -> tuple[ExpertPlacement, ...]:
        return plans_beside(
            loads,
            now,
            ranks_per_node=self.ranks_per_node,
            num_groups=self.num_groups,
            policy=self.policy,
            move_budget=budget,
        )


def decide_apart(
    loads: Tensor,
    steps: int,
    *,
    now: ExpertPlacement,
    first: ExpertPlacement,
    rule: PlanRule,
    terms: Terms,
    within_s: float,
    cancelled: Cancellation,
) -> Decision:
    """`decide` in a process of its own, which this thread waits for, `within_s` and a grace at most.

    Raises what it raised there, and MoeRuntimeError where it could not be asked, was late, or `cancelled` was set. The
    process has ended then.
    """
    question = {
        "shape": list(loads.shape),
        "steps": steps,
        "now": now.to_json(),
        "first": first.to_json(),
        "rule": asdict(rule),
        "terms": asdict(terms),
    }
    asked = json.dumps(question).encode() + b"\n" + loads.to(torch.int64).contiguous().numpy().tobytes()
    code, told, errors = _ask(asked, within_s + GRACE_S, cancelled)
    if code:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise MoeRuntimeError(f"the planning process ended with exit code {code}: {' '.join(last)}")
    if told.startswith(b"E"):
        raise decode_error(told[1:])
    return decode(told[1:])


def _ask(asked: bytes, within_s: float, cancelled: Cancellation) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error of a planning process."""
    command = [sys.executable, "-P", "-m", "moe_runtime.launch.plan_worker", str(math.ceil(within_s))]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
    except OSError as error:
        raise MoeRuntimeError(f"planning in a process of its own: {error}") from error
    with process:
        cancelled.on_set(process.kill)
        try:
            told, errors = process.communicate(asked, timeout=within_s)
        except subprocess.TimeoutExpired as error:
            raise MoeRuntimeError(f"planning in a process of its own: timed out after {within_s:g} s") from error
        finally:
            process.kill()  # nothing where it has ended
    if cancelled.is_set:
        raise MoeRuntimeError("planning in a process of its own: the run has ended")
    return process.returncode, told, errors


def answer(asked: IO[bytes]) -> bytes:
    """The other end of `decide_apart`: what it reads."""
    question = json.loads(asked.readline())
    loads = torch.frombuffer(bytearray(asked.read()), dtype=torch.int64).view(*question["shape"])
    now, first = (ExpertPlacement.from_json(question[name]) for name in ("now", "first"))
    rule, terms = PlanRule(**question["rule"]), Terms(**question["terms"])
    try:
        found = decide(loads, question["steps"], now=now, first=first, plan=rule, terms=terms)
    except MoeRuntimeError as error:
        return b"E" + encode_error(error).encode()
    return b"D" + encode(found)
