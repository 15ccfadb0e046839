"""How even ranks are in a step, by replica choice: every rank's tokens placed by the runtime's own tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.planner import plan_placement
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_runtime.types import LogicalRouting
from moe_tools.bench.balance_loads import EXPERTS, Recorded

_STEPS: Final = 8
_TOP_K: Final = 8


def choice_table(recorded: Recorded) -> Iterator[str]:
    """Balancedness of single steps under each choice: mean over steps."""
    yield f"| routes | {' | '.join(f'`{choice}`' for choice in ReplicaChoice)} |"
    yield f"| --- |{' --- |' * len(ReplicaChoice)}"
    for name, words in {
        "Zipf 1.0, planned for it, 128 tokens per rank": {"drift": 0.0},
        "the same after a drift of e^±0.5": {"drift": 0.5},
        "the same, 2048 tokens per rank": {"drift": 0.5, "tokens": 2048},
        "the same, shared expert dispatched (32 copies)": {"drift": 0.5, "shared": 1},
        "32 tokens per rank, shared expert dispatched": {"drift": 0.5, "tokens": 32, "shared": 1},
    }.items():
        yield _row(name, synthetic(**words))  # type: ignore[arg-type]
    yield _row("demo, recorded: planned on half of the requests, the other half run", replayed(recorded))


def synthetic(*, drift: float, tokens: int = 128, shared: int = 0, ep: int = 32) -> dict[ReplicaChoice, float]:
    """Plan for a Zipf load, then draw the tokens of each rank from the drifted one."""
    generator = torch.Generator().manual_seed(0)
    even: dict[ReplicaChoice, list[float]] = {choice: [] for choice in ReplicaChoice}
    for _ in range(_STEPS):
        popular = (1.0 / torch.arange(1, EXPERTS + 1).double())[torch.randperm(EXPERTS, generator=generator)]
        loads = popular / popular.sum() * _TOP_K * 1000
        loads = torch.cat([loads, torch.full((shared,), 1000.0, dtype=torch.float64)])
        placement = plan_placement(loads[None], ep=ep, ranks_per_node=8, num_redundant=32 + 31 * shared)
        now = popular * torch.exp(drift * torch.randn(EXPERTS, generator=generator, dtype=torch.float64))
        ids = []
        for _ in range(ep):
            drawn = torch.multinomial(now.expand(tokens, -1), _TOP_K, generator=generator)
            ids.append(torch.cat([drawn, torch.full((tokens, shared), EXPERTS)], dim=1))
        for choice in ReplicaChoice:
            even[choice].append(_balance(placement, 0, ids, choice))
    return {choice: float(np.mean(values)) for choice, values in even.items()}


def replayed(recorded: Recorded, *, ep: int = 32) -> dict[ReplicaChoice, float]:
    """Requests dealt to 32 ranks; steps of at least 128 tokens."""
    first = recorded.request % 2 == 0
    layers = recorded.routes.shape[1]
    loads = torch.stack([torch.bincount(recorded.routes[first, i].flatten(), minlength=EXPERTS) for i in range(layers)])
    placement = plan_placement(loads, ep=ep, ranks_per_node=8, num_redundant=32)
    even: dict[ReplicaChoice, list[float]] = {choice: [] for choice in ReplicaChoice}
    for step in sorted(set(recorded.step[~first].tolist())):
        mine = ~first & (recorded.step == step)
        if int(mine.sum()) < 128:
            continue
        home = recorded.request[mine] // 2 % ep
        for layer in range(layers):
            ids = [recorded.routes[mine, layer][home == rank] for rank in range(ep)]
            for choice in ReplicaChoice:
                even[choice].append(_balance(placement, layer, ids, choice))
    return {choice: float(np.mean(values)) for choice, values in even.items()}


def _balance(placement: ExpertPlacement, layer: int, ids: Sequence[Tensor], choice: ReplicaChoice) -> float:
    total = torch.zeros(placement.ep)
    one = ExpertPlacement(placement.phy2log[layer : layer + 1], placement.num_logical, placement.ep)
    for rank, its in enumerate(ids):
        routing = LogicalRouting(its, torch.ones(its.shape))
        slots = one.selector(rank, choice=choice).to_physical(0, routing).expert_ids
        total += torch.bincount((slots // one.num_local).flatten(), minlength=placement.ep)
    return float(total.mean() / total.max())


def _row(name: str, even: dict[ReplicaChoice, float]) -> str:
    return f"| {name} | {' | '.join(f'{even[choice]:.3f}' for choice in ReplicaChoice)} |"
