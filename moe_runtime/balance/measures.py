"""How even a placement is under given loads. W windows, L layers, E' logical experts, P slots on ep ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.arrays import Grid, Ints, Loads, numbers
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement


def rank_loads(loads: Loads, placement: ExpertPlacement) -> Tensor:
    """Expected tokens per rank with even replicas: `loads [L, E']` or `[W, L, E']` -> `[…, L, ep] float64`.

    ConfigError where the shapes differ or a load is NaN, infinite or negative.
    """
    values = numbers(loads)
    check_shape(values, placement)
    slots = placement.phy2log.numpy().reshape(placement.num_layers, placement.ep, -1)
    per_rank = loads_of(values if values.ndim == 3 else values[None], slots)
    return torch.from_numpy(per_rank if values.ndim == 3 else per_rank[0])


def balancedness(rank_loads: Tensor) -> Tensor:
    """`[…, ep]` -> `[…] float64`: mean over ranks / maximum; 1.0 is best, and where there is no load at all."""
    loads = rank_loads.to(torch.float64)
    greatest = loads.amax(dim=-1)
    return torch.where(greatest > 0, loads.mean(dim=-1) / greatest, torch.ones_like(greatest))


def loads_of(loads: Grid, slots: Ints) -> Grid:
    """`loads [W, L, E]`, `slots [L, D, S]` of experts -> `[W, L, D]`."""
    layers, experts = loads.shape[1:]
    index = slots.reshape(layers, -1) + np.arange(layers)[:, None] * experts
    counts = np.bincount(index.ravel(), minlength=layers * experts).reshape(layers, experts)
    each = np.take_along_axis(loads / np.maximum(counts, 1), slots.reshape(1, layers, -1), axis=2)
    per_rank: Grid = each.reshape(len(loads), *slots.shape).sum(axis=3)
    return per_rank


def check_shape(values: Grid, placement: ExpertPlacement) -> None:
    if values.shape[-2:] != (placement.num_layers, placement.num_logical):
        raise ConfigError(
            f"loads: [layers, experts]={list(values.shape[-2:])}, but the placement has "
            f"{[placement.num_layers, placement.num_logical]}. Use the load and the placement of one model."
        )


def clashes(slots: Ints) -> bool:
    """Whether a rank of `slots [D, S]` has two replicas of one expert."""
    ordered = np.sort(slots, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
