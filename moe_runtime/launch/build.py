"""Composition root: from a decided run to the engines of its ranks. One place knows all floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from moe_models.base import ModelConfig
from moe_models.deepseek_v3.assembly import Assembly
from moe_models.registry import is_mtp_tensor, tensor_specs

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.cache.pages import PagePool
from moe_runtime.comm.base import Groups
from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.engine.engine import Leader, Owner, RankEngine
from moe_runtime.engine.lockstep import LockstepLimits, Padding
from moe_runtime.engine.request import Request
from moe_runtime.engine.runner import Runner
from moe_runtime.engine.sampler import Sampler
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.sequence import SchedulerLimits, check_request
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.device import process_device
from moe_runtime.launch.placing import expert_placement, num_logical_experts
from moe_runtime.launch.sizing import (
    CacheSize,
    cache_size,
    compute_dtype,
    dispatch_bytes,
    expert_dtype,
    max_model_len,
    max_num_seqs,
)
from moe_runtime.loading.checkpoint import Checkpoint
from moe_runtime.loading.shard import check_tensors
from moe_runtime.loading.source import CheckpointSource
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One rank's layer is loaded; `num_bytes`: read from the checkpoint by this process so far."""

    rank: int
    layer: int
    num_bytes: int


OnProgress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class ProcessParts:
    """What the ranks of one process share. `notice`: what loading passed over, one line, or None."""

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
        notice = check_tensors(checkpoint, specs, skipped=partial(is_mtp_tensor, model))
        count = _ByteCount()
        source = CheckpointSource(
            checkpoint, {spec.name: spec for spec in specs}, dtype=dtype, device=device, on_read=count.add
        )
        size = cache_size(config.engine, model, itemsize=dtype.itemsize, ranks_in_process=ranks_in_process)
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
    on_progress: OnProgress = lambda _: None,
) -> RankEngine:
    """The engine of one rank, its weights loaded; `owner` on world rank 0. No communication takes place."""
    config, model, engine = parts.config, parts.model, parts.config.engine
    logical = num_logical_experts(config, model)
    recorder = LoadRecorder(len(model.moe_layers), logical, device=parts.device)
    rows = RowLayout(parts.placement.num_local)
    dispatcher = make_dispatcher(config.dispatch, groups.ep, rows=rows, device=parts.device)
    choice = ReplicaChoice(config.placement.replica_choice)
    assembly = Assembly(
        config=model,
        mesh=mesh,
        groups=groups,
        source=parts.source,
        placement=parts.placement,
        selector=parts.placement.selector(
            mesh.ep_rank, choice=choice, ranks_per_node=mesh.ranks_per_node, device=parts.device
        ),
        dispatcher=dispatcher,
        recorder=recorder,
        shared_experts=config.shared_experts,
        batch_invariant=engine.batch_invariant,
        expert_dtype=expert_dtype(config, model),
        max_model_len=max_model_len(engine, model),
    )
    weights = assembly.build(lambda layer: on_progress(LoadProgress(mesh.rank, layer, parts.num_read_bytes())))
    cache = LatentKVCache.zeros(
        model.num_layers,
        num_pages=parts.cache.num_pages,
        page_size=parts.cache.page_size,
        width=model.latent_dim,
        dtype=parts.dtype,
        device=parts.device,
    )
    one_token = dispatch_bytes(
        config, model, num_local_slots=parts.placement.num_local, tokens=1, itemsize=parts.dtype.itemsize
    )
    return RankEngine(
        groups=groups,
        runner=Runner(weights, cache, mesh.tp, mesh.tp_rank, engine.batch_invariant, parts.device),
        recorder=recorder,
        limits=LockstepLimits(
            tp=mesh.tp,
            padding=Padding(engine.padding),
            receive_bytes_per_token=one_token,
            receive_bytes_cap=engine.dispatch_buffer_bytes,
            max_capacity=dispatcher.capabilities.max_capacity,
        ),
        leader=_leader(parts, owner) if mesh.tp_rank == 0 else None,
    )


def _leader(parts: ProcessParts, owner: Owner | None) -> Leader:
    pool = PagePool(parts.cache.num_pages, parts.cache.page_size, prefix_caching=parts.config.engine.prefix_caching)
    return Leader(Scheduler(parts.scheduler_limits, pool), Sampler(parts.config.seed, parts.model.eos_token_ids), owner)
