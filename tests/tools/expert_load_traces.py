"""Small traces whose numbers are consistent: what was counted follows from the routes and the placement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.trace import Trace, TraceHeader, TraceWriter, Window, read_trace
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.types import LogicalRouting

LAYERS, EXPERTS, TOP_K, EP, WINDOWS, TOKENS = 2, 16, 2, 4, 3, 40
"""TOKENS of each window."""


def write_trace(
    folder: Path,
    *,
    placement: ExpertPlacement | None = None,
    routes: Tensor | None = None,
    with_routes: bool = True,
    model: str = "demo",
) -> Trace:
    """A trace of skewed random `routes [W, TOKENS, L, K]` under `placement`, written to `folder` and read back."""
    placement = ExpertPlacement.uniform(LAYERS, EXPERTS, ep=EP) if placement is None else placement
    routes = random_routes() if routes is None else routes
    header = TraceHeader(
        model=model,
        num_layers=LAYERS,
        num_logical=EXPERTS,
        num_routed=EXPERTS,
        top_k=TOP_K,
        ep=placement.ep,
        dp=placement.ep,
        ranks_per_node=2,
        mode="per_token" if with_routes else "stat",
        window_steps=4,
        phy2log=tuple(map(tuple, placement.phy2log.tolist())),
    )
    writer = TraceWriter(folder, header)
    for number, own in enumerate(routes):
        writer.add([_window(number, own, placement)], tokens_of(own, number) if with_routes else None)
    writer.close()
    return read_trace(folder)


def random_routes(seed: int = 0) -> Tensor:
    """[WINDOWS, TOKENS, LAYERS, TOP_K] int16: distinct experts, low ids more often; 0 and 1 always together."""
    generator = np.random.default_rng(seed)
    weight = np.log(1 / np.arange(1.0, EXPERTS + 1))
    score = weight + generator.gumbel(size=(WINDOWS, TOKENS, LAYERS, EXPERTS))
    routes = np.argsort(-score, axis=-1)[..., :TOP_K]
    low = (routes == 0).any(axis=-1)
    routes[low] = [0, 1]
    return torch.from_numpy(routes.astype(np.int16))


def homes() -> Tensor:
    """[TOKENS]: the rank on which each token of a window lives, as the format has them: in order."""
    return torch.arange(TOKENS) * EP // TOKENS


def tokens_of(routes: Tensor, number: int) -> dict[str, Tensor]:
    zeros = torch.zeros(len(routes), dtype=torch.int64)
    return {
        "routes": routes,
        "request": torch.arange(len(routes)),
        "position": zeros + number,
        "step": zeros + 4 * number,
        "home": homes(),
        "is_prompt": zeros.bool(),
        "window": zeros,
    }


def _window(number: int, routes: Tensor, placement: ExpertPlacement) -> Window:
    loads = torch.stack([routes[:, layer].long().flatten().bincount(minlength=EXPERTS) for layer in range(LAYERS)])
    rows = torch.zeros(LAYERS, placement.ep, dtype=torch.int64)
    for token, home in enumerate(homes().tolist()):
        for layer in range(LAYERS):
            ids = routes[token, layer].long().unsqueeze(0)
            found = placement.to_physical(layer, LogicalRouting(ids, torch.ones(ids.shape)), ep_rank=home).expert_ids
            for slot in found.flatten().tolist():
                rows[layer, placement.owner(slot)[0]] += 1
    return Window(
        phase="mixed" if number == 0 else "decode",
        first_step=4 * number,
        last_step=4 * number + 3,
        num_steps=4,
        num_tokens=len(routes),
        loads=loads,
        rank_loads=rows,
    )


def without_placement(trace: Trace) -> Trace:
    return replace(trace, header=replace(trace.header, phy2log=None))
