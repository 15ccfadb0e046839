"""What a configuration and a model cannot do together; each with the nearest valid value."""

from __future__ import annotations

import os
from collections.abc import Iterator

from moe_models.base import ModelConfig

from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.launch.placing import expert_placement, num_dispatched_shared
from moe_runtime.launch.sizing import (
    cache_size,
    compute_dtype,
    dispatch_bytes,
    format_bytes,
    max_model_len,
    process_bytes,
)


def conflicts(config: RuntimeConfig, model: ModelConfig, *, has_weights: bool) -> Iterator[ConfigError]:
    """Every conflict, found without loading anything. `has_weights`: whether the model could be run."""
    if not model.moe_layers:
        yield ConfigError("model: has no layers with experts (first_k_dense_replace covers all). Give an MoE model.")
        return
    if config.shared_experts == "dispatched" and not model.n_shared_experts:
        yield ConfigError("shared_experts=dispatched: the model has no shared experts. Set shared_experts=replicated.")
    if config.dispatch == "local" and config.ep > 1:
        yield ConfigError(
            f"dispatch=local: reaches the experts of one rank, and ep={config.ep}. Set dispatch=all_to_all."
        )
    yield from _placement(config, model)
    yield from _lengths(config, model)
    yield from _memory(config, model, has_weights=has_weights)


def _placement(config: RuntimeConfig, model: ModelConfig) -> Iterator[ConfigError]:
    if config.placement.file is None:
        return
    if config.placement.num_redundant_experts:
        yield ConfigError(
            f"placement.num_redundant_experts={config.placement.num_redundant_experts}: placement.file decides "
            "the copies. Set placement.num_redundant_experts=0 or leave the file out."
        )
    try:
        expert_placement(config, model)
    except ConfigError as error:
        yield error


def _lengths(config: RuntimeConfig, model: ModelConfig) -> Iterator[ConfigError]:
    engine, sampling, limit = config.engine, config.sampling, model.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > limit:
        yield ConfigError(
            f"engine.max_model_len={engine.max_model_len}: the model was made for at most {limit} positions. "
            f"Nearest: engine.max_model_len={limit}."
        )
    length = min(limit, max_model_len(engine, model))
    if sampling.max_tokens >= length:
        yield ConfigError(
            f"sampling.max_tokens={sampling.max_tokens}: at most {length - 1} fit into {length} positions "
            f"beside a prompt. Nearest: sampling.max_tokens={length - 1}."
        )
    if sampling.min_tokens > sampling.max_tokens:
        yield ConfigError(
            f"sampling.min_tokens={sampling.min_tokens}: must be at most sampling.max_tokens={sampling.max_tokens}. "
            f"Nearest: sampling.min_tokens={sampling.max_tokens}."
        )
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        yield ConfigError(
            f"engine.max_num_batched_tokens={engine.max_num_batched_tokens}: must hold one token of each of "
            f"engine.max_num_seqs={engine.max_num_seqs} sequences. "
            f"Nearest: engine.max_num_seqs={engine.max_num_batched_tokens}."
        )


def _memory(config: RuntimeConfig, model: ModelConfig, *, has_weights: bool) -> Iterator[ConfigError]:
    itemsize = compute_dtype(config, model).itemsize
    cap = config.engine.dispatch_buffer_bytes
    one = dispatch_bytes(config, model, tokens=1, itemsize=itemsize)
    if one > cap:
        yield ConfigError(
            f"engine.dispatch_buffer_bytes={cap}: a rank may receive {one} bytes when each of ep={config.ep} ranks "
            f"sends one token to top-{model.num_experts_per_tok + num_dispatched_shared(config, model)} experts. "
            f"Nearest: engine.dispatch_buffer_bytes={one}."
        )
    # A shape without weights stands for real ranks, whatever launcher would be chosen here.
    ranks = config.ep if has_weights and config.launcher == "virtual" else 1
    try:
        cache_size(config.engine, model, itemsize=itemsize, ranks_in_process=ranks)
    except ConfigError as error:
        yield error
        return
    needed, there = process_bytes(config, model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if has_weights and config.device == "cpu" and config.launcher == "virtual" and needed > there:
        yield ConfigError(
            f"launcher=virtual: {config.ep} ranks in one process need {format_bytes(needed)} for weights and cache, "
            f"and this machine has {format_bytes(there)}. Lower ep, placement.num_redundant_experts or "
            "engine.kv_cache_bytes."
        )
