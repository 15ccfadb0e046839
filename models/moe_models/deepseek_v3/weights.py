"""Names, shapes and dtypes of the tensors in a DeepSeek-V3 checkpoint: V2's, the correction bias, the MTP layers."""

from __future__ import annotations

from collections.abc import Iterator

from moe_models.base import ModelConfig
from moe_models.deepseek_v2 import weights as v2
from moe_runtime.loading.shard import TensorSpec


def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of the main model, as V2's. The correction bias is to be read as fp32 whatever the model's dtype."""
    biases = (_correction_bias(config, layer) for layer in config.moe_layers)
    return (*v2.tensor_specs(config), *biases)


def mtp_tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Tensors of the multi-token-prediction layers, numbered on from the last layer. They repeat embedding and head."""
    first = config.num_layers
    return tuple(s for i in range(config.num_nextn_predict_layers) for s in _mtp_layer_specs(config, first + i))


def is_mtp_tensor(config: ModelConfig, name: str) -> bool:
    """Whether `name` belongs to one of the config's multi-token-prediction layers."""
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"] or len(parts) < 4 or not parts[2].isdecimal():
        return False
    return config.num_layers <= int(parts[2]) < config.num_layers + config.num_nextn_predict_layers


def _correction_bias(config: ModelConfig, layer: int) -> TensorSpec:
    return v2.plain(f"model.layers.{layer}.mlp.gate.e_score_correction_bias", config.n_routed_experts)


def _mtp_layer_specs(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    prefix, hidden, vocab = f"model.layers.{layer}.", config.hidden_size, config.vocab_size
    yield v2.plain(prefix + "embed_tokens.weight", vocab, hidden)
    yield v2.plain(prefix + "enorm.weight", hidden)
    yield v2.plain(prefix + "hnorm.weight", hidden)
    # Input is [normed embedding ; normed hidden state].
    yield v2.plain(prefix + "eh_proj.weight", hidden, 2 * hidden)
    yield from v2.layer_specs(config, layer, moe=True)
    yield _correction_bias(config, layer)
    yield v2.plain(prefix + "shared_head.norm.weight", hidden)
    yield v2.plain(prefix + "shared_head.head.weight", vocab, hidden)
