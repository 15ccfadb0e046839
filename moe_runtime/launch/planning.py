"""Where decisions to move are made: in a process of their own, so that no step waits for Python's lock.

The process lives for one decision, even if its parent ends before. It reads a line of JSON and the loads' bytes from
its standard input, and writes JSON: the decision, or an error as `launch.wire` encodes it. 58 layers of 288 slots take
seconds, of which importing torch is two, on a core that serving does not use.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import IO

import torch
from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms, decide
from moe_runtime.balance.planner import PlanPolicy, plans_beside
from moe_runtime.engine.rebalance_plan import decode, encode
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.launch.env import child_environment
from moe_runtime.launch.wire import decode_error, encode_error
from moe_runtime.parallel.placement import ExpertPlacement

GRACE_S = 5.0
"""A process that is this late is ended; its plan was given up before."""


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
) -> Decision:
    """`decide` in a process of its own, which this thread waits for, `within_s` and a grace at most.

    Raises what it raised there, and MoeRuntimeError where it could not be asked.
    """
    question = {
        "shape": list(loads.shape),
        "steps": steps,
        "now": now.to_json(),
        "first": first.to_json(),
        "rule": asdict(rule),
        "terms": asdict(terms),
    }
    command = [sys.executable, "-P", "-m", "moe_runtime.launch.plan_worker"]
    asked = json.dumps(question).encode() + b"\n" + loads.to(torch.int64).contiguous().numpy().tobytes()
    try:
        done = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            timeout=within_s + GRACE_S,
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches this process alone
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MoeRuntimeError(f"planning in a process of its own: {error}") from error
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise MoeRuntimeError(f"the planning process ended with exit code {done.returncode}: {' '.join(told)}")
    if done.stdout.startswith(b"E"):
        raise decode_error(done.stdout[1:])
    return decode(done.stdout[1:])


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
