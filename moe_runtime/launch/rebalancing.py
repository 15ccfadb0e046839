"""Live rebalancing as a configuration asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from moe_models.base import ModelConfig
from torch import Tensor

from moe_runtime.balance.decision import Terms
from moe_runtime.balance.planner import plan_placement
from moe_runtime.comm.base import Communicator
from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Counts, Rules
from moe_runtime.errors import ConfigError
from moe_runtime.launch.shuffle import summed_by_rank
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
    activation_bytes: int,
) -> Rebalancer | None:
    """One rank's; None where the run does without. `experts`: of every MoE layer; `activation_bytes`: of one number of
    a row. Takes device memory for one layer's slots."""
    if not rebalances(config):
        return None
    assert recorder is not None, "rebalance_conflicts wants loads to be counted"
    balance, mover = config.balance, Mover(ep, experts)
    terms = Terms(
        threshold=balance.threshold,
        horizon_steps=balance.interval_steps,
        row_bytes=2 * model.hidden_size * activation_bytes,
        slot_bytes=mover.slot_bytes,
        bytes_per_step=balance.bytes_per_step,
        ranks_per_node=config.ranks_per_node,
    )
    return Rebalancer(
        ep,
        mover,
        selector,
        recorder,
        placement,
        partial(_plan, config, model),
        Rules(balance.interval_steps, balance.deadline_s, terms, partial(_save, balance.save_placement)),
    )


def rebalance_conflicts(config: RuntimeConfig, spec: DispatchSpec) -> Iterator[ConfigError]:
    """What the keys of live rebalancing cannot do together with others."""
    balance = config.balance
    if balance.save_placement is not None:
        folder = Path(balance.save_placement).absolute().parent
        if not rebalances(config):
            yield ConfigError(
                f"balance.save_placement={balance.save_placement!r}: no placement changes with balance.rebalance=off. "
                "Set balance.rebalance=on, or leave it out."
            )
        elif not folder.is_dir():
            yield ConfigError(
                f"balance.save_placement={balance.save_placement!r}: there is no folder {str(folder)!r}. Make it first."
            )
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


def _plan(
    config: RuntimeConfig, model: ModelConfig, loads: Tensor, now: ExpertPlacement, budget: int | None
) -> ExpertPlacement:
    """Groups hold routed experts only, so they say nothing where shared ones are dispatched too."""
    return plan_placement(
        loads,
        ep=now.ep,
        ranks_per_node=config.ranks_per_node,
        num_groups=model.n_group if now.num_logical == model.n_routed_experts else None,
        num_redundant=now.num_physical - now.num_logical,
        policy=config.balance.policy,
        previous=now,
        move_budget=budget if config.balance.policy == "best" else None,  # eplb plans from nothing
    )


def _save(path: str | None, placement: ExpertPlacement) -> None:
    """Whole or not at all."""
    if path is None:
        return
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(placement.to_json(), encoding="utf-8")
    unfinished.replace(path)
