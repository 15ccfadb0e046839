"""The experts' MLP: GEMM, SwiGLU, GEMM per slot. E slots, R rows, C rows per slot, H hidden, I intermediate."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend, require
from moe_kernels.experts import eager
from moe_kernels.experts.weights import ExpertWeights, OneSlot, allocate_experts, plain_like, prepare_experts
from moe_kernels.grouped_gemm.layout import RowMarks, SlotRows, padded_rows, ragged_rows
from moe_kernels.grouped_gemm.operands import (
    BACKENDS,
    Activations,
    check_product,
    check_row_weights,
    flat_rows,
    like_weights,
    plain_rows,
    result_dtype,
    unpacked,
    weigh,
)

__all__ = [
    "ExpertWeights",
    "OneSlot",
    "allocate_experts",
    "expert_mlp_padded",
    "expert_mlp_ragged",
    "plain_like",
    "prepare_experts",
]

OP = "experts"


def expert_mlp_ragged(
    x: Activations,
    weights: ExpertWeights,
    *,
    psum: Tensor,
    alignment: int = 1,
    row_weights: Tensor | None = None,
    expected_rows: int | None = None,
    out_dtype: torch.dtype | None = None,
    ue8m0: bool = False,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x [R, H]` sorted by slot, `psum [E] int32` (see `grouped_gemm_ragged`) -> `[R, H]` in x's dtype, bf16 for fp8 x.

    Results in the gaps and past the last slot are unspecified. With `batch_invariant` a row's bits depend on that row
    and its slot's weights alone. `row_weights [R] fp32` multiply the results' rows, before they are rounded on Triton.

    Block-scaled weights on `triton` and `deep_gemm`: x (quantised first where it is plain) and the hidden row are fp8
    with a scale per 128 values, a power of two with `ue8m0`; on `torch` the weights are dequantised and nothing else
    is rounded to fp8. On Triton the hidden row is computed in fp32 and rounded once; torch rounds gate, up and silu to
    the rows' dtype too. `expected_rows`, `backend`: see `grouped_gemm_ragged`.
    Raises KernelError on shapes, dtypes or strides that do not fit.
    """
    check_product(OP, x, weights.w13, psum, halves=True)
    data = x if isinstance(x, Tensor) else x.data
    check_row_weights(OP, row_weights, data.shape[0])
    chosen = choose_backend(data, backend, op=OP, offered=BACKENDS)
    if chosen == "torch":
        located = ragged_rows(psum, data.shape[0], alignment=alignment)
        return _torch(x, weights, located, out_dtype, row_weights, batch_invariant)
    rows = RowMarks(psum, None, alignment)
    return _compiled(chosen, x, weights, rows, out_dtype, row_weights, expected_rows, ue8m0, batch_invariant)


def expert_mlp_padded(
    x: Activations,
    weights: ExpertWeights,
    *,
    counts: Tensor,
    row_weights: Tensor | None = None,
    expected_rows: int | None = None,
    out_dtype: torch.dtype | None = None,
    ue8m0: bool = False,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x [E, C, H]` with `counts [E] int32` real rows per slot -> `[E, C, H]`; otherwise as `expert_mlp_ragged`.

    `row_weights [E, C]`.
    """
    check_product(OP, x, weights.w13, counts, halves=True)
    data = x if isinstance(x, Tensor) else x.data
    slots, capacity, hidden = data.shape
    factors = None if row_weights is None else row_weights.flatten()
    check_row_weights(OP, factors, slots * capacity)
    chosen = choose_backend(data, backend, op=OP, offered=BACKENDS)
    flat = flat_rows(OP, x, chosen)
    if chosen == "torch":
        out = _torch(flat, weights, padded_rows(counts, capacity), out_dtype, factors, batch_invariant)
    else:
        rows = RowMarks(counts, capacity)
        out = _compiled(chosen, flat, weights, rows, out_dtype, factors, expected_rows, ue8m0, batch_invariant)
    return out.view(slots, capacity, hidden)


def _torch(
    x: Activations,
    weights: ExpertWeights,
    rows: SlotRows,
    out_dtype: torch.dtype | None,
    row_weights: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    plain = x if isinstance(x, Tensor) else plain_rows(x, result_dtype(x, out_dtype))
    out = eager.expert_mlp(plain, weights, rows, batch_invariant=batch_invariant)
    return out if row_weights is None and out_dtype is None else weigh(out, row_weights, out_dtype)


def _compiled(
    backend: str,
    x: Activations,
    weights: ExpertWeights,
    rows: RowMarks,
    out_dtype: torch.dtype | None,
    row_weights: Tensor | None,
    expected_rows: int | None,
    ue8m0: bool,
    batch_invariant: bool,
) -> Tensor:
    dtype = result_dtype(x, out_dtype)
    w13, w2 = unpacked(OP, weights.w13), unpacked(OP, weights.w2)
    x = like_weights(x, w13, ue8m0=ue8m0, backend=backend)
    if backend == "deep_gemm":
        from moe_kernels.grouped_gemm import deep_gemm

        require(not batch_invariant, f"{OP}: deep_gemm has no batch-invariant mode; take backend='triton'")
        out = deep_gemm.expert_mlp(x, w13, w2, rows, expected_rows=expected_rows, ue8m0=ue8m0)
        return weigh(out, row_weights, dtype)
    from moe_kernels.experts import triton as kernels

    return kernels.expert_mlp(
        x,
        w13,
        w2,
        rows,
        out_dtype=dtype,
        rows_per_slot=expected_rows,
        row_weights=row_weights,
        ue8m0=ue8m0,
        batch_invariant=batch_invariant,
    )
