"""Loads for the balance tables: synthetic ones of 58 layers and 256 experts, and the demo model's, recorded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_runtime import LLM
from moe_runtime.balance.trace import read_trace
from moe_runtime.engine.request import SamplingParams

LAYERS: Final = 58
EXPERTS: Final = 256
Loads = NDArray[np.float64]


def _zipf(rng: np.random.Generator) -> Loads:
    popular = 1e6 / np.arange(1, EXPERTS + 1)
    return np.round(np.stack([rng.permutation(popular) for _ in range(LAYERS)]))


def _lognormal(rng: np.random.Generator) -> Loads:
    return np.round(rng.lognormal(0.0, 1.0, (LAYERS, EXPERTS)) * 1000)


def _hot_group(rng: np.random.Generator) -> Loads:
    """One group of 32 experts, another in each layer, has 60 % of the load."""
    loads = rng.lognormal(0.0, 0.5, (LAYERS, EXPERTS))
    for layer, row in enumerate(loads):
        first = layer % 8 * 32
        row[first : first + 32] *= (
            0.6 / 0.4 * (row.sum() - row[first : first + 32].sum()) / row[first : first + 32].sum()
        )
    return np.round(loads * 1000)


def _greedy_trap(rng: np.random.Generator) -> Loads:
    """Loads for which "heaviest first to the lightest" is known to be worst: pairs of 2m-1, 2m-2, …, m, then m."""
    m = 32
    steps = np.repeat(np.arange(2 * m - 1, m - 1, -1), 2)
    loads = np.concatenate([steps, [m], np.full(EXPERTS - len(steps) - 1, 1.0)])
    return np.stack([rng.permutation(loads * 100) for _ in range(LAYERS)])


SYNTHETIC: Final[Mapping[str, Callable[[np.random.Generator], Loads]]] = MappingProxyType(
    {"Zipf 1.0": _zipf, "lognormal": _lognormal, "one hot group": _hot_group, "greedy's trap": _greedy_trap}
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Routes of the demo model: `routes [N, L, K]`, `request [N]`, `step [N]`; `loads [L, E]` is their count."""

    loads: Loads
    routes: Tensor
    request: Tensor
    step: Tensor


def record_demo() -> Recorded:
    """The demo model's own prompts, four times each, 32 new tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        words = ["balance.record=per_token", f"balance.trace={trace}", "dp=8", "tp=1"]
        with LLM("demo", ep=8, overrides=words) as llm:
            lines = Path("models/demo/prompts.jsonl").read_text(encoding="utf-8").splitlines()
            prompts = [json.loads(line)["prompt"] for line in lines]
            llm.generate(prompts * 4, SamplingParams(max_tokens=32))
            loads = llm.expert_load().double().numpy()
        found = read_trace(trace)
    return Recorded(loads, found.routes.long(), found.request.long(), found.step.long())
