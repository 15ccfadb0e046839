"""The experts' MLP in torch. R rows, H hidden."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.experts.weights import ExpertWeights
from moe_kernels.grouped_gemm.eager import bring_back, choose, collect, run
from moe_kernels.grouped_gemm.layout import SlotRows
from moe_kernels.swiglu import swiglu


def expert_mlp(x: Tensor, weights: ExpertWeights, rows: SlotRows, *, batch_invariant: bool) -> Tensor:
    """`x [R, H] -> [R, H]`. Both products run the same way, on one cut of the rows."""
    way = choose(weights.w13, rows, batch_invariant=batch_invariant) if x.shape[0] else None
    if way is None:
        return x.new_zeros(x.shape)
    hidden = swiglu(run(collect(x, way), weights.w13, way, halves=True), fast=not batch_invariant, backend="torch")
    return bring_back(run(hidden, weights.w2, way), way)
