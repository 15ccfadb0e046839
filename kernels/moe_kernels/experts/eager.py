"""The experts' MLP in torch. E slots, R rows, B blocks of C rows, H hidden, I intermediate."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.experts.weights import ExpertWeights
from moe_kernels.grouped_gemm import eager as gemm
from moe_kernels.grouped_gemm.layout import SlotRows, cut
from moe_kernels.linear.tiles import TILE
from moe_kernels.swiglu import swiglu


def expert_mlp(x: Tensor, weights: ExpertWeights, rows: SlotRows, *, batch_invariant: bool) -> Tensor:
    """`x [R, H] -> [R, H]`. Both products share one cut of the rows."""
    w13, w2 = weights.w13, weights.w2
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    if weights.num_slots == 1 and not batch_invariant:
        return gemm.product(swiglu(gemm.product(x, gemm.slot_weight(w13, 0)), fast=True), gemm.slot_weight(w2, 0))
    if not bool(rows.counts.any()):
        return x.new_zeros(x.shape)
    if not batch_invariant and not gemm.gathers(w13):
        segments = rows.segments()
        return gemm.run_segments(swiglu(gemm.run_segments(x, w13, segments), fast=True), w2, segments)
    blocks = cut(rows, TILE if batch_invariant else gemm.block_height(rows))
    gate_up = gemm.run_blocks(x.index_select(0, blocks.gather), w13, blocks, batch_invariant=batch_invariant)
    hidden = swiglu(gate_up, fast=not batch_invariant)
    y = gemm.run_blocks(hidden, w2, blocks, batch_invariant=batch_invariant)
    return y.index_select(0, blocks.back)
