"""Whole engines whose experts move every few steps: what is run, and how its bits are compared."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime import LLM
from moe_runtime.balance.decision import Decision, Verdict
from moe_runtime.balance.moves import keep_slots
from moe_runtime.balance.schedule import LayerChange
from moe_runtime.engine.rebalance_state import Activity
from moe_runtime.engine.snapshot import EngineSnapshot
from moe_runtime.parallel.placement import ExpertPlacement
from tests.api.tiny import greedy, tokens, wait_until_idle

PROMPTS = [[5, 6, 7], [9], [8, 10], [11, 12, 13, 14, 15]]
LENGTHS = [14, 9, 3, 12]
COMMON = ["num_threads=1", "engine.page_size=4", "engine.max_model_len=32", "engine.kv_cache_bytes=1MiB"]
MOVING = ["balance.rebalance=on", "balance.interval_steps=2", "balance.bytes_per_step=8KiB"]
INVARIANT = "engine.batch_invariant=true"
COPIES = ["placement.num_redundant_experts=7", "placement.replica_choice=round_robin"]

Bits = dict[tuple[int, int], Tensor]
"""Logits by request and position."""


def by_chance(before: list[ExpertPlacement], *, swaps: int | None = None) -> Any:
    """In place of `decide`: move every layer's experts to where chance puts them, or exchange so many pairs of slots.
    The placements are added to `before`."""
    draw = random.Random(7)

    def row(now: ExpertPlacement, old: list[int]) -> list[int]:
        if swaps is None:
            extra = draw.choices(range(now.num_logical), k=now.num_physical - now.num_logical)
            return draw.sample([*range(now.num_logical), *extra], now.num_physical)
        new = list(old)
        for _ in range(swaps):
            mine, other = draw.randrange(now.num_local), draw.randrange(now.num_local, now.num_physical)
            new[mine], new[other] = new[other], new[mine]
        return new

    def decide(loads: Tensor, steps: int, *, now: ExpertPlacement, **others: Any) -> Decision:
        before.append(now)
        rows = [(old, row(now, old)) for old in now.phy2log.tolist()]
        changes = [
            LayerChange(layer, keep_slots(old, new, num_local=now.num_local), 1, 0, 1.0)
            for layer, (old, new) in enumerate(rows)
        ]
        return Decision(
            verdict=Verdict.MOVE,
            steps=steps,
            num_tokens=int(loads.sum()),
            utilisation=0.5,
            without=0.5,
            planned=0.9,
            predicted=0.9,
            changes=tuple(changes),
        )

    return decide


def run(folder: Path, *words: str) -> tuple[list[tuple[int, ...]], EngineSnapshot]:
    with LLM(str(folder), overrides=[*COMMON, *words]) as llm:
        found = tokens(llm.generate(PROMPTS, [greedy(length) for length in LENGTHS]))
        wait_until_idle(llm)
        return found, at_rest_again(llm)


def at_rest_again(llm: LLM) -> EngineSnapshot:
    """The snapshot in which no layer is on its way."""
    until = time.monotonic() + 30.0
    while (snapshot := llm.snapshot()).rebalance.activity is Activity.MOVING:
        assert time.monotonic() < until, snapshot.rebalance
        time.sleep(0.02)
    return snapshot


def assert_same_bits(found: Bits, wanted: Bits) -> None:
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        differ = found[key].view(torch.int32) != values.view(torch.int32)
        assert not differ.any(), f"request {key[0]}, position {key[1]}: {int(differ.sum())} of {values.numel()} differ"
