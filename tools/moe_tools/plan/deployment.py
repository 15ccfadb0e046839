"""Deployments: a layout (mesh, redundancy, dispatch) as the runtime's own configuration; what fits, and its memory."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, cast

from moe_models.base import ModelConfig

from moe_runtime.config import DispatchName, EngineConfig, RuntimeConfig
from moe_runtime.dispatch.factory import buffer_bytes
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.engine.lockstep import LockstepLimits
from moe_runtime.errors import ConfigError, nearest_divisor
from moe_runtime.launch.compose import compose
from moe_runtime.launch.conflicts import conflicts
from moe_runtime.launch.graphs import graph_bytes, graphs_mode, lockstep_limits
from moe_runtime.launch.placing import num_local_slots
from moe_runtime.launch.shuffle import dispatch_names, dispatch_spec
from moe_runtime.launch.sizing import (
    cache_size,
    compute_dtype,
    expert_dtype,
    kept_weights,
    latent_row_bytes,
    page_size,
    rotary_bytes,
    weight_bytes,
)
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.parallel.placement import num_physical_experts
from moe_tools.plan.hardware import Machine
from moe_tools.plan.settings import PlanConfig

USABLE: Final = 0.92
"""Of a GPU's memory: the rest is left to CUDA's context, NCCL and what a step allocates on its way."""
_TWO_BATCH_DECODE_TOKENS: Final = EngineConfig().two_batch_decode_tokens
"""The launch's own, which no command need name"""
Rule = Literal["layout", "configuration", "memory", "prompts", "tpot_ms", "ttft_ms"]
"""What a layout breaks."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a layout cannot serve. `least`: what `rule` would have to allow (bytes, ms), where that helps."""

    rule: Rule
    reason: str
    least: float | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """One unit. `redundant`: expert slots beyond one per expert."""

    ep: int
    tp: int
    redundant: int
    dispatch: str

    @property
    def dp(self) -> int:
        return self.ep // self.tp

    def __str__(self) -> str:
        return f"ep={self.ep} tp={self.tp} dp={self.dp} +{self.redundant} {self.dispatch}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    cache: int
    dispatch: int
    other: int
    """Rotary table, captured steps"""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.dispatch + self.other


@dataclass(frozen=True)
class Deployment:
    """A layout with what the runtime makes of it."""

    layout: Layout
    config: RuntimeConfig
    model: ModelConfig
    machine: Machine

    @property
    def num_slots(self) -> int:
        """Of each rank."""
        return num_local_slots(self.config, self.model)

    @property
    def mesh(self) -> ProcessMesh:
        return ProcessMesh(dp=self.layout.dp, tp=self.layout.tp, ranks_per_node=self.config.ranks_per_node)

    @property
    def fp8(self) -> bool:
        """Whether experts are kept and multiplied in fp8."""
        return "experts" in kept_weights(self.config, self.model).parts

    @cached_property
    def spec(self) -> DispatchSpec:
        """For what its dispatch buffers are made. ConfigError where not one token fits."""
        return dispatch_spec(self.config, self.model)

    @cached_property
    def limits(self) -> LockstepLimits:
        """What its ranks agree within. ConfigError as `spec`."""
        return lockstep_limits(self.config, self.model, graphs=True)

    @cached_property
    def memory(self) -> Memory:
        """By the runtime's own sizing functions. ConfigError as `spec`."""
        config, model = self.config, self.model
        itemsize = compute_dtype(config, model).itemsize
        weights = weight_bytes(
            model,
            self.mesh,
            num_local_slots=self.num_slots,
            shared=config.shared_experts,
            itemsize=itemsize,
            expert_itemsize=expert_dtype(config, model).itemsize,
            kept=kept_weights(config, model),
        )
        cache = cache_size(config.engine, model, itemsize=itemsize, device=config.device)
        sizes = graphs_mode(config, model).sizes
        return Memory(
            weights=weights.total,
            cache=cache.num_bytes,
            dispatch=max(buffer_bytes(name, self.spec) for name in dispatch_names(config)),
            other=rotary_bytes(config.engine, model) + (graph_bytes(config, model, sizes) if sizes else 0),
        )

    def obstacle(self) -> Obstacle | None:
        """Why it cannot run on this machine, or None."""
        try:
            problem = next(conflicts(self.config, self.model, has_weights=False), None)
            if problem is not None:
                return Obstacle("configuration", str(problem))
            need, room = self.memory.total, int(USABLE * self.machine.memory_bytes)
        except ConfigError as error:
            return Obstacle("configuration", str(error))
        if need <= room:
            return None
        return Obstacle("memory", f"needs {need / 1e9:.4g} GB of {room / 1e9:.4g} usable", need)

    def words(self, *, placement_file: str | None = None) -> tuple[str, ...]:
        """The launch's own words for it."""
        config, engine = self.config, self.config.engine
        words = [
            f"model={config.model}",
            "device=cuda",
            f"ep={config.ep}",
            f"tp={config.tp}",
            f"dispatch={config.dispatch}",
            f"shared_experts={config.shared_experts}",
            f"placement.num_redundant_experts={config.placement.num_redundant_experts}"
            if placement_file is None
            else f"placement.file={placement_file}",
            f"placement.replica_choice={config.placement.replica_choice}",
            f"engine.max_num_seqs={engine.max_num_seqs}",
            f"engine.max_num_batched_tokens={engine.max_num_batched_tokens}",
            f"engine.max_model_len={engine.max_model_len}",
            f"engine.kv_cache_bytes={engine.kv_cache_bytes}",
        ]
        if engine.kv_cache_dtype != "auto":
            words.append(f"engine.kv_cache_dtype={engine.kv_cache_dtype}")
        if engine.dispatch_buffer_bytes is not None:
            words.append(f"engine.dispatch_buffer_bytes={engine.dispatch_buffer_bytes}")
        if engine.two_batch_decode_tokens != _TWO_BATCH_DECODE_TOKENS:
            words.append(f"engine.two_batch_decode_tokens={engine.two_batch_decode_tokens}")
        if config.ranks_per_node != self.machine.host_ranks:
            words.append(f"ranks_per_node={config.ranks_per_node}")
        return tuple(words)

    def command(self, *, placement_file: str | None = None) -> str:
        """The command line of its unit."""
        hosts = -(-self.layout.ep // self.machine.host_ranks)
        processes = min(self.layout.ep, self.machine.host_ranks)
        words = [shlex.quote(word) for word in self.words(placement_file=placement_file)]
        several = f" --nnodes {hosts} --rdzv-endpoint HOST:29500" if hosts > 1 else ""
        return f"torchrun --nproc-per-node {processes}{several} -m moe_runtime {' '.join(words)}"


def base_config(plan: PlanConfig, machine: Machine) -> tuple[RuntimeConfig, ModelConfig]:
    """The runtime's configuration of the model on GPUs, before any layout. ConfigError for an unknown model."""
    words = [
        f"model={plan.model}",
        "device=cuda",
        "launcher=process",
        f"shared_experts={plan.shared_experts}",
        f"placement.replica_choice={plan.replica_choice}",
        f"engine.kv_cache_dtype={plan.kv_cache_dtype}",
        f"engine.dispatch_buffer_bytes={plan.dispatch_buffer_bytes or 'null'}",
        f"ranks_per_node={machine.nvlink_ranks}",
    ]
    if plan.two_batch_decode_tokens is not None:
        words.append(f"engine.two_batch_decode_tokens={plan.two_batch_decode_tokens}")
    composed = compose(words, report=lambda _: None)
    if not composed.model.moe_layers:
        raise ConfigError(f"model={plan.model}: has no layers with experts. Give an MoE model.")
    total = plan.prompt_tokens + plan.output_tokens
    if total > composed.model.max_position_embeddings:
        most = composed.model.max_position_embeddings
        longer = max(("prompt_tokens", "output_tokens"), key=lambda name: int(getattr(plan, name)))
        near = int(getattr(plan, longer)) - (total - most)
        remedy = f"{longer}={near}" if near > 0 else f"prompt_tokens={most - most // 3}, output_tokens={most // 3}"
        raise ConfigError(
            f"prompt_tokens={plan.prompt_tokens}, output_tokens={plan.output_tokens}: together {total}, and the model "
            f"holds {most}. Nearest: {remedy}."
        )
    return composed.config, composed.model


def deploy(
    layout: Layout, plan: PlanConfig, base: RuntimeConfig, model: ModelConfig, machine: Machine, *,
    batch: int, batched_tokens: int,
) -> Deployment:  # fmt: skip
    """`layout` with room for `batch` whole requests in each DP group and steps of `batched_tokens` tokens.

    ConfigError (from the runtime) where it is none.
    """
    length = plan.prompt_tokens + plan.output_tokens
    config = replace(
        base,
        ep=layout.ep,
        tp=layout.tp,
        dp=layout.dp,
        dispatch=cast(DispatchName, layout.dispatch),
        decode_dispatch=None,
        placement=replace(base.placement, num_redundant_experts=layout.redundant),
    )
    size = page_size(config.engine, device=config.device)
    itemsize = compute_dtype(config, model).itemsize
    per_token = model.num_layers * latent_row_bytes(config.engine, model, itemsize=itemsize)
    engine = replace(
        config.engine,
        max_num_seqs=batch,
        max_num_batched_tokens=max(batched_tokens, batch),
        max_model_len=max(2, length),
        kv_cache_bytes=batch * -(-length // size) * size * per_token,
    )
    return Deployment(layout, replace(config, engine=engine), model, machine)


def layouts(plan: PlanConfig, model: ModelConfig, *, num_logical: int) -> Iterator[tuple[Layout, Obstacle | None]]:
    """Every combination, with the reason where its mesh is none. `redundant` is what the slots then hold: all ranks
    have equally many, so 256 experts on 72 ranks have 32 copies whether asked for or not."""
    for ep in plan.ep:
        for tp in plan.tp:
            for redundant in plan.redundant:
                for dispatch in plan.dispatch:
                    if dispatch != "local" and ep == 1:
                        dispatch = "local"
                    slots = num_physical_experts(num_logical, ep=ep, num_redundant=redundant)
                    layout = Layout(ep, tp, slots - num_logical, dispatch)
                    yield layout, _mesh_problem(layout, model)


def _mesh_problem(layout: Layout, model: ModelConfig) -> Obstacle | None:
    for name, whole in ((f"ep={layout.ep}", layout.ep), (f"the model's {model.num_heads} heads", model.num_heads)):
        if whole % layout.tp:
            near = nearest_divisor(layout.tp, whole)
            return Obstacle("layout", f"tp={layout.tp} does not divide {name}. Nearest: tp={near}")
    return None
