"""Bytes per rank against the checkpoint's own tensor list: nothing is counted twice or forgotten."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from moe_kernels.mla import ScaledLatent
from moe_models.registry import tensor_specs

from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.config import EngineConfig
from moe_runtime.dispatch.factory import buffer_bytes, most_tokens
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import Composed, compose
from moe_runtime.launch.placing import expert_placement, num_local_slots
from moe_runtime.launch.process_size import process_bytes
from moe_runtime.launch.shuffle import whole_spec
from moe_runtime.launch.sizing import (
    AUTO_KV_BYTES,
    WeightBytes,
    cache_size,
    compute_dtype,
    expert_dtype,
    format_bytes,
    page_size,
    weight_bytes,
)


def _weights(run: Composed, rank: int, itemsize: int = 2) -> WeightBytes:
    return weight_bytes(
        run.model,
        run.topology.mesh(rank),
        num_local_slots=expert_placement(run.config, run.model).num_local,
        shared=run.config.shared_experts,
        itemsize=itemsize,
    )


def _router_numbers(run: Composed) -> int:
    return sum(math.prod(spec.shape) for spec in tensor_specs(run.model) if ".mlp.gate." in spec.name)


@pytest.mark.parametrize("model", ["demo", "deepseek_v3", "deepseek_v2_lite", "kimi_k2"])
def test_one_rank_holds_every_tensor_of_the_checkpoint(model: str) -> None:
    run = compose([f"model={model}"])
    numbers = sum(math.prod(spec.shape) for spec in tensor_specs(run.model) if not spec.optional)
    # The router is held in fp32, the rest in 2 bytes here.
    assert _weights(run, 0).total == 2 * numbers + 2 * _router_numbers(run)


def test_deepseek_v3_has_671_billion_numbers() -> None:
    run = compose(["model=deepseek_v3"])
    numbers = (_weights(run, 0).total - 2 * _router_numbers(run)) // 2
    assert numbers == pytest.approx(671e9, rel=1e-3)


@pytest.mark.parametrize(
    "words", [["ep=8", "tp=1"], ["ep=8", "tp=4"], ["ep=32"], ["ep=8", "tp=8", "shared_experts=dispatched"]]
)
def test_ranks_add_up(words: list[str]) -> None:
    one, many = compose(["model=demo"]), compose(words)
    whole, parts = _weights(one, 0), [_weights(many, rank) for rank in range(many.config.ep)]
    experts = sum(part.experts for part in parts) + (many.config.shared_experts == "replicated") * whole.shared_experts
    placement = expert_placement(many.config, many.model)
    spare = (placement.num_physical - placement.num_logical) * (whole.experts // 256)
    assert experts == whole.experts + whole.shared_experts + spare
    assert sum(part.embedding for part in parts[: many.config.tp]) == whole.embedding
    for part in parts:
        assert (part.norms, part.dense, part.router) == (whole.norms, whole.dense, whole.router)


def test_uneven_vocabulary_shards() -> None:
    run = compose(["ep=8", "tp=8", "model=deepseek_v2_lite"])
    heads = -(-run.model.vocab_size // 8) * run.model.hidden_size * 2
    tables = [_weights(run, rank).embedding - heads for rank in range(8)]
    assert sum(tables) == run.model.vocab_size * run.model.hidden_size * 2


def test_cache_sizes() -> None:
    run = compose(["engine.kv_cache_bytes=1MiB", "engine.page_size=64"])
    size = cache_size(run.config.engine, run.model, itemsize=2)
    assert (size.bytes_per_token, size.num_pages) == (640, 2**20 // (640 * 64))
    assert size.num_bytes <= 2**20
    small = compose(["engine.max_num_seqs=2", "engine.max_model_len=100"])
    assert cache_size(small.config.engine, small.model, itemsize=2).num_tokens == 2 * 112  # whole pages each
    wide = cache_size(compose([]).config.engine, run.model, itemsize=2, ranks_in_process=320)
    assert 320 * wide.num_bytes <= AUTO_KV_BYTES
    with pytest.raises(ConfigError, match="one page of 64 tokens takes"):
        cache_size(EngineConfig(page_size=64, kv_cache_bytes=1000), run.model, itemsize=2)


@pytest.mark.parametrize(
    ("words", "per_layer"),
    [
        (["model=deepseek_v3"], 512 + 4 * 4 + 64 * 2),
        (["model=deepseek_v3", "dtype=float32"], 512 + 4 * 4 + 64 * 4),
        (["model=demo"], 64 + 1 * 4 + 16 * 4),
    ],
)
def test_fp8_latents_take_their_exact_bytes(words: list[str], per_layer: int) -> None:
    run = compose([*words, "engine.kv_cache_dtype=fp8", "engine.kv_cache_bytes=64MiB"])
    itemsize = compute_dtype(run.config, run.model).itemsize
    size = cache_size(run.config.engine, run.model, itemsize=itemsize)
    assert size.bytes_per_token == run.model.num_layers * per_layer
    assert size.num_pages == 2**26 // (size.bytes_per_token * size.page_size)
    with pytest.raises(ConfigError, match=rf"one page of 16 tokens takes {16 * size.bytes_per_token} bytes"):
        cache_size(replace(run.config.engine, kv_cache_bytes=1000), run.model, itemsize=itemsize)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("latent", [20, 128, 160, 512])
def test_the_cache_holds_what_is_stated(latent: int, fp8: bool) -> None:
    """A scale per started 128 values, whatever the width."""
    run = compose([f"engine.kv_cache_dtype={'fp8' if fp8 else 'auto'}", "engine.kv_cache_bytes=1MiB"])
    model = replace(run.model, kv_lora_rank=latent)
    size = cache_size(run.config.engine, model, itemsize=2)
    cache = LatentKVCache.zeros(
        model.num_layers,
        num_pages=size.num_pages,
        page_size=size.page_size,
        latent=latent,
        rope=model.qk_rope_head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        fp8=fp8,
    )
    parts = [
        part
        for layer in cache.layers
        for part in ((layer.data, layer.scale, layer.rope) if isinstance(layer, ScaledLatent) else (layer,))
    ]
    assert sum(part.nbytes for part in parts) == size.num_bytes
    assert size.bytes_per_token == model.num_layers * (
        latent + 4 * -(-latent // 128) + 2 * model.qk_rope_head_dim if fp8 else 2 * model.latent_dim
    )


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "local"])
def test_dispatch_bytes_grow_with_tokens(dispatch: str) -> None:
    run = compose([f"dispatch={dispatch}", "ep=1"] if dispatch == "local" else [f"dispatch={dispatch}", "ep=8"])
    slots = num_local_slots(run.config, run.model)
    whole = whole_spec(run.config, run.model, num_slots=slots)
    one, ten = (buffer_bytes(dispatch, replace(whole, max_tokens=n)) for n in (1, 10))
    assert 0 < one < ten <= 10 * one
    for cap in (one, ten - 1, ten, 10**12):
        found = most_tokens(dispatch, whole, cap_bytes=cap)
        assert buffer_bytes(dispatch, replace(whole, max_tokens=found)) <= cap
        assert found == whole.max_tokens or buffer_bytes(dispatch, replace(whole, max_tokens=found + 1)) > cap
    assert most_tokens(dispatch, whole, cap_bytes=one - 1) == 0


def test_a_process_holds_equal_slices_once() -> None:
    one, eight = compose(["ep=1", "engine.kv_cache_bytes=1MiB"]), compose(["ep=8", "engine.kv_cache_bytes=1MiB"])
    cache = cache_size(one.config.engine, one.model, itemsize=4).num_bytes
    held = [process_bytes(run.config, run.model, num_local_slots=256 // run.config.ep) for run in (one, eight)]
    assert held[1] == held[0] + 7 * cache


@pytest.mark.parametrize(
    ("words", "compute", "experts"),
    [
        ([], 4, 4),
        (["dtype=float32"], 4, 4),
        (["dtype=bfloat16"], 4, 2),
        (["device=cuda"], 2, 2),
        (["device=cuda", "dtype=float32"], 4, 4),
        (["model=deepseek_v3"], 2, 2),
        (["model=deepseek_v3", "dtype=bfloat16"], 2, 2),
    ],
)
def test_small_models_compute_in_fp32_on_a_cpu(words: list[str], compute: int, experts: int) -> None:
    run = compose(words, report=lambda _: None)  # with or without a GPU
    assert compute_dtype(run.config, run.model).itemsize == compute
    assert expert_dtype(run.config, run.model).itemsize == experts


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1 TiB"), (2**50, "1024 TiB")]
)
def test_byte_texts(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_pages_follow_the_device() -> None:
    """The GPU's decode kernel reads blocks of 64 rows and pages of a power of two."""
    assert page_size(EngineConfig(), device="cpu") == 16
    assert page_size(EngineConfig(), device="cuda") == 64
    assert page_size(EngineConfig(page_size=5), device="cpu") == 5
    assert page_size(EngineConfig(page_size=32), device="cuda") == 32
    with pytest.raises(ConfigError, match=r"engine\.page_size=48: must be a power of two.* Nearest: .*page_size=32\."):
        page_size(EngineConfig(page_size=48), device="cuda")
    run = compose([])
    assert cache_size(run.config.engine, run.model, itemsize=2, device="cuda").page_size == 64
