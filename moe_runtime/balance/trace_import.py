"""Loads and routes from elsewhere in the form of a trace. L MoE layers, E experts, K top-k, n tokens, W windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.trace import PHASES, Trace, TraceHeader, trace_of
from moe_runtime.balance.trace_parts import check_columns
from moe_runtime.errors import TraceError

Routed = np.ndarray[Any, Any]
"""[n, L, K] integers"""


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Of all ranks, a step each; `loads [W, L, E] int64`."""

    loads: Tensor
    phases: list[str]
    steps: list[int]
    num_tokens: list[int]

    def columns(self) -> dict[str, Tensor]:
        steps = torch.tensor(self.steps, dtype=torch.int64)
        return {
            "loads": self.loads,
            "rank_loads": self.loads.sum(2, keepdim=True),
            "phases": torch.tensor([PHASES.index(phase) for phase in self.phases], dtype=torch.uint8),
            "window_steps": torch.ones_like(steps),
            "num_tokens": torch.tensor(self.num_tokens, dtype=torch.int64),
            "first_step": steps,
            "last_step": steps,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens of one window. Neighbours of equal phase and step are one window."""

    phase: str
    step: int
    routes: Tensor
    request: int
    start: int
    is_prompt: bool


def trace_of_windows(header: TraceHeader, windows: Windows, tokens: Mapping[str, Tensor] | None = None) -> Trace:
    """The trace; where the experts were is not known, so every row counts for one rank."""
    return trace_of(header, [check_columns(header, {**windows.columns(), **(tokens or {})})])


def trace_of_routes(pieces: Sequence[Piece], *, num_routed: int, model: str, source: str) -> Trace:
    """The trace of these tokens. TraceError where there are none, or they are of several models."""
    if not pieces:
        raise TraceError("there is no token in it. Give what a run with experts has recorded.")
    shapes = {tuple(piece.routes.shape[1:]) for piece in pieces}
    if len(shapes) > 1:
        raise TraceError(f"arrays of [layers, top_k] {sorted(shapes)}: all must be of one model.")
    layers, top_k = shapes.pop()
    header = TraceHeader(
        model=model,
        num_layers=layers,
        num_logical=num_routed,
        num_routed=num_routed,
        top_k=top_k,
        mode="per_token",
        window_steps=1,
        source=source,
        complete=True,
    )
    windows = Windows(torch.zeros(0), [], [], [])
    loads: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {name: [] for name in ("routes", "request", "position", "step", "window")}
    for piece in pieces:
        if not loads or (windows.phases[-1], windows.steps[-1]) != (piece.phase, piece.step):
            loads.append(torch.zeros(layers, num_routed + 1, dtype=torch.int64))
            windows.phases.append(piece.phase)
            windows.steps.append(piece.step)
            windows.num_tokens.append(0)
        count = len(piece.routes)
        ids = piece.routes.long().transpose(0, 1).flatten(1)
        ids = torch.where(ids < 0, num_routed, ids)
        loads[-1].scatter_add_(1, ids, torch.ones_like(ids))
        windows.num_tokens[-1] += count
        columns["routes"].append(piece.routes)
        columns["position"].append(torch.arange(piece.start, piece.start + count))
        for name, value in (("request", piece.request), ("step", piece.step), ("window", len(loads) - 1)):
            columns[name].append(torch.full((count,), value, dtype=torch.int64))
    tokens = {name: torch.cat(parts) for name, parts in columns.items()}
    tokens["home"] = torch.zeros_like(tokens["step"])
    tokens["is_prompt"] = torch.cat([torch.full((len(piece.routes),), piece.is_prompt) for piece in pieces])
    own = Windows(torch.stack(loads)[:, :, :-1].contiguous(), windows.phases, windows.steps, windows.num_tokens)
    return trace_of_windows(header, own, tokens)


def checked_routes(array: Routed, where: str, num_routed: int) -> Tensor:
    """[n, L, K] int16, checked."""
    array = np.asarray(array)
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise TraceError(
            f"{where}: {array.dtype} {array.shape}: must be integers [tokens, layers, top_k]. Give the arrays as they "
            "were returned."
        )
    if array.size and not (int(array.min()) >= -1 and int(array.max()) < num_routed):
        worst = int(array.max()) if int(array.max()) >= num_routed else int(array.min())
        raise TraceError(f"{where}: expert {worst}: must lie in 0..{num_routed - 1}. Give num_routed as the model has.")
    return torch.from_numpy(array.astype(np.int16))


def checked_counts(tensor: Tensor, where: str) -> Tensor:
    """int64, checked."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise TraceError(f"{where} holds {float(tensor[~tensor.isfinite()][0])}: counts must be whole numbers.")
    whole = tensor.to(torch.int64)
    if not torch.equal(whole.to(tensor.dtype), tensor) or int(whole.min()) < 0:
        raise TraceError(f"{where} holds {float(tensor.min()):g}: counts must be whole numbers of at least 0.")
    return whole
