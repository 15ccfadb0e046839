"""What the trace's model says about bytes: of a row on its way, and of an expert's weights."""

from __future__ import annotations

from dataclasses import dataclass

from moe_models.base import ModelConfig
from moe_models.registry import load_config

from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.launch.data import model_path
from moe_runtime.launch.sizing import compute_dtype, expert_dtype, kept_weights, weight_bytes
from moe_runtime.parallel.mesh import ProcessMesh


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one model in one configuration."""

    row_bytes: int
    """One token's hidden vector, there or back"""
    slot_bytes: int
    """The weights of one expert in one layer, scales included"""


def find_model(config: RuntimeConfig) -> ModelConfig | None:
    """None where the model is not on this machine."""
    try:
        return load_config(model_path(config.model))
    except (ConfigError, CheckpointError):
        return None


def facts_of(config: RuntimeConfig, model: ModelConfig) -> Facts:
    """In the dtypes that `config` computes with."""
    weights = weight_bytes(
        model,
        ProcessMesh(),
        num_local_slots=1,
        shared=config.shared_experts,
        itemsize=compute_dtype(config, model).itemsize,
        expert_itemsize=expert_dtype(config, model).itemsize,
        kept=kept_weights(config, model),
    )
    layers = max(1, len(model.moe_layers))
    return Facts(model.hidden_size * compute_dtype(config, model).itemsize, weights.experts // layers)
