"""What a configuration records of the experts' loads, and where it shows them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from moe_models.base import ModelConfig

from moe_runtime.balance.load import PHASES, LoadRecorder
from moe_runtime.balance.routes import RouteBuffer
from moe_runtime.balance.trace import TraceHeader, TraceWriter, has_trace
from moe_runtime.balance.trace_parts import part_bytes
from moe_runtime.balance.trace_writer import trace_exists
from moe_runtime.comm.base import Communicator
from moe_runtime.config import BalanceConfig, RuntimeConfig
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.recording import Recording
from moe_runtime.engine.snapshot_file import SnapshotFile
from moe_runtime.engine.trace_thread import TraceThread
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.launch.placing import num_dispatched_shared, num_logical_experts
from moe_runtime.launch.shuffle import overlaps, overlaps_decode, whole_spec
from moe_runtime.launch.sizing import format_bytes
from moe_runtime.parallel.placement import ExpertPlacement

_WINDOW_BYTES: Final = 8 * 2**20
"""What a rank keeps of an open window, steps or routes, before it is ended early."""
_NAMES_BYTES: Final = 4096
"""Of a part beside its windows and tokens, at most: names, and the row of a layer whose experts moved."""
SNAPSHOT_NAME: Final = "snapshot.json"
_DISK_WAIT_S: Final = 30.0
"""For the trace at the end of a run, and for the last snapshot, at most."""


def make_recorder(config: RuntimeConfig, model: ModelConfig, device: torch.device) -> LoadRecorder | None:
    """One rank's counters; None with balance.record=off."""
    if config.balance.record == "off":
        return None
    routes = None
    if config.balance.record == "per_token":
        rows, micro_batches = _route_rows(config, model)
        routes = RouteBuffer(
            len(model.moe_layers),
            rows=rows,
            top_k=_top_k(config, model),
            micro_batches=micro_batches,
            device=device,
        )
    return LoadRecorder(len(model.moe_layers), num_logical_experts(config, model), device=device, routes=routes)


def route_bytes(config: RuntimeConfig, model: ModelConfig) -> int:
    """Device memory of one rank for the routes of a step's tokens; 0 where none are noted."""
    if config.balance.record != "per_token":
        return 0
    rows, micro_batches = _route_rows(config, model)
    top_k = _top_k(config, model)
    return RouteBuffer.num_bytes(len(model.moe_layers), rows=rows, top_k=top_k, micro_batches=micro_batches)


def _route_rows(config: RuntimeConfig, model: ModelConfig) -> tuple[int, int]:
    """(tokens of a micro-batch, micro-batches of a step), at most."""
    return whole_spec(config, model).max_tokens, 2 if overlaps(config) or overlaps_decode(config) else 1


def make_recording(
    config: RuntimeConfig,
    model: ModelConfig,
    ep: Communicator,
    recorder: LoadRecorder | None,
    *,
    placement: ExpertPlacement,
    owns: bool,
    rebalancer: Rebalancer | None = None,
) -> Recording | None:
    """One rank's part of the windows; None where nobody would see them. `owns`: this rank writes them; `rebalancer`:
    its own, where experts move.

    TraceError where the trace cannot be begun.
    """
    balance = config.balance
    if recorder is None or (balance.trace is None and snapshot_path(config) is None):
        return None
    trace = None
    if owns and balance.trace is not None:
        writer = TraceWriter(balance.trace, trace_header(config, model, placement), cap_bytes=balance.trace_bytes)
        trace = TraceThread(writer, within_s=_DISK_WAIT_S)
    return Recording(
        ep,
        recorder,
        tp=config.tp,
        window_steps=balance.window_steps,
        most_bytes=min(_WINDOW_BYTES, balance.trace_bytes // 4 // (config.ep if recorder.routes is not None else 1)),
        per_step=balance.record == "per_pass",
        trace=trace,
        placed=tuple if rebalancer is None else lambda: rebalancer.phy2log,
    )


def trace_header(config: RuntimeConfig, model: ModelConfig, placement: ExpertPlacement | None) -> TraceHeader:
    """What a trace of this run says of itself. TraceError where a trace cannot hold the model."""
    return TraceHeader(
        model=Path(config.model).name or Path(config.model).resolve().name,
        num_layers=len(model.moe_layers),
        num_logical=num_logical_experts(config, model),
        num_routed=model.n_routed_experts,
        top_k=_top_k(config, model),
        ep=config.ep,
        tp=config.tp,
        dp=config.dp,
        ranks_per_node=config.ranks_per_node,
        mode=config.balance.record,
        window_steps=config.balance.window_steps,
        phy2log=None if placement is None else tuple(map(tuple, placement.phy2log.tolist())),
        replica_choice=config.placement.replica_choice,
    )


def snapshot_path(config: RuntimeConfig) -> Path | None:
    """Where the running engine shows itself, if anywhere."""
    if config.snapshot_file is not None:
        return Path(config.snapshot_file)
    return None if config.balance.trace is None else Path(config.balance.trace) / SNAPSHOT_NAME


def make_snapshot_file(config: RuntimeConfig, model: ModelConfig) -> SnapshotFile | None:
    """Rank 0's; None where none was asked for."""
    path = snapshot_path(config)
    if path is None:
        return None
    run: dict[str, object] = {
        "model": config.model,
        "num_layers": len(model.moe_layers),
        "num_logical": num_logical_experts(config, model),
        "num_routed": model.n_routed_experts,
        "top_k": _top_k(config, model),
        "ep": config.ep,
        "tp": config.tp,
        "dp": config.dp,
        "ranks_per_node": config.ranks_per_node,
        "record": config.balance.record,
        "trace": config.balance.trace,
    }
    return SnapshotFile(path, run, within_s=_DISK_WAIT_S)


def recording_conflicts(config: RuntimeConfig, model: ModelConfig, *, has_weights: bool) -> Iterator[ConfigError]:
    """What the keys of recording cannot do together. `has_weights`: whether the model could be run."""
    balance = config.balance
    yield from _unseen(config)
    shown, saved = snapshot_path(config), balance.save_placement
    if shown is not None and saved and os.path.realpath(shown) == os.path.realpath(saved):
        yield ConfigError(
            f"balance.save_placement={saved!r}: the snapshot is written to this file too. Give it a file of its own, "
            f"e.g. balance.save_placement={str(Path(saved).parent / f'placement-{Path(saved).name}')!r}."
        )
    if balance.trace is None:
        if balance.record in ("per_pass", "per_token"):
            yield ConfigError(
                f"balance.record={balance.record}: goes to a trace, and there is none. Set balance.trace=FOLDER, or "
                "balance.record=stat."
            )
        return
    if balance.record == "off":
        yield ConfigError(
            f"balance.trace={balance.trace!r} with balance.record=off: nothing would be in it. Set "
            "balance.record=stat, per_pass or per_token."
        )
        return
    if has_weights and has_trace(balance.trace):
        yield ConfigError(f"balance.trace={trace_exists(balance.trace)}")
    try:
        header = trace_header(config, model, None)
    except TraceError as error:
        yield ConfigError(f"balance.trace={balance.trace!r}: {error} Leave balance.trace out.")
        return
    tokens = whole_spec(config, model).max_tokens * config.ep if balance.record == "per_token" else 0
    need = 4 * (part_bytes(header, windows=len(PHASES), tokens=tokens) + _NAMES_BYTES)
    if balance.trace_bytes < need:
        remedy = ", or lower engine.max_num_batched_tokens" if tokens else ""
        yield ConfigError(
            f"balance.trace_bytes={balance.trace_bytes}: must hold four steps of this run at their largest, "
            f"{format_bytes(need)}. Nearest: balance.trace_bytes={need}{remedy}."
        )


def _top_k(config: RuntimeConfig, model: ModelConfig) -> int:
    return model.num_experts_per_tok + num_dispatched_shared(config, model)


def _unseen(config: RuntimeConfig) -> Iterator[ConfigError]:
    """Keys that say how to write what is written nowhere."""
    balance = config.balance
    if balance.trace is None:
        yield from without_effect(
            balance, ["trace_bytes"], where="without balance.trace", remedy="balance.trace=FOLDER"
        )
    shown = balance.record != "off" and snapshot_path(config) is not None
    if not shown and balance.rebalance == "off":
        yield from without_effect(
            balance,
            ["window_steps"],
            where="where loads are neither traced, shown nor moved by",
            remedy="balance.trace=FOLDER, snapshot_file=FILE or balance.rebalance=on",
        )


def without_effect(balance: BalanceConfig, names: Sequence[str], *, where: str, remedy: str) -> Iterator[ConfigError]:
    """One error for each of these keys that was set."""
    default = BalanceConfig()
    for name in names:
        if (value := getattr(balance, name)) != getattr(default, name):
            yield ConfigError(f"balance.{name}={value}: has no effect {where}. Set {remedy}, or leave it out.")
