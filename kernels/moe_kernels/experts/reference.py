"""Oracle of the experts' MLP: fp64. E slots, R rows, C rows per slot, H hidden, I intermediate."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.grouped_gemm.reference import padded_reference, ragged_reference
from moe_kernels.swiglu.reference import swiglu_reference


def expert_mlp_ragged_reference(x: Tensor, w13: Tensor, w2: Tensor, psum: Tensor, *, alignment: int = 1) -> Tensor:
    """`x [R, H]`, `w13 [E, 2I, H]`, `w2 [E, H, I]` -> `[R, H]` fp64, zero in the gaps."""
    gate_up = ragged_reference(x, w13, psum, alignment=alignment)
    return ragged_reference(swiglu_reference(gate_up), w2, psum, alignment=alignment)


def expert_mlp_padded_reference(x: Tensor, w13: Tensor, w2: Tensor, counts: Tensor) -> Tensor:
    """`x [E, C, H]` -> `[E, C, H]` fp64, zero past the counts."""
    return padded_reference(swiglu_reference(padded_reference(x, w13, counts)), w2, counts)
