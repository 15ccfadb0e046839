"""A trace of expert loads: what a run has recorded, read back. The format stands in docs/balance.md, "Traces".

W windows, L MoE layers, E logical experts, P slots, N tokens with routes, K top-k, C changes of a layer's placement. A
folder holds `trace.json` (TraceHeader) and parts `part-00000.safetensors`, …, of whole windows each, all written by
renaming, so a trace can be read while a run writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from moe_runtime.balance.trace_header import HEADER_FILE, TraceHeader, has_trace, read_header
from moe_runtime.balance.trace_parts import (
    CHANGE_COLUMNS,
    PHASES,
    TOKEN_COLUMNS,
    WINDOW_COLUMNS,
    Change,
    PartsGoneError,
    Window,
    empty_columns,
    loads_of_routes,
    read_parts,
)
from moe_runtime.balance.trace_writer import TraceWriter
from moe_runtime.errors import TraceError
from moe_runtime.parallel.placement import ExpertPlacement

__all__ = [
    "Change",
    "HEADER_FILE",
    "PHASES",
    "Trace",
    "TraceHeader",
    "TraceWriter",
    "Window",
    "has_trace",
    "read_header",
    "read_trace",
    "routed_loads",
    "trace_of",
]

_ATTEMPTS: Final = 5
"""A run that writes may drop its oldest part while it is read."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trace:
    """Loads in windows of steps, each of one phase; where `header.mode` is per_token also every token's routes.

    All tensors are on the CPU. Tokens of a window stand in the order of home rank and time.
    """

    header: TraceHeader
    loads: Tensor
    """[W, L, E] int64: assignments of real tokens per logical expert"""
    rank_loads: Tensor
    """[W, L, ep] int64: rows that each rank received"""
    phases: tuple[str, ...]
    """[W]: "decode" (steps without prompt tokens) or "mixed" """
    window_steps: Tensor
    """[W] int64: steps of this phase in the window"""
    num_tokens: Tensor
    """[W] int64: real tokens of all ranks"""
    first_step: Tensor
    """[W] int64: the engine's number of the first step counted in it"""
    last_step: Tensor
    """[W] int64"""
    routes: Tensor
    """[N, L, K] int16: logical ids, -1 where there is none; N = 0 unless per_token"""
    request: Tensor
    """[N] int64: the request's number within the run"""
    position: Tensor
    """[N] int64: within the request, prompt first"""
    step: Tensor
    """[N] int64: the engine's number of the step that ran the token"""
    home: Tensor
    """[N] int64: the ep rank on which the token enters the dispatch"""
    is_prompt: Tensor
    """[N] bool"""
    window: Tensor
    """[N] int64: the window, 0..W-1, in which the token was counted"""
    micro_batch: Tensor
    """[N] uint8: the part of its step in which it was dispatched"""
    change_step: Tensor
    """[C] int64, rising: the first step that ran under the change"""
    change_layer: Tensor
    """[C] int64"""
    change_phy2log: Tensor
    """[C, P] int16: the layer's row of `phy2log` from then on"""

    @property
    def num_windows(self) -> int:
        return self.loads.shape[0]

    @property
    def total_loads(self) -> Tensor:
        """[L, E] int64: over all windows."""
        return self.loads.sum(0)

    @property
    def total_rank_loads(self) -> Tensor:
        """[L, ep] int64: over all windows."""
        return self.rank_loads.sum(0)

    def placement_at(self, step: int) -> ExpertPlacement | None:
        """The one in force when the engine ran `step`, for steps of the windows that are here; None where the trace
        does not say where its experts were. TraceError where what it says is no placement."""
        if self.header.phy2log is None:
            return None
        rows = list(self.header.phy2log)
        before = int((self.change_step <= step).sum())
        for layer, row in zip(self.change_layer[:before].tolist(), self.change_phy2log[:before].tolist(), strict=True):
            rows[layer] = tuple(row)
        return replace(self.header, phy2log=tuple(rows)).placement()

    def of_phase(self, phase: str) -> Trace:
        """The windows of one phase and their tokens. TraceError for an unknown phase."""
        if phase not in PHASES:
            raise TraceError(f"phase={phase!r}: must be one of {', '.join(PHASES)}.")
        keep = torch.tensor([own == phase for own in self.phases], dtype=torch.bool)
        tokens = keep[self.window]
        number = keep.long().cumsum(0) - 1
        own = {name: getattr(self, name)[keep] for name in WINDOW_COLUMNS if name != "phases"}
        own |= {name: getattr(self, name)[tokens] for name in TOKEN_COLUMNS}
        own["window"] = number[own["window"]]
        own |= {name: getattr(self, name) for name in CHANGE_COLUMNS}
        return Trace(header=self.header, phases=(phase,) * int(keep.sum()), **own)

    def check_model(self, *, num_layers: int, num_logical: int, top_k: int | None = None) -> None:
        """TraceError where the trace is of a model of another shape."""
        self.header.check_model(num_layers=num_layers, num_logical=num_logical, top_k=top_k)


def read_trace(folder: str | Path) -> Trace:
    """The trace in `folder`, as far as it is written.

    Raises TraceError where there is none, it is of an unknown version, cut short, holds what no run records, or counts
    that contradict each other.
    """
    for attempt in range(_ATTEMPTS):
        header = read_header(folder)
        try:
            return trace_of(header, read_parts(Path(folder), header))
        except PartsGoneError:
            if header.complete or attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def trace_of(header: TraceHeader, parts: Sequence[Mapping[str, Tensor]]) -> Trace:
    """A trace from the checked columns of its parts (`trace_parts.check_columns`), in order."""
    values = empty_columns(header, {**WINDOW_COLUMNS, **TOKEN_COLUMNS, **CHANGE_COLUMNS})
    offset, shifted = 0, []
    for part in parts:
        shifted.append({**part, "window": part["window"] + offset})
        offset += part["loads"].shape[0]
    columns = {name: torch.cat([empty, *(part[name] for part in shifted)]) for name, empty in values.items()}
    phases = tuple([PHASES[index] for index in columns.pop("phases").tolist()])
    if (columns["change_step"].diff() < 0).any():
        raise TraceError("change_step: must not fall. Its parts are of several traces; record again.")
    return Trace(header=header, phases=phases, **columns)


def routed_loads(trace: Trace) -> Tensor:
    """`[W, L, E] int64`: the loads that follow from the routes; equal to `trace.loads` where all were recorded."""
    return loads_of_routes(trace.routes, trace.window, trace.loads.shape)
