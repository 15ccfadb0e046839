"""Whole decode steps of the demo model on eight virtual ranks, with and without one CUDA graph around each."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_tools.bench.fabric.parts import Measured

DEMO: Final = Path(__file__).resolve().parents[4] / "models" / "demo"
RANKS: Final = 8
NEW_TOKENS: Final = 48
TURNS: Final = 5
WORDS: Final = (
    *("dtype=bfloat16", f"ep={RANKS}", "tp=1", "dispatch=all_gather", "engine.prefix_caching=false"),
    *("engine.max_model_len=256", "engine.max_num_seqs=1", "engine.cuda_graph_sizes=[1]", "num_threads=2"),
)
"""One request for each rank from first to last, so that every decode step has the captured size."""


@dataclass(frozen=True, slots=True)
class Answers:
    tokens: tuple[tuple[int, ...], ...]
    step_us: list[float]
    """Of each turn, its prompt step included."""
    captures: int
    replays: int


def run() -> Iterator[Measured]:
    """Without a graph, then with one; the same tokens."""
    eager = answers("device=cuda", "engine.cuda_graphs=off")
    yield _measured("eager", eager, "")
    captured = answers("device=cuda", "engine.cuda_graphs=on")
    assert captured.captures == 1, f"{captured.captures} captures, expected one"
    assert captured.replays >= TURNS * (NEW_TOKENS - 2), f"{captured.replays} replays are not all decode steps"
    assert captured.tokens == eager.tokens, "the graph gives other tokens"
    yield _measured("one graph", captured, "tokens of eager")


def answers(*words: str) -> Answers:
    """Greedy answers to one prompt for each rank, several times over."""
    from moe_runtime import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [[7 + rank, 40 + 3 * rank, 100, 11 * rank + 2] for rank in range(RANKS)]
    step_us: list[float] = []
    with LLM(str(DEMO), overrides=[*WORDS, *words]) as llm:
        outputs: Any = llm.generate(prompts, params)
        for _ in range(TURNS):
            start = time.perf_counter()
            outputs = llm.generate(prompts, params)
            step_us.append(1e6 * (time.perf_counter() - start) / NEW_TOKENS)
        graphs = llm.snapshot().graphs
    tokens = tuple(tuple(output.outputs[0].token_ids) for output in outputs)
    return Answers(tokens, step_us, graphs.captures, graphs.replays)


def _measured(name: str, found: Answers, checked: str) -> Measured:
    us = sorted(found.step_us)
    shape: dict[str, int | str] = {"ranks": RANKS, "model": DEMO.name, "steps": name}
    return Measured(
        "decode step, virtual ranks", statistics.median(us), us[0], us[-1], shuffled_bytes(), shape,
        graph=bool(found.captures), checked=checked,
    )  # fmt: skip


def shuffled_bytes() -> int:
    """What one step's all-gathers and reduce-scatters bring to all ranks: bf16 rows with their routing, fp32 sums."""
    model = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    layers = model["num_hidden_layers"] - model["first_k_dense_replace"]
    row = model["hidden_size"] * (2 + 4) + 8 * model["num_experts_per_tok"]
    return int(layers * RANKS * RANKS * row)
