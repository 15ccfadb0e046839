"""Rotary positions with YaRN. R rope dims, M positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): slow rotations are stretched by `factor`, fast ones kept, a ramp between."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    cos_sin_factor: float
    """What cos and sin are multiplied by."""


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """`cos_sin [M, R] fp32`: cos of the R/2 pair frequencies, then sin, for each position."""

    cos_sin: Tensor

    @classmethod
    def build(
        cls,
        dim: int,
        *,
        theta: float,
        num_positions: int,
        yarn: YarnScaling | None,
        device: torch.device | str = "cpu",
    ) -> RotaryTable:
        """The table of `num_positions` positions for `dim` rotary dims; made on the CPU, so equal on every device."""
        inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        factor = 1.0
        if yarn is not None:
            keep = _extrapolated(dim, theta, yarn)
            inv_freq = inv_freq / yarn.factor * (1 - keep) + inv_freq * keep
            factor = yarn.cos_sin_factor
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
        return cls((torch.cat((angles.cos(), angles.sin()), dim=-1) * factor).to(device))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions [n] int64` to (cos, sin), each `[n, R/2]`."""
        rows = self.cos_sin[positions]
        half = rows.shape[1] // 2
        return rows[:, :half], rows[:, half:]


def _extrapolated(dim: int, theta: float, yarn: YarnScaling) -> Tensor:
    """`[R/2]` share of each frequency that is kept unscaled: 1 for fast rotations, 0 for slow ones, a ramp between."""

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_to_dim(yarn.beta_fast)), 0)
    high: float = min(math.ceil(turns_to_dim(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # the ramp's slope stays finite
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)
