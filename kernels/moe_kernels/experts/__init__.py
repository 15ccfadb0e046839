"""The experts' MLP: GEMM, SwiGLU, GEMM per slot. E slots, R rows, C rows per slot, H hidden, I intermediate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm import grouped_gemm_padded, grouped_gemm_ragged
from moe_kernels.swiglu import swiglu

__all__ = ["ExpertWeights", "expert_mlp_padded", "expert_mlp_ragged", "prepare_experts"]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of E slots in the form that this device runs fastest; made by `prepare_experts`."""

    w13: Tensor
    w2: Tensor

    @property
    def num_slots(self) -> int:
        return self.w13.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory that the weights hold."""
        return self.w13.nbytes + self.w2.nbytes

    def write_slot_(self, slot: int, *, w13: Tensor, w2: Tensor) -> None:
        """Replace slot's weights in place: `w13 [2I, H]`, `w2 [H, I]`."""
        self.w13[slot].copy_(w13)
        self.w2[slot].copy_(w2)


def prepare_experts(w13: Tensor, w2: Tensor) -> ExpertWeights:
    """`w13 [E, 2I, H]` (gate rows first, then up) and `w2 [E, H, I]` -> what `expert_mlp_*` takes.

    Raises KernelError where shapes or dtypes do not fit together.
    """
    e, i2, h = w13.shape
    if w2.shape != (e, h, i2 // 2) or i2 % 2 or w13.dtype != w2.dtype:
        raise KernelError(
            f"experts got w13 {tuple(w13.shape)} {w13.dtype} and w2 {tuple(w2.shape)} {w2.dtype}; "
            f"for this w13, w2 must be {(e, h, i2 // 2)} {w13.dtype}"
        )
    return ExpertWeights(w13, w2)


def expert_mlp_ragged(
    x: Tensor, weights: ExpertWeights, *, psum: Tensor, alignment: int = 1, batch_invariant: bool = False
) -> Tensor:
    """`x [R, H]` sorted by slot (see `grouped_gemm_ragged`) -> `[R, H]`."""
    gate_up = grouped_gemm_ragged(x, weights.w13, psum, alignment=alignment, batch_invariant=batch_invariant)
    return grouped_gemm_ragged(swiglu(gate_up), weights.w2, psum, alignment=alignment, batch_invariant=batch_invariant)


def expert_mlp_padded(x: Tensor, weights: ExpertWeights, *, counts: Tensor, batch_invariant: bool = False) -> Tensor:
    """`x [E, C, H]` with `counts [E]` real rows per slot -> `[E, C, H]`."""
    gate_up = grouped_gemm_padded(x, weights.w13, counts, batch_invariant=batch_invariant)
    return grouped_gemm_padded(swiglu(gate_up), weights.w2, counts, batch_invariant=batch_invariant)
