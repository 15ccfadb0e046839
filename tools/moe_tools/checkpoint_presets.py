"""Shapes of the random checkpoints that `make_checkpoint` writes."""

from __future__ import annotations

from typing import Final

from moe_models.schema import Json

from moe_runtime.errors import ConfigError, nearest

PRESETS: Final = ("tiny", "small-41m", "small-1b")


def preset_config(family: str, preset: str) -> dict[str, Json]:
    """The config.json of a preset, without a dtype. Raises ConfigError for an unknown family or preset."""
    config: dict[str, Json] = {
        "model_type": family,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    sizes = _sizes(preset)
    return config | _router(family) | sizes | {"num_key_value_heads": sizes["num_attention_heads"]}


def _router(family: str) -> dict[str, Json]:
    match family:
        case "deepseek_v2":
            return {
                "architectures": ["DeepseekV2ForCausalLM"],
                "topk_method": "group_limited_greedy",
                "scoring_func": "softmax",
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
            }
        case "deepseek_v3":
            return {
                "architectures": ["DeepseekV3ForCausalLM"],
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "num_nextn_predict_layers": 0,
            }
        case _:
            raise ConfigError(f"family={family!r}: must be 'deepseek_v2' or 'deepseek_v3'.")


def _sizes(preset: str) -> dict[str, Json]:
    match preset:
        case "tiny":
            # Small enough for a unit test: 0.3M parameters.
            return {
                "vocab_size": 512,
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "intermediate_size": 128,
                "moe_intermediate_size": 32,
                "n_routed_experts": 16,
                "num_experts_per_tok": 4,
                "n_group": 4,
                "topk_group": 2,
            }
        case "small-41m":
            # Many narrow experts, as in a rank's share of a large model: 41.6M parameters, 4.8M active per token.
            return {
                "vocab_size": 4096,
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "q_lora_rank": 128,
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32,
                "v_head_dim": 64,
                "intermediate_size": 704,
                "moe_intermediate_size": 64,
                "n_routed_experts": 256,
                "num_experts_per_tok": 8,
                "n_group": 8,
                "topk_group": 4,
            }
        case "small-1b":
            # The widths of the published MLA: 0.80 G parameters, 0.16 G active per token, 1.6 GB in bf16.
            return {
                "vocab_size": 22528,
                "hidden_size": 1024,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "q_lora_rank": 384,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "intermediate_size": 2816,
                "moe_intermediate_size": 512,
                "n_routed_experts": 64,
                "num_experts_per_tok": 6,
                "n_group": 8,
                "topk_group": 4,
            }
        case _:
            raise ConfigError(f"preset={preset!r}: known are {', '.join(PRESETS)}.{nearest(preset, PRESETS)}")
