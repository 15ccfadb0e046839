"""What planning beside the steps costs them: step times while a decision is being made, and while none is.

On a thread of rank 0, and in a process of its own, as the runtime does it. The machine's load is in all of them alike.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from moe_runtime import LLM, SamplingParams
from moe_runtime.balance.decision import Decision, Terms, decide
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_plan import Cancellation, in_background
from moe_runtime.launch import rebalancing
from moe_runtime.launch.planning import PlanRule, decide_apart
from moe_runtime.parallel.placement import ExpertPlacement

WAITS: Final = 60
HOST_S: Final = 0.0002
DEVICE_S: Final = 0.0003
"""A step that stands for one of 30 ms: 60 times 0.2 ms of Python and small torch operations, then a wait of 0.3 ms
without Python's lock, as for a device or a rank."""
_STEPS: Final = 150
_TERMS: Final = Terms(0.99, 1000, 28672, 44 * 2**20, 64 * 2**20, 8)


def planning_table() -> Iterator[str]:
    """Step times in ms: p50, p99, max."""
    yield "| steps | decision | none is made | one is made | seconds for one |"
    yield "| --- | --- | --- | --- | --- |"
    for where, ask in (("a thread of rank 0", here), ("a process of its own", decide_apart)):
        rest, busy, took = beside(lambda ask=ask: _large(ask))  # type: ignore[misc]
        yield f"| 30 ms, 58 layers of 288 slots, 10 windows | {where} | {_times(rest)} | {_times(busy)} | {took:.1f} |"
    for where, patched in (("a thread of rank 0", True), ("a process of its own", False)):
        rest, busy, took = demo(in_thread=patched)
        yield f"| demo model, `ep=8` virtual | {where} | {_times(rest)} | {_times(busy)} | {took:.1f} |"


def here(loads: Tensor, steps: int, *, rule: PlanRule, terms: Terms, **words: Any) -> Decision:
    """`decide_apart`, but on the thread that asks."""
    return decide(loads, steps, now=words["now"], first=words["first"], plan=rule, terms=terms)


def beside(plan: Callable[[], Decision]) -> tuple[list[float], list[float], float]:
    """Seconds of each step while nothing is decided, while something is, and of a decision."""
    rest, busy, took = [_step() for _ in range(_STEPS)], list[float](), list[float]()
    while len(busy) < _STEPS:
        began = time.perf_counter()
        future: Future[Decision] = in_background(plan)
        while not future.done():
            busy.append(_step())
        future.result()
        took.append(time.perf_counter() - began)
    return rest, busy, float(np.median(took))


def _step() -> float:
    x = torch.ones(64)
    began = time.perf_counter()
    for _ in range(WAITS):
        until = time.perf_counter() + HOST_S
        while time.perf_counter() < until:
            x = x * 0.5 + 0.5
        time.sleep(DEVICE_S)
    return time.perf_counter() - began


def _large(ask: Callable[..., Decision]) -> Decision:
    rng = np.random.default_rng(0)
    popular = rng.lognormal(0.0, 1.0, (58, 256)) * 1e4
    loads = torch.from_numpy(np.stack([popular * rng.lognormal(0.0, 0.1, popular.shape) for _ in range(10)])).long()
    now = ExpertPlacement.uniform(58, 256, ep=32, num_redundant=32)
    rule = PlanRule("best", 8, None)
    return ask(loads, 1000, now=now, first=now, rule=rule, terms=_TERMS, within_s=60.0, cancelled=Cancellation())


def demo(*, in_thread: bool) -> tuple[list[float], list[float], float]:
    """The same of the demo model under its own prompts, deciding all the time."""
    spent: dict[str, list[float]] = defaultdict(list)
    advance, ended = Rebalancer.advance, [0.0, 0.0]
    took: list[float] = []

    def watched(self: Rebalancer, step: int, *, worked: bool) -> None:
        now, state = time.perf_counter(), self.state.activity
        first = self._ep.rank == 0
        if first and worked and ended[0]:
            spent[state].append(now - ended[0])
        advance(self, step, worked=worked)
        if first:
            ended[0] = time.perf_counter()
            if state != self.state.activity:
                took.extend([ended[0] - ended[1]] if state == "planning" else [])
                ended[1] = now

    words = ["tp=1", "num_threads=1", "placement.num_redundant_experts=16", "engine.prefix_caching=false"]
    words += ["balance.rebalance=on", "balance.interval_steps=10", "balance.window_steps=5", "balance.threshold=1.0"]
    lines = Path("models/demo/prompts.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    prompts = [json.loads(line)["prompt"] for line in lines]
    apart = mock.patch.object(rebalancing, "decide_apart", here) if in_thread else nullcontext()
    with apart, mock.patch.object(Rebalancer, "advance", watched), LLM("demo", ep=8, overrides=words) as llm:
        for _ in range(4):
            llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    return spent["watching"], spent["planning"], float(np.median(took)) if took else 0.0


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return "–"
    values = 1e3 * np.array(seconds)
    return f"{np.median(values):.1f}, {np.quantile(values, 0.99):.1f}, {values.max():.1f}"
