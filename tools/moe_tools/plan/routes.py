"""Routes to plan for: a recorded trace's, or drawn for a skew through the model's own gate.

L layers that are looked at, N tokens, E' logical experts, K experts of a token (dispatched shared ones included).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import torch
from moe_kernels.gate import gate
from moe_models.base import ModelConfig
from moe_models.deepseek_v3.assembly import gate_rule
from torch import Tensor

from moe_runtime.balance.trace import Trace
from moe_runtime.balance.trace_readers import read_any
from moe_runtime.errors import TraceError
from moe_tools.plan.recording import Repeat, repeated

POOL: Final = 16384
"""Tokens drawn per layer; larger steps take them several times."""
SEEN: Final = 8192
"""Tokens per layer that a planner sees of drawn routes."""
STEEPNESS: Final = 0.25
"""Logits are small, so that the gate's sigmoid keeps their differences."""
_OURS: Final = "moe_runtime"
"""The header's `source` of this runtime's recordings"""
SHIFT: Final = 4.0
"""Taken from all logits before, so that no sigmoid saturates."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """`ids [L, N, K] int64`: experts of tokens, in the order in which prompts hold them.

    `loads [W, L, E'] int64`: what a planner may know of them, by windows. `layers`: which of the model's they are.
    """

    ids: Tensor
    loads: Tensor
    layers: tuple[int, ...]
    source: str
    ordered: bool = False
    """Their order makes them even: a step takes them as they stand"""
    repeat: Repeat | None = None
    """Of a recording: its rows replayed under its own placement against those measured"""

    @property
    def num_logical(self) -> int:
        return self.loads.shape[2]

    def step(self, layer: int, num_tokens: int, *, in_order: bool, seed: int = 0) -> Tensor:
        """[num_tokens, K] int64: routes of one step in layer number `layer` of these. `in_order`: neighbours in a
        prompt stay neighbours; else a step's tokens are of unrelated requests."""
        pool = self.ids[layer]
        if in_order or self.ordered:
            index = torch.arange(num_tokens) % pool.shape[0]
        else:
            generator = torch.Generator().manual_seed(seed)
            rounds = -(-num_tokens // pool.shape[0])
            index = torch.cat([torch.randperm(pool.shape[0], generator=generator) for _ in range(rounds)])
        return pool[index[:num_tokens]]


def drawn(model: ModelConfig, *, skew: float, num_layers: int, seed: int, num_shared: int = 0) -> Routes:
    """Popularity falls as 1/rank**skew over the experts, in an order of its own per layer; 0 is even. The gate then
    chooses with the model's groups, so what experts receive is somewhat flatter. The planner sees other tokens than
    those that run."""
    experts, top_k = model.n_routed_experts, model.num_experts_per_tok
    generator = torch.Generator().manual_seed(seed)
    fall = -skew * torch.log(torch.arange(1.0, experts + 1))
    rule, ids, seen = gate_rule(model), [], []
    for _ in range(num_layers):
        popularity = fall[torch.randperm(experts, generator=generator)]
        noise = -torch.log(-torch.log(torch.rand(POOL + SEEN, experts, generator=generator).clamp(1e-9, 1 - 1e-7)))
        chosen, _ = gate((popularity + noise - SHIFT) * STEEPNESS, rule=rule)
        ids.append(_with_shared(chosen[:POOL], experts, num_shared))
        seen.append(_count(_with_shared(chosen[POOL:], experts, num_shared), experts + num_shared))
    count = f"{num_layers} layer{'s' if num_layers > 1 else ''}"
    text = f"drawn: top-{top_k} of {experts} experts, popularity 1/rank^{skew:g}, {count}"
    return Routes(torch.stack(ids), torch.stack(seen).unsqueeze(0), tuple(range(num_layers)), text)


def even(model: ModelConfig, *, num_layers: int = 1, num_shared: int = 0) -> Routes:
    """Simulated perfect balance: tokens go through all sets of groups that the gate allows, and through the experts of
    each group, in turn."""
    experts, top_k = model.n_routed_experts, model.num_experts_per_tok
    groups, chosen = model.n_group, model.topk_group
    if top_k % chosen:
        groups = chosen = 1
    sets = list(combinations(range(groups), chosen))
    used, ids = [0] * groups, []
    for token in range(POOL):
        row = []
        for group in sets[token % len(sets)]:
            for _ in range(top_k // chosen):
                row.append(group * (experts // groups) + used[group] % (experts // groups))
                used[group] += 1
        ids.append(row)
    table = _with_shared(torch.tensor(ids), experts, num_shared).expand(num_layers, -1, -1)
    loads = _count(table[0], experts + num_shared).expand(1, num_layers, -1)
    return Routes(table, loads, tuple(range(num_layers)), "even: all experts alike", ordered=True)


def recorded(
    folder: str | Path, model: ModelConfig, *, name: str | None, num_layers: int, num_shared: int = 0
) -> Routes:
    """Routes of a per_token trace of this model or of another program's record, in up to `num_layers` layers spread
    over its depth. `name`: what a recording calls the model; None lets a fine-tune of the same shape pass.

    TraceError where the trace is of another model (layers, experts, top_k, name) or holds no routes.
    """
    trace = open_trace(folder, model)
    header = trace.header
    try:
        trace.check_model(
            num_layers=len(model.moe_layers),
            num_logical=model.n_routed_experts + num_shared,
            top_k=model.num_experts_per_tok + num_shared,
        )
    except TraceError as error:
        own = f" Or plan for the trace's own: model={header.model}" if header.model not in ("", name) else ""
        raise TraceError(f"trace={folder}: {error}{own}") from None
    if name is not None and header.model and header.model != name:
        raise TraceError(
            f"trace={folder}: is of model {header.model!r}, and this is {name!r}. Record a trace of this model, or, if "
            f"one is a fine-tune of the other, say so: fine_tune=true."
        )
    if not trace.routes.shape[0]:
        raise TraceError(
            f"trace={folder}: was recorded as {header.mode} and holds no routes of tokens; the planner replays "
            "them. Record with balance.record=per_token."
        )
    count = min(num_layers, header.num_layers)
    layers = tuple([index * header.num_layers // count for index in range(count)])
    source = f"trace {folder} of {header.model or 'a model without a name'}: {trace.routes.shape[0]} tokens"
    return replace(from_trace(trace, layers, source=source), repeat=repeated(trace))


def open_trace(place: str | Path, model: ModelConfig) -> Trace:
    """A recording of ours, or another program's record, with this model's number of experts. TraceError as
    `read_any`."""
    return read_any(place, num_routed=model.n_routed_experts)


def seen_loads(trace: Trace) -> Tensor:
    """[W, L, E'] int64: what a planner goes by. Other programs' windows are requests, not times: one for all."""
    return trace.loads if trace.header.source == _OURS else trace.loads.sum(0, keepdim=True)


def from_trace(trace: Trace, layers: tuple[int, ...], *, source: str) -> Routes:
    """All tokens of a trace, in the order of requests and their positions."""
    order = torch.from_numpy(np.lexsort((trace.position.numpy(), trace.request.numpy())))
    ids = trace.routes[order][:, list(layers)].transpose(0, 1).long()
    return Routes(ids.contiguous(), seen_loads(trace)[:, list(layers)], layers, source)


def _with_shared(ids: Tensor, experts: int, num_shared: int) -> Tensor:
    shared = torch.arange(experts, experts + num_shared).expand(*ids.shape[:-1], num_shared)
    return torch.cat([ids, shared], dim=-1)


def _count(ids: Tensor, num_logical: int) -> Tensor:
    return torch.bincount(ids.flatten(), minlength=num_logical)
