"""Live rebalancing as a configuration asks for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from moe_kernels.scaled import num_blocks
from moe_models.base import ModelConfig

from moe_runtime.balance.decision import Terms
from moe_runtime.balance.files import not_writable, write_atomic
from moe_runtime.balance.moves import ROW_BYTES, rows_of
from moe_runtime.comm.base import Communicator
from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.factory import FABRICS
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Counts, Rules
from moe_runtime.errors import ConfigError
from moe_runtime.launch.planning import PlanRule, decide_apart
from moe_runtime.launch.recording import without_effect
from moe_runtime.launch.shuffle import dispatch_names, summed_by_rank
from moe_runtime.launch.sizing import FP32_BYTES, format_bytes, slot_bytes
from moe_runtime.layers.experts import Experts
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaSelector


def rebalances(config: RuntimeConfig) -> bool:
    """Whether experts move while the run serves."""
    return config.balance.rebalance == "on"


def make_rebalancer(
    config: RuntimeConfig,
    model: ModelConfig,
    ep: Communicator,
    experts: Sequence[Experts],
    *,
    selector: ReplicaSelector,
    recorder: Counts | None,
    placement: ExpertPlacement,
    spec: DispatchSpec,
) -> Rebalancer | None:
    """One rank's; None where the run does without. `experts`: of every MoE layer. Takes device memory for one layer's
    slots."""
    if not rebalances(config):
        return None
    assert recorder is not None, "rebalance_conflicts wants loads to be counted"
    balance, mover = config.balance, Mover(ep, experts, bytes_per_step=config.balance.bytes_per_step)
    terms = Terms(
        threshold=balance.threshold,
        horizon_steps=balance.interval_steps,
        row_bytes=row_bytes(config, spec),
        slot_bytes=slot_bytes(config, model),
        bytes_per_step=balance.bytes_per_step,
        ranks_per_node=config.ranks_per_node,
    )
    return Rebalancer(
        ep,
        mover,
        selector=selector,
        recorder=recorder,
        placement=placement,
        decide=partial(decide_apart, rule=_rule(config, model, placement), terms=terms, within_s=balance.deadline_s),
        rules=Rules(
            balance.interval_steps,
            balance.deadline_s,
            terms,
            partial(_save, balance.save_placement),
            balance.window_steps,
        ),
    )


def row_bytes(config: RuntimeConfig, spec: DispatchSpec) -> int:
    """What a row costs the rank that serves it: its hidden values from another rank, in fp8 with scales where the
    dispatch sends them so, and its output there, of the share of rows that come from other ranks."""
    on_device = spec.rows.stays_on(torch.device(config.device)) or bool(set(dispatch_names(config)) & set(FABRICS))
    fp8 = on_device and spec.rows.quantize and spec.dtype is torch.bfloat16
    there = spec.hidden + num_blocks(spec.hidden) * FP32_BYTES if fp8 else spec.row_bytes
    return (there + spec.row_bytes) * (config.ep - 1) // config.ep


def rebalance_conflicts(config: RuntimeConfig, model: ModelConfig, spec: DispatchSpec) -> Iterator[ConfigError]:
    """What the keys of live rebalancing cannot do together with others."""
    balance = config.balance
    if not rebalances(config):
        names = ["interval_steps", "threshold", "bytes_per_step", "deadline_s"]
        where = "with balance.rebalance=off"
        yield from without_effect(balance, names, where=where, remedy="balance.rebalance=on")
    if balance.save_placement is not None:
        if not rebalances(config):
            yield ConfigError(
                f"balance.save_placement={balance.save_placement!r}: no placement changes with balance.rebalance=off. "
                "Set balance.rebalance=on, or leave it out."
            )
        elif (problem := not_writable(balance.save_placement)) is not None:
            yield ConfigError(f"balance.save_placement={balance.save_placement!r}: {problem}")
    if not rebalances(config):
        return
    if config.ep == 1:
        yield ConfigError("balance.rebalance=on: ep=1 has no other rank to move experts to. Raise ep, or set it off.")
    if balance.record == "off":
        yield ConfigError(
            "balance.rebalance=on with balance.record=off: moves follow from recorded loads. Set balance.record=stat."
        )
    if config.engine.batch_invariant and (by_rank := summed_by_rank(config, spec)):
        yield ConfigError(
            f"balance.rebalance=on with engine.batch_invariant=true: dispatch={by_rank[0]} sums by rank, so bits would "
            f"tell when an expert moved. Set dispatch=all_to_all, or one of the two off."
        )
    if balance.threshold <= 1 / config.ep < 1:
        nearest = math.floor(100 / config.ep + 1) / 100
        yield ConfigError(
            f"balance.threshold={balance.threshold:g}: ep={config.ep} ranks are always busy for 1/{config.ep} of "
            f"the time or more, so nothing would ever move. Nearest: balance.threshold={nearest:g}."
        )
    yield from _too_slow(config, model)


def _too_slow(config: RuntimeConfig, model: ModelConfig) -> Iterator[ConfigError]:
    """A move pays only if it is through before the next decision: one slot must be, at the least."""
    balance, size = config.balance, slot_bytes(config, model)
    rows, each = rows_of(size), balance.bytes_per_step // ROW_BYTES
    if -(-rows // each) >= balance.interval_steps:
        steps = max(1, balance.interval_steps - 1)
        yield ConfigError(
            f"balance.bytes_per_step={balance.bytes_per_step}, balance.interval_steps={balance.interval_steps}: an "
            f"expert of {format_bytes(size)} takes {-(-rows // each)} steps, and must be there before the next "
            f"decision. Nearest: balance.bytes_per_step={-(-rows // steps) * ROW_BYTES}"
            f"{'' if balance.interval_steps > 1 else ' with balance.interval_steps=2'}, or "
            f"balance.interval_steps={-(-rows // each) + 1}."
        )


def _rule(config: RuntimeConfig, model: ModelConfig, placement: ExpertPlacement) -> PlanRule:
    """Groups hold routed experts only, so they say nothing where shared ones are dispatched too."""
    groups = model.n_group if placement.num_logical == model.n_routed_experts else None
    return PlanRule(config.balance.policy, config.ranks_per_node, groups)


def _save(path: str | None, placement: ExpertPlacement) -> None:
    """Whole or not at all, and on disk when it returns. OSError where the disk refuses."""
    if path is not None:
        write_atomic(Path(path), placement.to_json().encode(), fsync=True)
