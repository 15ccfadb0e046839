"""How many bytes a rank holds, from the configuration alone. Nothing is loaded.

H hidden, I expert width, E routed experts, S shared ones, C latent rank, v vocabulary rows of a tp rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from moe_kernels import backends
from moe_kernels.scaled import num_blocks
from moe_models.base import ModelConfig
from moe_models.kept_fp8 import KeptFp8, Part, kept_fp8

from moe_runtime.config import EngineConfig, RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.layers.embedding import vocab_shard
from moe_runtime.parallel.mesh import ProcessMesh

FP32_BYTES = 4
SMALL_MODEL_BYTES = 2**30
"""Weights in fp32 up to which a model is small: too small to gain from 16-bit products on a CPU."""
AUTO_KV_BYTES = 2**30
"""What engine.kv_cache_bytes=null takes at most, for all ranks of one process together."""


def compute_dtype(config: RuntimeConfig, model: ModelConfig) -> torch.dtype:
    """The dtype of activations, cache and all weights but the experts'.

    fp32 for small models on a CPU, whatever `dtype` allows: a product of 16 rows by [128, 128] takes 8 us in fp32 and
    16 us in bf16. Otherwise `auto` is the checkpoint's dtype, and bfloat16 where that is fp16.
    """
    if config.dtype == "float32" or (config.device == "cpu" and _is_small(model)):
        return torch.float32
    return torch.float32 if config.dtype == "auto" and model.torch_dtype == torch.float32 else torch.bfloat16


def expert_dtype(config: RuntimeConfig, model: ModelConfig) -> torch.dtype:
    """The dtype of the experts' products: `compute_dtype`, or bfloat16 where `dtype` says so.

    `dtype=auto` keeps a small model's experts in fp32, which is faster where a rank holds one expert (320 virtual ranks
    of the demo model: 0.97 s a step against 1.1); with all experts on one rank bf16 halves the bytes to be moved.
    """
    return torch.bfloat16 if config.dtype == "bfloat16" else compute_dtype(config, model)


def kept_weights(config: RuntimeConfig, model: ModelConfig) -> KeptFp8:
    """Which weights of an FP8 checkpoint stay as they are stored in this run."""
    keep = config.fp8_weights == "keep" or (config.fp8_weights == "auto" and config.device == "cuda")
    return kept_fp8(model, keep=keep, tp=config.tp, shared_dispatched=config.shared_experts == "dispatched")


def _is_small(model: ModelConfig) -> bool:
    whole = weight_bytes(
        model, ProcessMesh(), num_local_slots=model.n_routed_experts, shared="replicated", itemsize=FP32_BYTES
    )
    return whole.total <= SMALL_MODEL_BYTES


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of one rank's weights, all layers, by part."""

    embedding: int
    """Token table and vocabulary head: this rank's rows of both."""
    attention: int
    """This rank's heads; the low-rank projections and their norms are whole on every rank."""
    norms: int
    dense: int
    """MLPs of the first layers, whole on every rank."""
    router: int
    """fp32, whole on every rank."""
    experts: int
    """This rank's slots: routed experts and, where they are dispatched, shared ones."""
    shared_experts: int
    """Whole on every rank where they are replicated, else 0."""

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def weight_bytes(
    model: ModelConfig,
    mesh: ProcessMesh,
    *,
    num_local_slots: int,
    shared: str,
    itemsize: int,
    expert_itemsize: int | None = None,
    batch_invariant: bool = False,
    kept: KeptFp8 | None = None,
) -> WeightBytes:
    """What `mesh.rank` holds. `shared`: "replicated" or "dispatched"; `itemsize` of the compute dtype,
    `expert_itemsize` of the slots where it differs; `kept`: what stays in FP8, with the scales of its blocks."""
    hidden, moe_layers = model.hidden_size, len(model.moe_layers)
    width, num_shared = model.moe_intermediate_size, model.n_shared_experts if shared == "replicated" else 0
    bias = model.n_routed_experts if model.topk_method == "noaux_tc" else 0
    parts = frozenset[Part]() if kept is None else kept.parts
    attention = _attention_bytes(model, mesh.tp, itemsize, parts, batch_invariant=batch_invariant)
    expert = _mlp_bytes(hidden, width, expert_itemsize or itemsize, kept="experts" in parts)
    beside = _mlp_bytes(hidden, num_shared * width, itemsize, kept="shared" in parts)
    dense = _mlp_bytes(hidden, model.intermediate_size, itemsize, kept="dense" in parts)
    return WeightBytes(
        embedding=_embedding_numbers(model, mesh) * itemsize,
        attention=model.num_layers * attention,
        norms=(2 * model.num_layers + 1) * hidden * itemsize,
        dense=(model.num_layers - moe_layers) * dense,
        router=moe_layers * (model.n_routed_experts * hidden + bias) * FP32_BYTES,
        experts=moe_layers * num_local_slots * expert,
        shared_experts=moe_layers * beside,
    )


def _matrix_bytes(rows: int, columns: int, itemsize: int, *, kept: bool) -> int:
    return rows * columns + num_blocks(rows) * num_blocks(columns) * FP32_BYTES if kept else rows * columns * itemsize


def _mlp_bytes(hidden: int, width: int, itemsize: int, *, kept: bool) -> int:
    """Gate, up and down; each has blocks of its own."""
    wide = _matrix_bytes(width, hidden, itemsize, kept=kept)
    return 2 * wide + _matrix_bytes(hidden, width, itemsize, kept=kept)


def _embedding_numbers(model: ModelConfig, mesh: ProcessMesh) -> int:
    first, last = vocab_shard(model.vocab_size, tp=mesh.tp, tp_rank=mesh.tp_rank)
    head_rows = -(-model.vocab_size // mesh.tp)  # padded, so that all ranks gather equal shards
    return (last - first + head_rows) * model.hidden_size


def _attention_bytes(
    model: ModelConfig, tp: int, itemsize: int, kept: frozenset[Part], *, batch_invariant: bool
) -> int:
    hidden, heads, latent = model.hidden_size, model.num_heads // tp, model.kv_lora_rank
    rank, head_width = model.q_lora_rank, model.qk_nope_head_dim + model.v_head_dim
    down_rows = model.latent_dim + (rank or 0)
    matrices: tuple[tuple[Part, int, int], ...] = (
        ("down", down_rows, hidden),
        ("query", heads * model.qk_head_dim, rank or hidden),
        ("out", hidden, heads * model.v_head_dim),
    )
    numbers = latent + (rank or 0) + heads * head_width * latent  # norms, and the up-projections of keys and values
    if batch_invariant:  # the keys' up-projection is held transposed too
        numbers += heads * model.qk_nope_head_dim * latent
    if model.attention_bias:
        numbers += down_rows + hidden
    split = sum(_matrix_bytes(rows, columns, itemsize, kept=part in kept) for part, rows, columns in matrices)
    return split + numbers * itemsize


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The latent cache of one rank."""

    bytes_per_token: int
    num_pages: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token


def max_model_len(engine: EngineConfig, model: ModelConfig) -> int:
    """Most tokens of one sequence, prompt and output together."""
    return engine.max_model_len or model.max_position_embeddings


def max_num_seqs(engine: EngineConfig) -> int:
    """Most sequences that run at once: each takes at least one token of a step."""
    return min(engine.max_num_seqs, engine.max_num_batched_tokens)


def page_size(engine: EngineConfig, *, device: str) -> int:
    """Tokens per page. The GPU's decode kernel loads blocks of 64 rows, most cheaply from one page.

    Raises ConfigError on a size that this kernel cannot read.
    """
    on_kernels = backends.default_backend(torch.device(device)) == "triton"
    if engine.page_size is None:
        return 64 if on_kernels else 16
    size = engine.page_size
    if on_kernels and size & (size - 1):
        below = 1 << (size.bit_length() - 1)
        nearest_size = min(below, 2 * below, key=lambda power: abs(power - size))
        raise ConfigError(
            f"engine.page_size={size}: must be a power of two with device={device}, whose kernels read no others. "
            f"Nearest: engine.page_size={nearest_size}."
        )
    return size


def latent_row_bytes(engine: EngineConfig, model: ModelConfig, *, itemsize: int) -> int:
    """Of one token in one layer's cache; in fp8 C bytes, a scale per started 128 of them, and the rotary part."""
    if engine.kv_cache_dtype == "fp8":
        latent = model.kv_lora_rank + num_blocks(model.kv_lora_rank) * FP32_BYTES
        return latent + model.qk_rope_head_dim * itemsize
    return model.latent_dim * itemsize


def cache_size(
    engine: EngineConfig, model: ModelConfig, *, itemsize: int, ranks_in_process: int = 1, device: str = "cpu"
) -> CacheSize:
    """Pages of a rank's cache: what `engine.kv_cache_bytes` holds, or where it is null room for `max_num_seqs(engine)`
    sequences of full length, within AUTO_KV_BYTES for the process.

    Raises ConfigError where not even one page fits, and as `page_size`.
    """
    per_token = model.num_layers * latent_row_bytes(engine, model, itemsize=itemsize)
    size = page_size(engine, device=device)
    page = per_token * size
    budget = engine.kv_cache_bytes
    if budget is None:
        wanted = -(-max_model_len(engine, model) // size) * max_num_seqs(engine) * page
        budget = max(page, min(wanted, AUTO_KV_BYTES // ranks_in_process))
    if budget < page:
        raise ConfigError(
            f"engine.kv_cache_bytes={budget}: one page of {size} tokens takes {page} bytes "
            f"({per_token} a token). Nearest: engine.kv_cache_bytes={page}, or a smaller engine.page_size."
        )
    return CacheSize(per_token, budget // page, size)


def rotary_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """The table of cos and sin, fp32, shared by all layers."""
    return max_model_len(engine, model) * model.qk_rope_head_dim * FP32_BYTES


def slot_bytes(config: RuntimeConfig, model: ModelConfig) -> int:
    """Of one expert slot, scales included."""
    kept = "experts" in kept_weights(config, model).parts
    return _mlp_bytes(model.hidden_size, model.moe_intermediate_size, expert_dtype(config, model).itemsize, kept=kept)


def format_bytes(count: float) -> str:
    """`count` in the largest binary unit that leaves at least 1, three digits: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"
