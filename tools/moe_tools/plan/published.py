"""What the planner says of published runs, and the constants that no table has, fitted to them.

`leave_one_out` predicts each run from the others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

import numpy as np

from moe_runtime.balance.planner import plan_placement
from moe_runtime.engine.lockstep import LockstepLimits
from moe_runtime.parallel.placement import ExpertPlacement, expected_load
from moe_tools.plan.costs import CostModel
from moe_tools.plan.deployment import Deployment, Layout, base_config, deploy
from moe_tools.plan.hardware import load_machine
from moe_tools.plan.published_runs import HELD_OUT, RUNS, Published
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import Routes, drawn, even
from moe_tools.plan.settings import DEFAULT_SKEW, PlanConfig
from moe_tools.plan.timing import Constants, StepTimer
from moe_tools.plan.wire import Wire

LEAST_GAP_US: Final = -70
"""All starts of one layer's tables: more cannot be hidden."""
FITTED: Final = Constants(gap_us=-70.0, wire_stretch=1.45, prefill_stretch=1.46)
"""`fit(RUNS)`, the last one rounded; a test holds it there."""
_GAPS_US: Final = tuple(range(LEAST_GAP_US, 71, 20))
_STRETCHES: Final = tuple([round(1 + 0.05 * step, 2) for step in range(21)])
_EVEN_SLOTS: Final = (8, 16, 32, 64, 128, 256)
"""Where experts divide among ranks, even routing needs no copies to be even per rank."""

Predict = Callable[[Published, Constants], float]
"""ms per decode step, or prompt tokens/s/GPU, of a run under some constants."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run beside what the planner says: fitted on all runs, and on the others alone (None: it is in no fit)."""

    run: Published
    fitted: float
    left_out: float | None = None

    @property
    def error(self) -> float:
        return self.fitted / self.run.value - 1

    @property
    def left_out_error(self) -> float:
        """What is in no fit is left out already."""
        return self.error if self.left_out is None else self.left_out / self.run.value - 1


class Predictor:
    """Predicts `runs` under given constants, with routes of `skew` where they are not even; all that was found is
    kept between calls."""

    def __init__(
        self, runs: Sequence[Published] = (*RUNS, *HELD_OUT), *, skew: float = DEFAULT_SKEW, seed: int = 0,
        layers: int = 2,
    ) -> None:  # fmt: skip
        plan = PlanConfig(seed=seed, layers=layers)
        machines = {run.hardware: load_machine(run.hardware) for run in runs}
        bases = {name: base_config(plan, machine) for name, machine in machines.items()}
        model = next(iter(bases.values()))[1]
        routes = {True: even(model, num_layers=1), False: drawn(model, skew=skew, num_layers=layers, seed=seed)}
        self._timers: dict[Published, StepTimer] = {}
        self._found: dict[tuple[Published, Constants], float] = {}
        for run in runs:
            config, _ = bases[run.hardware]
            layout = Layout(run.ep, 1, run.redundant, "deep_ep")
            if run.fp8_cache:
                config = replace(config, engine=replace(config.engine, kv_cache_dtype="fp8"))
            made = deploy(layout, plan, config, model, machines[run.hardware], batch=min(run.batch, 512),
                          batched_tokens=run.batch)  # fmt: skip
            self._timers[run] = _timer(run, made, routes[run.balance == "even"])

    def __call__(self, run: Published, constants: Constants) -> float:
        """ms per step, or prompt tokens/s/GPU."""
        key = (run, constants)
        if key not in self._found:
            self._found[key] = self._predict(run, constants)
        return self._found[key]

    def _predict(self, run: Published, constants: Constants) -> float:
        timer = self._timers[run]
        timer.constants = constants
        limits = LockstepLimits(
            two_batch_tokens=2 if run.two_batches else None, two_batch_decode_tokens=2 if run.two_batches else None
        )
        if run.kind == "decode":
            return timer.decode_us(run.batch, run.length, limits=limits) / 1e3
        return 1e6 * run.batch / timer.prefill_us(run.batch, run.length, limits=limits)


def _timer(run: Published, made: Deployment, routes: Routes) -> StepTimer:
    layers, logical = len(routes.layers), routes.num_logical
    domain = made.machine.nvlink_ranks
    if run.balance == "eplb":
        placement = plan_placement(
            routes.loads[0], ep=run.ep, ranks_per_node=domain, num_groups=made.model.n_group if run.groups else None,
            num_redundant=run.redundant, policy="eplb",
        )  # fmt: skip
    else:
        redundant = 0 if run.balance == "even" and run.ep in _EVEN_SLOTS else run.redundant
        placement = ExpertPlacement.uniform(layers, logical, ep=run.ep, num_redundant=redundant)
    costs = CostModel(made, routes, Replay.of(placement, choice="static", ranks_per_node=domain))
    costs.curves = replace(costs.curves, padded=run.experts)
    return StepTimer(costs, FITTED)


def fit(runs: Sequence[Published], predict: Predict, *, power: int = 1) -> Constants:
    """The least sum of |log(predicted / published)|**power: 1, so that one run whose conditions are not all known does
    not pull the others.

    The prefill runs tell of their constant alone; the decode runs of the other two, over a grid.
    """
    prefill = [run for run in runs if run.kind == "prefill"]
    decode = [run for run in runs if run.kind == "decode"]
    logs = [np.log(predict(run, Constants(0.0, 1.0, 1.0)) / run.value) for run in prefill]
    middle = np.median(logs) if power == 1 else np.mean(logs)

    def error(constants: Constants) -> float:
        return sum(abs(float(np.log(predict(run, constants) / run.value))) ** power for run in decode)

    grid = [Constants(float(gap), stretch, 1.0) for gap, stretch in product(_GAPS_US, _STRETCHES)]
    return replace(min(grid, key=error), prefill_stretch=float(np.exp(middle)))


def leave_one_out(predict: Predict, *, fitted: Constants = FITTED) -> list[Row]:
    """Every run as the fitted constants have it, and as the other runs alone would."""
    rows = []
    for run in RUNS:
        others = fit([other for other in RUNS if other is not run], predict)
        rows.append(Row(run, predict(run, fitted), predict(run, others)))
    return rows


def held_out(predict: Predict, *, fitted: Constants = FITTED) -> list[Row]:
    """The runs that no fit has seen."""
    return [Row(run, predict(run, fitted)) for run in HELD_OUT]


def network_bound_ms() -> float:
    """DeepSeek's bound (`NETWORK_BOUND_MS`) from the copies that this package's replay and wire count.

    Even routes, 32 tokens on each of 320 ranks with one slot, shared experts dispatched, every rank for itself (no
    NVLink); what a rank sends and gets back at the datasheet's rate, without starts. 7168 wide, with fp8 rows' scales.
    """
    machine, plan = replace(load_machine("h800"), nvlink_ranks=1), PlanConfig(shared_experts="dispatched")
    config, model = base_config(plan, machine)
    ep, tokens, shared = 320, 32, model.n_shared_experts
    redundant = ep - model.n_routed_experts - shared
    made = deploy(Layout(ep, 1, redundant, "deep_ep"), plan, config, model, machine, batch=tokens,
                  batched_tokens=tokens)  # fmt: skip
    load = expected_load(model.n_routed_experts, shared, top_k=model.num_experts_per_tok)
    routes = even(model, num_shared=shared)
    placement = ExpertPlacement.uniform(1, routes.num_logical, ep=ep, num_redundant=redundant, expected_load=load)
    replay = Replay.of(placement, choice="static", ranks_per_node=1)
    counts = replay.count_even(0, routes.step(0, tokens * ep, in_order=True))
    wire = Wire.of(machine, made.spec, "deep_ep")
    there, back = (wire.transfer(counts, way, decode=True, capacity=tokens) for way in ("dispatch", "combine"))
    sent = there.mean_network_bytes + back.mean_network_bytes
    return 2 * model.num_layers * sent / machine.rates.network_bytes_per_s * 1e3


def summary(rows: Sequence[Row]) -> Mapping[str, float]:
    """Mean and largest absolute errors."""
    fitted, left_out = [abs(row.error) for row in rows], [abs(row.left_out_error) for row in rows]
    return {
        "mean": float(np.mean(fitted)), "max": max(fitted),
        "leave_one_out_mean": float(np.mean(left_out)), "leave_one_out_max": max(left_out),
    }  # fmt: skip
