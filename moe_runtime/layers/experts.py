"""Experts of one rank, and MLPs that see every token. T tokens, H hidden, I width, E local slots, S shared, R rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.experts import ExpertWeights, expert_mlp_padded, expert_mlp_ragged
from moe_kernels.swiglu import swiglu
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows
from moe_runtime.errors import ConfigError
from moe_runtime.layers.linear import Linear


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The rank's slots: fixed storage, rewritten in place when the placement changes."""

    weights: ExpertWeights
    batch_invariant: bool = False

    def __call__(self, rows: Rows) -> Tensor:
        """Outputs like `rows.data`; the products run in the weights' dtype. Padding rows are unspecified."""
        x, weights, invariant = rows.data.to(self.weights.dtype), self.weights, self.batch_invariant
        match rows:
            case GroupedRows():
                y = expert_mlp_ragged(x, weights, psum=rows.psum, alignment=rows.alignment, batch_invariant=invariant)
            case PaddedRows():
                y = expert_mlp_padded(x, weights, counts=rows.counts, batch_invariant=invariant)
        return y.to(rows.data.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class DenseMLP:
    """A dense layer, or S shared experts as one: `gate_up [2I, H]` (gate rows first), `down [H, I]`."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """`x [T, H]` -> `[T, H]`."""
        return self.down(swiglu(self.gate_up(x), fast=not self.gate_up.batch_invariant))


def slice_shared(gate: Tensor, up: Tensor, down: Tensor, *, num_shared: int) -> tuple[Tensor, Tensor]:
    """Cut the MLP that a checkpoint stores for its S shared experts into S experts whose outputs sum to it.

    `gate, up [S·I, H]`, `down [H, S·I]` -> `w13 [S, 2I, H]`, `w2 [S, H, I]`. ConfigError where S does not divide.
    """
    width, hidden = gate.shape
    if width % num_shared or up.shape != gate.shape or down.shape != (hidden, width):
        raise ConfigError(
            f"shared experts: gate {tuple(gate.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)} do not split "
            f"into {num_shared} experts; must be [S·I, H], [S·I, H], [H, S·I]."
        )
    each = width // num_shared
    w13 = torch.cat([gate.view(num_shared, each, hidden), up.view(num_shared, each, hidden)], dim=1)
    return w13, down.view(hidden, num_shared, each).transpose(0, 1).contiguous()
