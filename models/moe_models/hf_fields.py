"""The keys of config.json that DeepSeek-V2 and V3 share: shapes, rotary embedding, quantisation, token ids."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from moe_models.base import Family, Fp8Blocks, ModelConfig, Scoring, TopkMethod, YarnConfig
from moe_models.schema import ObjectReader

_DTYPES: Final = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16})

_WITHOUT_EFFECT: Final = (
    # Names and bookkeeping. `auto_map` names remote code, which is never run.
    *("architectures", "model_type", "auto_map", "transformers_version", "pad_token_id", "task_specific_params"),
    # Training only.
    *("attention_dropout", "aux_loss_alpha", "seq_aux", "initializer_range", "output_router_logits", "pretraining_tp"),
    *("router_aux_loss_coef", "gradient_checkpointing"),
    # How another runtime ran it.
    *("ep_size", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "torchscript", "tokenizer_class"),
    # MLA has one latent per token, so a number of key-value heads says nothing; transformers writes head_dim =
    # qk_rope_head_dim, other writers qk_head_dim.
    *("num_key_value_heads", "head_dim"),
)


@dataclass(frozen=True, slots=True)
class RouterFields:
    """What a family decides about its router."""

    scoring: Scoring
    topk_method: TopkMethod
    n_group: int
    topk_group: int
    norm_topk_prob: bool


def build_config(
    keys: ObjectReader, *, family: Family, router: RouterFields, num_nextn_predict_layers: int
) -> ModelConfig:
    """Read the shared keys and finish the object. Raises ConfigError naming key, value, rule and remedy."""
    keys.ignore(*_WITHOUT_EFFECT)
    keys.require("hidden_act", "silu", because="the experts are SwiGLU")
    keys.require("moe_layer_freq", 1, because="every layer after first_k_dense_replace has experts")
    keys.require("mlp_bias", False, because="no published checkpoint of this family has MLP biases")
    rope_theta, yarn = _read_rope(keys)
    config = ModelConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=keys.integer("num_attention_heads"),
        q_lora_rank=keys.optional_integer("q_lora_rank"),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
        intermediate_size=keys.integer("intermediate_size"),
        moe_intermediate_size=keys.integer("moe_intermediate_size"),
        n_routed_experts=keys.integer("n_routed_experts"),
        n_shared_experts=keys.integer("n_shared_experts", default=0, minimum=0),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        n_group=router.n_group,
        topk_group=router.topk_group,
        first_k_dense_replace=keys.integer("first_k_dense_replace", minimum=0),
        norm_topk_prob=router.norm_topk_prob,
        routed_scaling_factor=keys.number("routed_scaling_factor"),
        scoring=router.scoring,
        topk_method=router.topk_method,
        rms_norm_eps=keys.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_interleave=keys.boolean("rope_interleave", default=True),
        yarn=yarn,
        max_position_embeddings=keys.integer("max_position_embeddings"),
        attention_bias=keys.boolean("attention_bias", default=False),
        num_nextn_predict_layers=num_nextn_predict_layers,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
        torch_dtype=_read_dtype(keys),
        quantization=_read_quantization(keys),
        bos_token_id=keys.optional_integer("bos_token_id", minimum=0),
        eos_token_ids=keys.token_ids("eos_token_id"),
    )
    keys.require("qk_head_dim", config.qk_head_dim, because="it is qk_nope_head_dim + qk_rope_head_dim")
    keys.finish()
    return config


def _read_dtype(keys: ObjectReader) -> torch.dtype:
    """`torch_dtype` (transformers 4) or `dtype` (5); fp32 where neither is given, as transformers does."""
    old = keys.choice("torch_dtype", _DTYPES, default="float32")
    return _DTYPES[keys.choice("dtype", _DTYPES, default=old)]


def _read_rope(keys: ObjectReader) -> tuple[float, YarnConfig | None]:
    """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` with both (5)."""
    old, new = keys.nested("rope_scaling"), keys.nested("rope_parameters")
    if old is not None and new is not None:
        keys.fail("rope_scaling", "rope_parameters is there too; they spell the same thing. Keep one of the two.")
    outer_theta = keys.number("rope_theta", default=10000.0)
    rope = old if old is not None else new
    if rope is None:
        return outer_theta, None
    theta = rope.number("rope_theta", default=outer_theta)
    if keys.has("rope_theta") and theta != outer_theta:
        keys.fail("rope_theta", f"the rotary object says rope_theta={theta:g}. Keep one of the two.")
    yarn = _read_yarn(rope)
    rope.finish()
    return theta, yarn


def _read_yarn(rope: ObjectReader) -> YarnConfig | None:
    kinds = ("yarn", "default")
    old_kind = rope.choice("type", kinds, default="default")
    kind = rope.choice("rope_type", kinds, default=old_kind)
    if rope.has("type") and kind != old_kind:
        rope.fail("type", f"rope_type={kind!r} disagrees. Keep one of the two.")
    rope.require("partial_rotary_factor", 1.0, because="MLA rotates the whole of qk_rope_head_dim")
    if kind == "default":
        return None
    rope.require("attention_factor", None, because="it follows from factor, mscale and mscale_all_dim")
    rope.require("truncate", True, because="DeepSeek rounds the correction range to whole dimensions")
    mscale_all_dim = rope.number("mscale_all_dim", default=0.0, zero_allowed=True)
    mscale = rope.number("mscale", default=1.0)
    # Published implementations disagree about these two cases, and no published checkpoint has them.
    if mscale_all_dim > 0.0 and not rope.has("mscale"):
        rope.fail("mscale", f"must be given with mscale_all_dim={mscale_all_dim:g}; DeepSeek's models give both equal.")
    if mscale_all_dim == 0.0 and mscale != 1.0:
        rope.fail("mscale", "a value other than 1 needs mscale_all_dim too; DeepSeek's models give both equal.")
    return YarnConfig(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def _read_quantization(keys: ObjectReader) -> Fp8Blocks | None:
    quantization = keys.nested("quantization_config")
    if quantization is None:
        return None
    remedy = "use the FP8 checkpoint as published, or a bf16 conversion without quantization_config"
    quantization.choice("quant_method", ["fp8"])
    quantization.require("fmt", "e4m3", because=remedy)
    # Which modules are quantised is seen from the files.
    quantization.ignore("activation_scheme", "modules_to_not_convert", "dequantize")
    ue8m0 = quantization.has("scale_fmt") and quantization.choice("scale_fmt", ["ue8m0"]) == "ue8m0"
    block = quantization.integers("weight_block_size")
    if block != (128, 128):
        quantization.fail("weight_block_size", f"only [128, 128] is supported: {remedy}.")
    quantization.finish()
    return Fp8Blocks(rows=block[0], columns=block[1], ue8m0=ue8m0)
