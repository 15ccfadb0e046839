"""The placement that a configuration asks for. E' logical experts: routed, then dispatched shared ones."""

from __future__ import annotations

from moe_models.base import ModelConfig

from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement, expected_load, num_physical_experts


def num_logical_experts(config: RuntimeConfig, model: ModelConfig) -> int:
    """E'."""
    return model.n_routed_experts + num_dispatched_shared(config, model)


def num_dispatched_shared(config: RuntimeConfig, model: ModelConfig) -> int:
    """Shared experts that take part in the dispatch."""
    return model.n_shared_experts if config.shared_experts == "dispatched" else 0


def expert_placement(config: RuntimeConfig, model: ModelConfig) -> ExpertPlacement:
    """From `placement.file`, or uniform with the redundant slots going to the experts expected to be busiest.

    Raises ConfigError where a file does not fit the model or ep, or there would be more copies than ranks to hold them.
    """
    layers, logical = len(model.moe_layers), num_logical_experts(config, model)
    if config.placement.file is not None:
        return ExpertPlacement.from_file(config.placement.file, num_layers=layers, num_logical=logical, ep=config.ep)
    _check_redundant(config, logical)
    shared = num_dispatched_shared(config, model)
    return ExpertPlacement.uniform(
        layers,
        logical,
        ep=config.ep,
        num_redundant=config.placement.num_redundant_experts,
        expected_load=expected_load(model.n_routed_experts, shared, top_k=model.num_experts_per_tok),
    )


def num_local_slots(config: RuntimeConfig, model: ModelConfig) -> int:
    """Expert slots of each rank, by arithmetic where no file says. Raises ConfigError as `expert_placement` does."""
    if config.placement.file is not None:
        return expert_placement(config, model).num_local
    logical, redundant = num_logical_experts(config, model), config.placement.num_redundant_experts
    _check_redundant(config, logical)
    return num_physical_experts(logical, ep=config.ep, num_redundant=redundant) // config.ep


def _check_redundant(config: RuntimeConfig, num_logical: int) -> None:
    redundant, most = config.placement.num_redundant_experts, num_logical * config.ep
    if redundant > most:
        raise ConfigError(
            f"placement.num_redundant_experts={redundant}: a copy of each of {num_logical} experts on each of "
            f"ep={config.ep} ranks is the most. Nearest: placement.num_redundant_experts={most}."
        )
