"""Composition root: from a decided run to the engines of its ranks. One place knows all floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moe_models.base import ModelConfig
from moe_models.deepseek_v3.assembly import Assembly
from moe_models.registry import is_mtp_tensor, tensor_specs

from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.cache.pages import PagePool
from moe_runtime.comm.base import Communicator, Groups
from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.base import Dispatcher, Phase
from moe_runtime.dispatch.deferred import DeferredDispatcher
from moe_runtime.dispatch.factory import FABRICS, make_dispatcher
from moe_runtime.dispatch.phased import PhasedDispatcher
from moe_runtime.engine.engine import Leader, Owner, RankEngine
from moe_runtime.engine.graphs import ProcessGraphs, RankGraphs
from moe_runtime.engine.lockstep import LockstepLimits
from moe_runtime.engine.request import Request
from moe_runtime.engine.runner import Runner
from moe_runtime.engine.sampler import Sampler
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.sequence import SchedulerLimits, check_request
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.device import process_device
from moe_runtime.launch.env import deep_ep_holds_tensors
from moe_runtime.launch.graphs import Capture, lockstep_limits, process_graphs
from moe_runtime.launch.memory import enough_memory
from moe_runtime.launch.placing import expert_placement
from moe_runtime.launch.rebalancing import make_rebalancer, rebalances
from moe_runtime.launch.recording import make_recorder, make_recording
from moe_runtime.launch.shuffle import buffer_cap, dispatch_names, dispatch_spec, spec_of_each
from moe_runtime.launch.sizing import (
    CacheSize,
    cache_size,
    compute_dtype,
    expert_dtype,
    kept_weights,
    max_model_len,
    max_num_seqs,
)
from moe_runtime.layers.moe import MoELayer
from moe_runtime.loading.checkpoint import Checkpoint
from moe_runtime.loading.shard import check_tensors
from moe_runtime.loading.source import CheckpointSource
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One rank's layer is loaded; `num_bytes`: read from the checkpoint by this process so far.

    `captured_rows`: all layers are, and a decode step of so many rows was captured as a graph.
    """

    rank: int
    layer: int
    num_bytes: int
    captured_rows: int | None = None


OnProgress = Callable[[LoadProgress], None]

_WEIGHTS_REMEDY = (
    "Lower engine.kv_cache_bytes or placement.num_redundant_experts, raise ep, or spread the ranks over more GPUs."
)


@dataclass(frozen=True, slots=True)
class ProcessParts:
    """What the ranks of one process share. `notice`: what loading passes over or dequantises, one line, or None."""

    config: RuntimeConfig
    model: ModelConfig
    folder: Path
    source: CheckpointSource
    placement: ExpertPlacement
    cache: CacheSize
    dtype: torch.dtype
    device: torch.device
    notice: str | None
    num_read_bytes: Callable[[], int]

    @classmethod
    def open(cls, composed: Composed, *, ranks_in_process: int, local_rank: int = 0) -> ProcessParts:
        """Check configuration and checkpoint against each other, from headers alone; nothing is loaded yet.

        `local_rank`: this process's number among those of the machine, which decides its GPU.

        Raises ConfigError and CheckpointError.
        """
        config, model = composed.config, composed.model
        if not composed.has_weights:
            raise ConfigError(
                f"model={config.model}: a shape without weights, for job=doctor. "
                "Give a checkpoint folder, or model=demo."
            )
        dtype, device = compute_dtype(config, model), process_device(config.device, local_rank=local_rank)
        placement = expert_placement(config, model)
        checkpoint = Checkpoint.open(composed.model_path)
        specs = tensor_specs(model)
        skipped = check_tensors(checkpoint, specs, skipped=partial(is_mtp_tensor, model))
        notice = "; ".join(filter(None, (skipped, kept_weights(config, model).notice))) or None
        count = _ByteCount()
        source = CheckpointSource(
            checkpoint, {spec.name: spec for spec in specs}, dtype=dtype, device=device, on_read=count.add
        )
        size = cache_size(
            config.engine,
            model,
            itemsize=dtype.itemsize,
            ranks_in_process=ranks_in_process,
            device=config.device,
        )
        return cls(
            config, model, composed.model_path, source, placement, size, dtype, device, notice, lambda: count.total
        )

    @property
    def scheduler_limits(self) -> SchedulerLimits:
        engine = self.config.engine
        return SchedulerLimits(
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=max_num_seqs(engine),
            max_model_len=max_model_len(engine, self.model),
            vocab_size=self.model.vocab_size,
            eos_token_ids=self.model.eos_token_ids,
        )

    def check_request(self, request: Request) -> None:
        """RequestError where the request could never run."""
        check_request(request, self.scheduler_limits, num_pages=self.cache.num_pages, page_size=self.cache.page_size)


class _ByteCount:
    def __init__(self) -> None:
        self.total = 0

    def add(self, count: int) -> None:
        self.total += count


def build_engine(
    parts: ProcessParts,
    mesh: ProcessMesh,
    groups: Groups,
    *,
    owner: Owner | None,
    capture: Capture | None = None,
    on_progress: OnProgress = lambda _: None,
) -> RankEngine:
    """The engine of one rank, its weights loaded; `owner` on world rank 0. No communication takes place.

    `capture`: where decode steps run as graphs (`capture_graphs`); `RankEngine.prepare` captures them.
    """
    config, model, engine = parts.config, parts.model, parts.config.engine
    recorder = make_recorder(config, model, parts.device)
    dispatcher = _dispatcher(parts, groups.ep)
    choice = ReplicaChoice(config.placement.replica_choice)
    assembly = Assembly(
        config=model,
        mesh=mesh,
        groups=groups,
        source=parts.source,
        placement=parts.placement,
        selector=parts.placement.selector(
            mesh.ep_rank,
            choice=choice,
            ranks_per_node=mesh.ranks_per_node,
            device=parts.device,
            rewritable=rebalances(config),
        ),
        dispatcher=dispatcher,
        recorder=recorder,
        shared_experts=config.shared_experts,
        batch_invariant=engine.batch_invariant,
        expert_dtype=expert_dtype(config, model),
        max_model_len=max_model_len(engine, model),
        kept_fp8=kept_weights(config, model),
    )
    with enough_memory(parts.device, f"ep={config.ep}: the weights of rank {mesh.rank}", remedy=_WEIGHTS_REMEDY):
        weights = assembly.build(lambda layer: on_progress(LoadProgress(mesh.rank, layer, parts.num_read_bytes())))
        rebalancer = make_rebalancer(
            config,
            model,
            groups.ep,
            [block.ffn.experts for block in weights.blocks if isinstance(block.ffn, MoELayer)],
            selector=assembly.selector,
            recorder=recorder,
            placement=parts.placement,
            spec=dispatch_spec(config, model, num_slots=parts.placement.num_local),
        )
    cache = _cache(parts, mesh.rank)
    heads = model.num_heads // mesh.tp
    runner = Runner(weights, cache, mesh.tp, mesh.tp_rank, engine.batch_invariant, parts.device, heads)
    limits = lockstep_limits(config, model, graphs=capture is not None, num_slots=parts.placement.num_local)
    return RankEngine(
        groups=groups,
        runner=runner,
        recorder=recorder,
        limits=limits,
        leader=_leader(parts, owner) if mesh.tp_rank == 0 else None,
        graphs=_graphs(parts, capture, runner, limits, samples=mesh.tp_rank == 0),
        fabric=dispatcher if isinstance(dispatcher, DeferredDispatcher) else None,
        rebalancer=rebalancer,
        recording=make_recording(
            config, model, groups.ep, recorder, placement=parts.placement, owns=owner is not None, rebalancer=rebalancer
        ),
    )


def _dispatcher(parts: ProcessParts, ep: Communicator) -> Dispatcher[Any]:
    """One for all layers. A fabric's buffers are made when it is opened, outside of every capture."""
    config, names = parts.config, dispatch_names(parts.config)
    spec = dispatch_spec(config, parts.model, num_slots=parts.placement.num_local)
    each = tuple(zip(names, spec_of_each(names, spec), strict=True))
    what = f"dispatch={' and '.join(names)}: buffers of up to {buffer_cap(config)} bytes on rank {ep.rank}"

    def make() -> Dispatcher[Any]:
        if "deep_ep" in names:
            deep_ep_holds_tensors()
        with enough_memory(parts.device, what, remedy="Lower engine.dispatch_buffer_bytes or engine.kv_cache_bytes."):
            made = [make_dispatcher(name, ep, its, device=parts.device) for name, its in each]
        return made[0] if len(made) == 1 else PhasedDispatcher(*made)

    return DeferredDispatcher(make) if set(names) & set(FABRICS) else make()


def _cache(parts: ProcessParts, rank: int) -> LatentKVCache:
    """All pages of one rank."""
    model, size = parts.model, parts.cache
    asked = parts.config.engine.kv_cache_bytes
    held = f"rank {rank}'s latent cache of {size.num_bytes} bytes"
    remedy = "Lower engine.kv_cache_bytes, or spread the ranks over more GPUs."
    with enough_memory(parts.device, f"engine.kv_cache_bytes={asked or 'null'}: {held}", remedy=remedy):
        return LatentKVCache.zeros(
            model.num_layers,
            num_pages=size.num_pages,
            page_size=size.page_size,
            latent=model.kv_lora_rank,
            rope=model.qk_rope_head_dim,
            dtype=parts.dtype,
            device=parts.device,
            fp8=parts.config.engine.kv_cache_dtype == "fp8",
        )


def capture_graphs(parts: ProcessParts, rank: int, on_progress: OnProgress) -> ProcessGraphs | None:
    """What captures this process's decode steps, told to `on_progress` as `rank`; None where they run without."""

    def on_captured(rows: int) -> None:
        on_progress(LoadProgress(rank, parts.model.num_layers, parts.num_read_bytes(), rows))

    return process_graphs(parts.config, parts.model, parts.device, on_captured)


def _graphs(
    parts: ProcessParts,
    capture: Capture | None,
    runner: Runner,
    limits: LockstepLimits,
    *,
    samples: bool,
) -> RankGraphs | None:
    if capture is None:
        return None
    length = max_model_len(parts.config.engine, parts.model)
    return RankGraphs(
        capture.process,
        capture.together,
        runner,
        max_model_len=length,
        keeps_logits=samples,
        num_micro_batches=partial(limits.num_micro_batches, phase=Phase.DECODE),
    )


def _leader(parts: ProcessParts, owner: Owner | None) -> Leader:
    pool = PagePool(parts.cache.num_pages, parts.cache.page_size, prefix_caching=parts.config.engine.prefix_caching)
    return Leader(Scheduler(parts.scheduler_limits, pool), Sampler(parts.config.seed, parts.model.eos_token_ids), owner)
