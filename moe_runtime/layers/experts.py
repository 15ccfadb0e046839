"""Experts of one rank, and MLPs that see every token. T tokens, H hidden, I width, E local slots, S shared, R rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from moe_kernels.experts import ExpertWeights, expert_mlp_padded, expert_mlp_ragged
from moe_kernels.grouped_gemm.layout import every_row
from moe_kernels.scaled import BlockScaled
from moe_kernels.swiglu import swiglu
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows
from moe_runtime.layers.linear import Linear


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The rank's slots: fixed storage, rewritten in place when the placement changes. `ue8m0`: scales of rows that are
    rounded to fp8 are powers of two."""

    weights: ExpertWeights
    batch_invariant: bool = False
    ue8m0: bool = False

    def __call__(self, rows: Rows) -> Tensor:
        """Outputs like `rows.data`, bf16 where that is fp8. Padding rows are unspecified.

        Plain weights multiply in their own dtype, block-scaled ones take rows as they come, fp8 with scales among them.
        """
        x, weights, invariant = self._operand(rows), self.weights, self.batch_invariant
        match rows:
            case GroupedRows():
                y = expert_mlp_ragged(
                    x,
                    weights,
                    psum=rows.psum,
                    alignment=rows.alignment,
                    row_weights=rows.weights,
                    expected_rows=rows.expected_rows,
                    ue8m0=self.ue8m0,
                    batch_invariant=invariant,
                )
            case PaddedRows():
                y = expert_mlp_padded(
                    x,
                    weights,
                    counts=rows.counts,
                    row_weights=rows.weights,
                    expected_rows=rows.expected_rows,
                    ue8m0=self.ue8m0,
                    batch_invariant=invariant,
                )
        return y if isinstance(x, BlockScaled) else y.to(rows.data.dtype)

    def slots(self, start: int, stop: int) -> Experts:
        """Slots `start <= e < stop` alone, for use at once (see ExpertWeights.slots)."""
        return replace(self, weights=self.weights.slots(start, stop))

    def alone(self, slot: int, x: Tensor) -> Tensor:
        """Outputs of one slot for `x [R, H]`, whose bits depend on `x` and that slot's weights alone, wherever they
        are."""
        only = replace(self, weights=self.weights.slots(slot, slot + 1), batch_invariant=True)
        return only(GroupedRows(x, torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)))

    def _operand(self, rows: Rows) -> Tensor | BlockScaled:
        if rows.scales is not None:
            return BlockScaled(rows.data, rows.scales)
        return rows.data if isinstance(self.weights.w13, BlockScaled) else rows.data.to(self.weights.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class DenseMLP:
    """A dense layer, or S shared experts as one: `gate_up [2I, H]` (gate rows first), `down [H, I]`."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """`x [T, H]` -> `[T, H]`."""
        return self.down(swiglu(self.gate_up(x), fast=not self.gate_up.batch_invariant))


@dataclass(frozen=True, slots=True, eq=False)
class ScaledMLP:
    """The same in fp8 blocks: the only slot of `weights`, whose hidden rows stay fp8 between the two products; `ue8m0`
    as in Experts."""

    weights: ExpertWeights
    batch_invariant: bool = False
    ue8m0: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """`x [T, H]` -> `[T, H]`, in x's dtype."""
        return expert_mlp_ragged(
            x, self.weights, psum=every_row(x.device), ue8m0=self.ue8m0, batch_invariant=self.batch_invariant
        )


MLP = DenseMLP | ScaledMLP
