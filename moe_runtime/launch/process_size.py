"""How many bytes a process holds, what experts need to move and routes to be noted included. Nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from moe_models.base import ModelConfig

from moe_runtime.balance.moves import ROW_BYTES, rows_per_step
from moe_runtime.config import RuntimeConfig
from moe_runtime.engine.mover import numbers_of_digest
from moe_runtime.launch.recording import route_bytes
from moe_runtime.launch.sizing import (
    cache_size,
    compute_dtype,
    expert_dtype,
    kept_weights,
    slot_bytes,
    weight_bytes,
)
from moe_runtime.parallel.mesh import ProcessMesh


@dataclass(frozen=True, slots=True)
class StagingBytes:
    """What one rank holds so that experts can move while it serves."""

    slots: int
    """One layer's slots more"""
    scratch: int
    """One slot, by way of which two are exchanged"""
    exchange: int
    """What is sent and what is received between two steps; half of it each way"""
    digests: int

    @property
    def total(self) -> int:
        return self.slots + self.scratch + self.exchange + self.digests


def staging_bytes(config: RuntimeConfig, model: ModelConfig, *, num_local_slots: int) -> StagingBytes | None:
    """None where no expert moves. Large slots that a CPU packs are made anew when a layer commits: up to one layer's
    slots more, for that moment."""
    if config.balance.rebalance == "off":
        return None
    slot = slot_bytes(config, model)
    rows = rows_per_step(config.balance.bytes_per_step, slot_bytes=slot, num_local=num_local_slots)
    num_parts = 4 if "experts" in kept_weights(config, model).parts else 2
    return StagingBytes(
        slots=num_local_slots * slot,
        scratch=slot,
        exchange=2 * rows * ROW_BYTES,
        digests=(config.ep + 1) * num_local_slots * numbers_of_digest(num_parts) * 8,
    )


def process_bytes(config: RuntimeConfig, model: ModelConfig, *, num_local_slots: int) -> int:
    """Weights and cache of all ranks of one process: equal slices are held once; expert slots, caches, what experts
    need to move and the buffer for routes per rank."""
    itemsize = compute_dtype(config, model).itemsize
    ranks, tp = (config.ep, config.tp) if config.launcher == "virtual" else (1, 1)
    mesh = ProcessMesh(dp=config.dp, tp=config.tp, ranks_per_node=config.ranks_per_node)
    weights = weight_bytes(
        model,
        mesh,
        num_local_slots=num_local_slots,
        shared=config.shared_experts,
        itemsize=itemsize,
        expert_itemsize=expert_dtype(config, model).itemsize,
        batch_invariant=config.engine.batch_invariant,
        kept=kept_weights(config, model),
    )
    cache = cache_size(config.engine, model, itemsize=itemsize, ranks_in_process=ranks, device=config.device)
    split = weights.embedding + weights.attention
    staging = staging_bytes(config, model, num_local_slots=num_local_slots)
    own = weights.experts + cache.num_bytes + route_bytes(config, model) + (0 if staging is None else staging.total)
    return weights.total - weights.experts - split + tp * split + ranks * own
