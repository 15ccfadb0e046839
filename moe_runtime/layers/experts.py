"""Experts of one rank, and MLPs that see every token. T tokens, H hidden, I width, E local slots, S shared, R rows."""

from __future__ import annotations

from dataclasses import dataclass

from moe_kernels.experts import ExpertWeights, expert_mlp_padded, expert_mlp_ragged
from moe_kernels.swiglu import swiglu
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows
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
