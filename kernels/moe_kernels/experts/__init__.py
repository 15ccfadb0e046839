"""The experts' MLP: GEMM, SwiGLU, GEMM per slot. E slots, R rows, C rows per slot, H hidden, I intermediate."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.experts import eager
from moe_kernels.experts.weights import ExpertWeights, allocate_experts, prepare_experts
from moe_kernels.grouped_gemm.layout import padded_rows, ragged_rows

__all__ = ["ExpertWeights", "allocate_experts", "expert_mlp_padded", "expert_mlp_ragged", "prepare_experts"]


def _check(x: Tensor, weights: ExpertWeights, marks: Tensor) -> None:
    if x.shape[-1] != weights.hidden or x.dtype != weights.dtype:
        raise KernelError(
            f"experts got x {tuple(x.shape)} {x.dtype}; these weights need [..., {weights.hidden}] {weights.dtype}"
        )
    if marks.shape != (weights.num_slots,):
        raise KernelError(f"experts got {tuple(marks.shape)} row marks; {weights.num_slots} slots need one each")


def expert_mlp_ragged(
    x: Tensor, weights: ExpertWeights, *, psum: Tensor, alignment: int = 1, batch_invariant: bool = False
) -> Tensor:
    """`x [R, H]` sorted by slot, `psum [E] int32` (see `grouped_gemm_ragged`) -> `[R, H]`.

    Results in the gaps and past the last slot are unspecified. With `batch_invariant` a row's bits depend on that row
    and its slot's weights alone. Raises KernelError on shapes or dtypes that differ.
    """
    _check(x, weights, psum)
    rows = ragged_rows(psum, x.shape[0], alignment=alignment)
    return eager.expert_mlp(x, weights, rows, batch_invariant=batch_invariant)


def expert_mlp_padded(x: Tensor, weights: ExpertWeights, *, counts: Tensor, batch_invariant: bool = False) -> Tensor:
    """`x [E, C, H]` with `counts [E] int32` real rows per slot -> `[E, C, H]`; otherwise as `expert_mlp_ragged`."""
    _check(x, weights, counts)
    rows = padded_rows(counts, x.shape[1])
    return eager.expert_mlp(x.flatten(0, 1), weights, rows, batch_invariant=batch_invariant).view(x.shape)
