"""ModelConfig: what the runtime needs to know of a DeepSeek-style model, whatever spelling its config.json used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from moe_runtime.errors import ConfigError, nearest_divisor

Family = Literal["deepseek_v2", "deepseek_v3"]
Scoring = Literal["softmax", "sigmoid"]
TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN scaling of the rotary frequencies (Peng et al., arXiv 2309.00071), with DeepSeek's two magnitude terms.

    `mscale_all_dim == 0` means that the softmax scale is not corrected.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def rotary_scale(self) -> float:
        """What cos and sin are multiplied by (1.0 where mscale == mscale_all_dim)."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def softmax_scale_correction(self) -> float:
        """What `qk_head_dim ** -0.5` is multiplied by."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1.0 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """An FP8 (e4m3) checkpoint: one fp32 `weight_scale_inv` per block of `rows x columns` weights.

    `ue8m0`: the scales are powers of two, and the model wants those of its activations to be such too (V3.1).
    """

    rows: int = 128
    columns: int = 128
    ue8m0: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and the mathematics of one model. Field names are those of Hugging Face's config.json.

    `q_lora_rank` None: the query has no low-rank step. `yarn` None: plain rotary frequencies.
    `quantization` describes the checkpoint, not the computation. `torch_dtype` is what the checkpoint asks for.
    `rms_norm_eps` is that of the norms on the residual stream (see `latent_norm_eps`).

    Raises ConfigError where two fields contradict each other.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring: Scoring
    topk_method: TopkMethod
    rms_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    yarn: YarnConfig | None
    max_position_embeddings: int
    attention_bias: bool
    num_nextn_predict_layers: int
    tie_word_embeddings: bool
    torch_dtype: torch.dtype
    quantization: Fp8Blocks | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_fields_agree(self)

    @property
    def moe_layers(self) -> range:
        """Indices of the layers with routed experts."""
        return range(self.first_k_dense_replace, self.num_layers)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the compressed latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of q_a_layernorm and kv_a_layernorm: a constant in DeepSeek's and transformers' code."""
        return 1e-6

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def softmax_scale(self) -> float:
        """Attention scores are multiplied by this, YaRN's correction included."""
        correction = self.yarn.softmax_scale_correction if self.yarn is not None else 1.0
        return float(self.qk_head_dim**-0.5 * correction)


def _check_fields_agree(config: ModelConfig) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise ConfigError(
            f"n_group={groups} does not divide n_routed_experts={experts}: each group holds the same number of "
            f"experts. The nearest divisor is n_group={nearest_divisor(groups, experts)}."
        )
    if not 1 <= config.topk_group <= groups:
        raise ConfigError(
            f"topk_group={config.topk_group} must be 1..{groups} (n_group): it is the number of groups that a token "
            f"may use. The nearest valid value is {min(max(config.topk_group, 1), groups)}."
        )
    reachable = config.topk_group * config.experts_per_group
    if not 1 <= config.num_experts_per_tok <= reachable:
        raise ConfigError(
            f"num_experts_per_tok={config.num_experts_per_tok} must be 1..{reachable}: a token reaches topk_group="
            f"{config.topk_group} groups of {config.experts_per_group} experts. Lower it or raise topk_group."
        )
    if config.topk_method == "noaux_tc" and config.experts_per_group < 2:
        raise ConfigError(
            f"n_group={groups} leaves {config.experts_per_group} expert per group of n_routed_experts={experts}: "
            f"noaux_tc scores a group by its two best experts. The largest valid n_group is {experts // 2}."
        )
    if config.first_k_dense_replace > config.num_layers:
        raise ConfigError(
            f"first_k_dense_replace={config.first_k_dense_replace} exceeds num_hidden_layers={config.num_layers}: "
            f"it counts the leading layers without experts. Use 0..{config.num_layers}."
        )
    if config.yarn is not None and config.rope_theta <= 1.0:
        raise ConfigError(
            f"rope_theta={config.rope_theta:g} must be above 1 with YaRN: frequencies fall by powers of it, and YaRN "
            "stretches the slow ones. DeepSeek's models have 10000."
        )
    if config.qk_rope_head_dim % 2:
        raise ConfigError(
            f"qk_rope_head_dim={config.qk_rope_head_dim} is odd: rotary embedding turns pairs of numbers. "
            f"The nearest valid value is {config.qk_rope_head_dim + 1}."
        )
