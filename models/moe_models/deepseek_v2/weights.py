"""Names, shapes and dtypes of the tensors in a DeepSeek-V2 checkpoint, and of all that V3 shares with it.

H hidden, C kv_lora_rank, Q q_lora_rank, N heads, Dn/Dr/Dv head dims (no rope, rope, value), I expert width, V vocab.
A matrix is stored `[out, in]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_models.base import ModelConfig
from moe_runtime.loading.shard import TensorSpec

_PLAIN = frozenset({torch.float32, torch.bfloat16, torch.float16})
_WITH_FP8 = _PLAIN | {torch.float8_e4m3fn}


def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of the model, in layer order; optional ones are recognised where a checkpoint has them, not read."""
    hidden, vocab = config.hidden_size, config.vocab_size
    specs = [plain("model.embed_tokens.weight", vocab, hidden)]
    for layer in range(config.num_layers):
        specs.extend(layer_specs(config, layer, moe=layer in config.moe_layers))
    specs.append(plain("model.norm.weight", hidden))
    specs.append(TensorSpec("lm_head.weight", (vocab, hidden), dtypes=_PLAIN, optional=config.tie_word_embeddings))
    return tuple(specs)


def layer_specs(config: ModelConfig, layer: int, *, moe: bool) -> Iterator[TensorSpec]:
    """One decoder block: two norms, MLA, and a dense MLP or the experts."""
    prefix = f"model.layers.{layer}."
    yield plain(prefix + "input_layernorm.weight", config.hidden_size)
    yield from _attention_specs(config, prefix + "self_attn.")
    yield plain(prefix + "post_attention_layernorm.weight", config.hidden_size)
    if not moe:
        yield from _mlp_specs(config, prefix + "mlp.", config.intermediate_size)
        return
    yield plain(prefix + "mlp.gate.weight", config.n_routed_experts, config.hidden_size)
    for expert in range(config.n_routed_experts):
        yield from _mlp_specs(config, f"{prefix}mlp.experts.{expert}.", config.moe_intermediate_size)
    if config.n_shared_experts:
        # S shared experts are stored as one MLP of width S * I.
        width = config.n_shared_experts * config.moe_intermediate_size
        yield from _mlp_specs(config, prefix + "mlp.shared_experts.", width)


def plain(name: str, *shape: int) -> TensorSpec:
    """A tensor that no checkpoint quantises."""
    return TensorSpec(name, shape, dtypes=_PLAIN)


def linear(config: ModelConfig, name: str, out_features: int, in_features: int) -> TensorSpec:
    """A projection, `[out, in]`: stored in FP8 blocks where the checkpoint is quantised."""
    if config.quantization is None:
        return TensorSpec(name, (out_features, in_features), dtypes=_PLAIN)
    block = (config.quantization.rows, config.quantization.columns)
    return TensorSpec(name, (out_features, in_features), dtypes=_WITH_FP8, block=block)


def _attention_specs(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, heads, latent = config.hidden_size, config.num_heads, config.kv_lora_rank
    query_rank, query_out = config.q_lora_rank, config.num_heads * config.qk_head_dim
    if query_rank is None:
        yield linear(config, prefix + "q_proj.weight", query_out, hidden)
    else:
        yield linear(config, prefix + "q_a_proj.weight", query_rank, hidden)
        if config.attention_bias:
            yield plain(prefix + "q_a_proj.bias", query_rank)
        yield plain(prefix + "q_a_layernorm.weight", query_rank)
        yield linear(config, prefix + "q_b_proj.weight", query_out, query_rank)
    yield linear(config, prefix + "kv_a_proj_with_mqa.weight", config.latent_dim, hidden)
    if config.attention_bias:
        yield plain(prefix + "kv_a_proj_with_mqa.bias", config.latent_dim)
    yield plain(prefix + "kv_a_layernorm.weight", latent)
    # Per head: Dn rows of keys, then Dv rows of values.
    yield linear(config, prefix + "kv_b_proj.weight", heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield linear(config, prefix + "o_proj.weight", hidden, heads * config.v_head_dim)
    if config.attention_bias:
        yield plain(prefix + "o_proj.bias", hidden)
    # Moonlight and Kimi-K2 carry the frequencies, which follow from config.json.
    yield TensorSpec(prefix + "rotary_emb.inv_freq", (config.qk_rope_head_dim // 2,), dtypes=_PLAIN, optional=True)


def _mlp_specs(config: ModelConfig, prefix: str, width: int) -> Iterator[TensorSpec]:
    yield linear(config, prefix + "gate_proj.weight", width, config.hidden_size)
    yield linear(config, prefix + "up_proj.weight", width, config.hidden_size)
    yield linear(config, prefix + "down_proj.weight", config.hidden_size, width)
