"""What a configuration and a model cannot do together; each with the nearest valid value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from moe_models.base import ModelConfig

from moe_runtime.config import PlacementConfig, RuntimeConfig
from moe_runtime.dispatch.factory import SPLITTING, obstacle
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.engine.request import SamplingParams
from moe_runtime.errors import ConfigError, RequestError
from moe_runtime.launch.graphs import graphs_mode
from moe_runtime.launch.placing import num_local_slots, num_logical_experts
from moe_runtime.launch.process_size import process_bytes
from moe_runtime.launch.rebalancing import rebalance_conflicts
from moe_runtime.launch.recording import recording_conflicts
from moe_runtime.launch.shuffle import dispatch_names, dispatch_spec, splits_combine, summed_by_rank, whole_spec
from moe_runtime.launch.sizing import (
    cache_size,
    compute_dtype,
    format_bytes,
)


def conflicts(config: RuntimeConfig, model: ModelConfig, *, has_weights: bool) -> Iterator[ConfigError]:
    """Every conflict, found without loading anything. `has_weights`: whether the model could be run."""
    if not model.moe_layers:
        yield ConfigError("model: has no layers with experts (first_k_dense_replace covers all). Give an MoE model.")
        return
    if config.shared_experts == "dispatched" and not model.n_shared_experts:
        yield ConfigError("shared_experts=dispatched: the model has no shared experts. Set shared_experts=replicated.")
    if has_weights:
        yield from _device(config)
    yield from _sampling(config)
    yield from _lengths(config, model)
    if config.placement.file is not None and config.placement.num_redundant_experts:
        yield ConfigError(
            f"placement.num_redundant_experts={config.placement.num_redundant_experts}: placement.file decides "
            "the copies. Set placement.num_redundant_experts=0 or leave the file out."
        )
    try:
        slots = num_local_slots(config, model)
    except ConfigError as error:
        yield error
        slots = num_local_slots(replace(config, placement=PlacementConfig()), model)  # to look for further problems
    yield from _dispatch(config, model, slots, has_weights=has_weights)
    spec = whole_spec(config, model, num_slots=slots)
    yield from _invariance(config, spec, copies=config.ep * slots - num_logical_experts(config, model))
    yield from rebalance_conflicts(config, model, spec)
    yield from _parts(config, slots)
    yield from _memory(config, model, slots, has_weights=has_weights)
    yield from _graphs(config, model)
    yield from recording_conflicts(config, model, has_weights=has_weights)


def _device(config: RuntimeConfig) -> Iterator[ConfigError]:
    if config.device == "cuda" and not torch.cuda.is_available():
        yield ConfigError("device=cuda: this machine or this torch build has no CUDA device. Set device=cpu.")


def _dispatch(config: RuntimeConfig, model: ModelConfig, slots: int, *, has_weights: bool) -> Iterator[ConfigError]:
    """A shape without weights may name a backend that this machine lacks: only its limits count."""
    spec, device = whole_spec(config, model, num_slots=slots), torch.device(config.device)
    for key, name in (("dispatch", config.dispatch), ("decode_dispatch", config.decode_dispatch)):
        if name == "auto" or (key == "decode_dispatch" and name is None):
            continue
        virtual = config.launcher == "virtual"
        missing = obstacle(str(name), spec, device=device, virtual=virtual, limits_only=not has_weights)
        if missing is not None:
            remedy = missing.remedy.replace("dispatch=all_to_all", f"{key}=all_to_all")
            yield ConfigError(f"{key}={name}: {missing.reason}. {remedy}.")


def _invariance(config: RuntimeConfig, spec: DispatchSpec, *, copies: int) -> Iterator[ConfigError]:
    """`copies`: slots beyond one of each expert."""
    names, by_rank = dispatch_names(config), summed_by_rank(config, spec)
    if not config.engine.batch_invariant or not by_rank:
        return
    if copies and config.ep > 1:
        logical = config.ep * spec.rows.num_slots - copies
        yield ConfigError(
            f"dispatch={by_rank[0]} with engine.batch_invariant=true and {copies} copies of experts (ep={config.ep} "
            f"ranks of {spec.rows.num_slots} slots, {logical} experts): it sums by rank, and which copy serves a token "
            "follows from its home. Set dispatch=all_to_all, or place each expert once (an ep that divides "
            f"{logical}, placement.num_redundant_experts=0)."
        )
    if len(names) > 1:
        yield ConfigError(
            f"decode_dispatch={names[1]} with dispatch={names[0]}: they round in their own ways, and under "
            "engine.batch_invariant a token's bits must not tell its step's mates. Leave decode_dispatch out."
        )


def _parts(config: RuntimeConfig, slots: int) -> Iterator[ConfigError]:
    if not splits_combine(config):
        return
    name, asked = dispatch_names(config)[0], "engine.single_batch_overlap=on"
    if name not in SPLITTING:
        yield ConfigError(
            f"{asked}: dispatch={name} {'sends nothing' if name == 'local' else 'brings all outputs home at once'}. "
            f"Set dispatch={' or '.join(SPLITTING)}, or engine.single_batch_overlap=auto."
        )
    if slots < 2:
        remedy = f"Lower ep to {config.ep // 2} or less" if config.ep > 1 else "Add placement.num_redundant_experts"
        yield ConfigError(
            f"{asked}: with ep={config.ep} a rank has one expert slot, and two parts need two. {remedy}, or set "
            "engine.single_batch_overlap=auto."
        )


def _graphs(config: RuntimeConfig, model: ModelConfig) -> Iterator[ConfigError]:
    try:
        graphs_mode(config, model)
    except ConfigError as error:
        if str(error).startswith("engine.cuda_graph"):  # others are problems of their own
            yield error


def _sampling(config: RuntimeConfig) -> Iterator[ConfigError]:
    try:
        SamplingParams(**asdict(config.sampling))
    except RequestError as error:
        yield ConfigError(f"sampling.{error}")


def _lengths(config: RuntimeConfig, model: ModelConfig) -> Iterator[ConfigError]:
    asked, limit = config.engine.max_model_len, model.max_position_embeddings
    if asked is not None and asked > limit:
        yield ConfigError(
            f"engine.max_model_len={asked}: the model was made for at most {limit} positions. "
            f"Nearest: engine.max_model_len={limit}."
        )


def _memory(
    config: RuntimeConfig, model: ModelConfig, num_local_slots: int, *, has_weights: bool
) -> Iterator[ConfigError]:
    itemsize = compute_dtype(config, model).itemsize
    try:
        dispatch_spec(config, model, num_slots=num_local_slots)
    except ConfigError as error:
        yield error
    # A shape without weights stands for real ranks, whatever launcher would be chosen here.
    ranks = config.ep if has_weights and config.launcher == "virtual" else 1
    try:
        cache_size(config.engine, model, itemsize=itemsize, ranks_in_process=ranks, device=config.device)
    except ConfigError as error:
        yield error
        return
    if not has_weights or config.device != "cpu" or config.launcher == "torchrun":
        return
    processes = config.ep if config.launcher == "process" else 1
    needed = processes * process_bytes(config, model, num_local_slots=num_local_slots)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        place = f"{config.ep} ranks in one process" if processes == 1 else f"{processes} processes"
        yield ConfigError(
            f"launcher={config.launcher}: {place} need {format_bytes(needed)} for weights and cache, "
            f"and this machine has {format_bytes(there)}. Lower ep, placement.num_redundant_experts or "
            "engine.kv_cache_bytes."
        )
