"""Published runs, what has to be assumed of each, and what the planner says of them.

The constants that no table has are fitted to these runs; `leave_one_out` predicts each run from the others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

import numpy as np

from moe_runtime.balance.planner import plan_placement
from moe_runtime.engine.lockstep import LockstepLimits
from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.plan.costs import CostModel
from moe_tools.plan.hardware import load_machine
from moe_tools.plan.layouts import Deployment, Layout, base_config, deploy
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import Routes, drawn, even
from moe_tools.plan.settings import DEFAULT_SKEW, PlanConfig
from moe_tools.plan.timing import Constants, StepTimer

Kind = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One run of DeepSeek-V3 or R1 in fp8 by others. `value`: ms per decode step, or prompt tokens/s/GPU."""

    name: str
    kind: Kind
    hardware: str
    ep: int
    batch: int
    """Decode: sequences per GPU. Prefill: tokens of a step per GPU"""
    length: int
    """Cached tokens of a sequence at the mean; prefill: of a prompt"""
    value: float
    redundant: int
    balance: Literal["even", "eplb", "none"]
    two_batches: bool
    fp8_cache: bool = False
    experts: str = "masked"
    """Table of the experts' decode kernels"""
    assumptions: str
    source: str


RUNS: Final = (
    Published(
        name="DeepSeek profile EP128", kind="decode", hardware="h800", ep=128, batch=128, length=4096, value=55.0,
        redundant=0, balance="even", two_batches=True,
        assumptions="routing simulated even; bf16 cache; 4096 cached tokens throughout",
        source="deepseek-ai/profile-data; 18 598 tok/s per node as computed by SGLang",
    ),
    Published(
        name="DeepSeek online EP144", kind="decode", hardware="h800", ep=144, batch=88, length=4989, value=47.6,
        redundant=32, balance="eplb", two_batches=True,
        assumptions="a day's mean: 21 tok/s per user; batch = 1850 tok/s/GPU over that; drawn routes, EPLB",
        source="deepseek-ai/open-infra-index, day 6",
    ),
    Published(
        name="SGLang EP72", kind="decode", hardware="h100", ep=72, batch=256, length=2050, value=92.0,
        redundant=32, balance="eplb", two_batches=True,
        assumptions="2000 tokens in and few out; drawn routes, EPLB of the same distribution",
        source="LMSYS blog, 5 May 2025: 22 282 tok/s per node",
    ),
    Published(
        name="vLLM EP32", kind="decode", hardware="h200", ep=32, batch=512, length=257, value=214.0,
        redundant=32, balance="eplb", two_batches=False,
        assumptions="1 in, 512 out: 257 cached at the mean; all 512 slots always busy; drawn routes, EPLB; one "
        "micro-batch: the excerpt does not say, and with two the planner says a third less",
        source="vllm-project/vllm pull request 29284: 2387 tok/s/GPU",
    ),
    Published(
        name="TRT-LLM EP8", kind="decode", hardware="h200", ep=8, batch=32, length=4608, value=30.4,
        redundant=0, balance="none", two_batches=False,
        fp8_cache=True,
        experts="fused_cutlass",
        assumptions="1K in, 8K out, concurrency 256, lengths from 0.8 to 1 times that: 4608 cached at the mean, fp8 "
        "cache; prompts' share of steps left out; drawn routes, no balancing",
        source="ai-dynamo/aiconfigurator, silicon_sample.csv",
    ),
    Published(
        name="DeepSeek prefill EP32", kind="prefill", hardware="h800", ep=32, batch=16384, length=4096, value=7839.0,
        redundant=0, balance="even", two_batches=True, assumptions="routing simulated even",
        source="deepseek-ai/profile-data; 62 713 tok/s per node as computed by SGLang",
    ),
    Published(
        name="SGLang prefill EP32, even", kind="prefill", hardware="h100", ep=32, batch=16384, length=4096,
        value=7417.0, redundant=32, balance="even", two_batches=True,
        assumptions="simulated perfect EPLB; 16384 tokens a step", source="LMSYS blog, 5 May 2025: 59 337 per node",
    ),
    Published(
        name="SGLang prefill EP32", kind="prefill", hardware="h100", ep=32, batch=16384, length=4096, value=6288.0,
        redundant=32, balance="eplb", two_batches=True,
        assumptions="16384 tokens a step; drawn routes, EPLB of the same distribution",
        source="LMSYS blog, 5 May 2025: 50 302 per node",
    ),
)  # fmt: skip

HELD_OUT: Final = (
    Published(
        name="SGLang GB200 EP48", kind="decode", hardware="gb200", ep=48, batch=768, length=2050, value=84.5,
        redundant=32, balance="eplb", two_batches=False,
        assumptions="bf16 attention, fp8 experts, 2000 in; 768 per GPU: the batch is published for another precision",
        source="LMSYS blog, 25 Sep 2025: 9087 tok/s/GPU",
    ),
    Published(
        name="SGLang GB200 prefill EP4", kind="prefill", hardware="gb200", ep=4, batch=16384, length=2000,
        value=18471.0, redundant=0, balance="eplb", two_batches=False,
        assumptions="bf16 attention, fp8 experts; 4 ranks of the 2 to 4 published; 16384 tokens a step",
        source="LMSYS blog, 25 Sep 2025",
    ),
)  # fmt: skip
"""Never in a fit: what the Hopper tables and constants say of Blackwell."""

START: Final = Constants(gap_us=0.0, wire_stretch=1.3, prefill_stretch=1.3)
LEAST_GAP_US: Final = -70.0
"""All starts of one layer's tables: more cannot be hidden."""
FITTED: Final = Constants(gap_us=-70.0, wire_stretch=1.43, prefill_stretch=1.44)
"""`fit(RUNS)`, rounded; a test holds it there."""

NETWORK_BOUND_MS: Final = 14.76
"""DeepSeek's own limit (arXiv 2505.09343): 32 tokens, 9 copies, 1 + 2 bytes a value, 50 GB/s, two micro-batches."""


Predict = Callable[[Published, Constants], float]
"""ms per decode step, or prompt tokens/s/GPU, of a run under some constants."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run beside what the planner says: fitted on all runs, and on the others alone."""

    run: Published
    fitted: float
    left_out: float

    @property
    def error(self) -> float:
        return self.fitted / self.run.value - 1

    @property
    def left_out_error(self) -> float:
        return self.left_out / self.run.value - 1


class Predictor:
    """Predicts published runs under given constants; what is replayed is kept between calls."""

    def __init__(self, *, seed: int = 0, layers: int = 2) -> None:
        plan = PlanConfig(seed=seed, layers=layers)
        self._machines = {run.hardware: load_machine(run.hardware) for run in (*RUNS, *HELD_OUT)}
        bases = {name: base_config(plan, machine) for name, machine in self._machines.items()}
        model = next(iter(bases.values()))[1]
        routes = {True: even(model, num_layers=1), False: drawn(model, skew=DEFAULT_SKEW, num_layers=layers, seed=seed)}
        self._timers = {}
        for run in (*RUNS, *HELD_OUT):
            config, _ = bases[run.hardware]
            layout = Layout(run.ep, 1, run.redundant, "deep_ep")
            if run.fp8_cache:
                config = replace(config, engine=replace(config.engine, kv_cache_dtype="fp8"))
            made = deploy(layout, plan, config, model, self._machines[run.hardware], batch=min(run.batch, 512),
                          batched_tokens=run.batch)  # fmt: skip
            self._timers[run.name] = _timer(run, made, routes[run.balance == "even"])

    def __call__(self, run: Published, constants: Constants) -> float:
        """ms per step, or prompt tokens/s/GPU."""
        timer = self._timers[run.name]
        timer.constants = constants
        limits = LockstepLimits(
            two_batch_tokens=2 if run.two_batches else None, two_batch_decode_tokens=2 if run.two_batches else None
        )
        if run.kind == "decode":
            return timer.decode_us(run.batch, run.length, limits=limits) / 1e3
        return 1e6 * run.batch / timer.prefill_us(run.batch, run.length, limits=limits)


def _timer(run: Published, made: Deployment, routes: Routes) -> StepTimer:
    layers, logical = len(routes.layers), routes.num_logical
    if run.balance == "eplb":
        placement = plan_placement(
            routes.loads[0], ep=run.ep, ranks_per_node=8, num_redundant=run.redundant, policy="eplb"
        )
    else:
        redundant = 0 if run.balance == "even" and run.ep in _EVEN_SLOTS else run.redundant
        placement = ExpertPlacement.uniform(layers, logical, ep=run.ep, num_redundant=redundant)
    replay = Replay.of(placement, choice="static", ranks_per_node=8)
    costs = CostModel(made, routes, replay)
    costs.curves = replace(costs.curves, padded=run.experts)
    return StepTimer(costs, FITTED)


_EVEN_SLOTS: Final = (8, 16, 32, 64, 128, 256)
"""Where experts divide among ranks, even routing needs no copies to be even per rank."""


def fit(runs: Sequence[Published], predict: Predict) -> Constants:
    """Least squares of the logarithm of predicted over published. The prefill runs tell of their constant alone, the
    decode runs of the other two, which are looked for in turn on ever finer grids."""
    best = START
    decode = [run for run in runs if run.kind == "decode"]
    prefill = [run for run in runs if run.kind == "prefill"]
    plain = [predict(run, replace(best, prefill_stretch=1.0)) for run in prefill]
    logs = [np.log(value / run.value) for value, run in zip(plain, prefill, strict=True)]
    best = replace(best, prefill_stretch=float(np.exp(np.mean(logs))))
    for width in (0.8, 0.4, 0.2, 0.1, 0.05, 0.02):
        for axis in ("gap_us", "wire_stretch"):
            unit, least = (100.0, LEAST_GAP_US) if axis == "gap_us" else (1.0, 1.0)
            values = [max(least, getattr(best, axis) + unit * width * step) for step in (-1, 0, 1)]
            tried = [Constants(**{**asdict(best), axis: value}) for value in values]
            best = min(tried, key=lambda constants: _error(decode, predict, constants))
    return best


def _error(runs: Sequence[Published], predict: Callable[[Published, Constants], float], constants: Constants) -> float:
    return float(sum(np.log(predict(run, constants) / run.value) ** 2 for run in runs))


def leave_one_out(predict: Predict, *, fitted: Constants = FITTED) -> list[Row]:
    """Every run as the fitted constants have it, and as the other runs alone would."""
    rows = []
    for run in RUNS:
        others = fit([other for other in RUNS if other is not run], predict)
        rows.append(Row(run, predict(run, fitted), predict(run, others)))
    return rows


def held_out(predict: Predict, *, fitted: Constants = FITTED) -> list[Row]:
    """The runs that no fit has seen."""
    values = [predict(run, fitted) for run in HELD_OUT]
    return [Row(run, value, value) for run, value in zip(HELD_OUT, values, strict=True)]


def network_bound_ms(*, hidden: int = 7000) -> float:
    """DeepSeek's bound by this package's byte counts: no start, datasheet rate, 9 copies of fp8 rows out and bf16 rows
    home, without scales; `hidden` 7000 as they wrote it (7K), 7168 as the model has it."""
    rate = load_machine("h800").rates.network_bytes_per_s
    return 2 * 61 * 32 * 9 * hidden * (1 + 2) / rate * 1e3


def summary(rows: Sequence[Row]) -> Mapping[str, float]:
    """Mean and largest absolute errors."""
    fitted, left_out = [abs(row.error) for row in rows], [abs(row.left_out_error) for row in rows]
    return {
        "mean": float(np.mean(fitted)), "max": max(fitted),
        "leave_one_out_mean": float(np.mean(left_out)), "leave_one_out_max": max(left_out),
    }  # fmt: skip
