"""How much of the planner's errors hangs on what is assumed, and the skew that published imbalances tell of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.plan.deployment import base_config
from moe_tools.plan.hardware import load_machine
from moe_tools.plan.published import FITTED, Predictor, fit
from moe_tools.plan.published_runs import RUNS, Published
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import drawn
from moe_tools.plan.settings import DEFAULT_SKEW, PlanConfig

SKEW_FIGURES: Final[Mapping[str, float]] = MappingProxyType(
    {
        "rank imbalance at EP32": 2.56,
        "expert imbalance": 11.95,
        "decode gain at EP72": 2.54,
        "prefill gain at EP32": 1.49,
    }
)
"""R1 without balancing: busiest rank and busiest expert over the mean (TensorRT-LLM, tech blog 4, 256 tokens per rank);
what EPLB gained in throughput (SGLang, 5 May 2025)."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What the planner says of `run` if one assumption were another."""

    run: Published
    instead: str
    value: float

    @property
    def error(self) -> float:
        return self.value / self.run.value - 1


def sensitivities(*, seed: int = 0) -> list[Sensitivity]:
    """One assumption changed at a time, with the fitted constants; then another way to fit them."""
    runs = {run.name: run for run in RUNS}
    online, vllm, trt = runs["DeepSeek online EP144"], runs["vLLM EP32"], runs["TRT-LLM EP8"]
    sglang, prefill = runs["SGLang EP72"], runs["SGLang prefill EP32"]
    others = (
        (vllm, "one micro-batch", replace(vllm, two_batches=False)),
        (vllm, "one micro-batch, drawn routes, EPLB", replace(vllm, two_batches=False, balance="eplb")),
        (trt, "DeepGEMM's table of the experts", replace(trt, experts="masked")),
        (trt, "5120 cached", replace(trt, length=5120)),
        (prefill, "groups of experts not kept on a node", replace(prefill, groups=False)),
    )
    predict = Predictor([other for _, _, other in others], seed=seed)
    found = [Sensitivity(run, instead, predict(other, FITTED)) for run, instead, other in others]
    for skew in (0.3, 0.9):
        predict = Predictor([online, sglang], skew=skew, seed=seed)
        found += [Sensitivity(run, f"skew {skew:g}", predict(run, FITTED)) for run in (online, sglang)]
    predict = Predictor(RUNS, seed=seed)
    squares = fit(RUNS, predict, power=2)
    how = f"least squares: gap {squares.gap_us:g}, transfers x {squares.wire_stretch:g}"
    return found + [Sensitivity(run, how, predict(run, squares)) for run in (online, vllm)]


def skew_figures(skew: float, *, seed: int = 0) -> dict[str, float]:
    """The figures of `SKEW_FIGURES` as routes drawn with `skew` have them."""
    runs = {run.name: run for run in RUNS}
    decode, prefill = runs["SGLang EP72"], runs["SGLang prefill EP32"]
    alone = replace(decode, balance="none"), replace(prefill, balance="none", redundant=0)
    predict = Predictor([decode, prefill, *alone], skew=skew, seed=seed)
    ms, rate, alone_ms, alone_rate = (predict(run, FITTED) for run in (decode, prefill, *alone))
    layers = 2
    _, model = base_config(PlanConfig(), load_machine("h200"))
    routes = drawn(model, skew=skew, num_layers=layers, seed=seed)
    replay = Replay.of(ExpertPlacement.uniform(layers, routes.num_logical, ep=32), choice="static", ranks_per_node=8)
    counts = [
        replay.count_even(layer, routes.step(layer, 256 * 32, in_order=False, seed=layer)) for layer in range(layers)
    ]
    busiest = [float(own.slot_rows.max() / own.slot_rows.double().mean()) for own in counts]
    return {
        "rank imbalance at EP32": float(np.mean([own.imbalance for own in counts])),
        "expert imbalance": float(np.mean(busiest)),
        "decode gain at EP72": alone_ms / ms,
        "prefill gain at EP32": rate / alone_rate,
    }


def skew_error(skew: float = DEFAULT_SKEW, *, seed: int = 0) -> float:
    """Sum of the squares of the logarithms of drawn over published."""
    found = skew_figures(skew, seed=seed)
    return float(sum(np.log(found[name] / value) ** 2 for name, value in SKEW_FIGURES.items()))
