"""Grouped GEMM: one product per expert slot. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend, require
from moe_kernels.grouped_gemm import eager
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
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights

__all__ = ["PackedSlots", "SlotWeights", "grouped_gemm_padded", "grouped_gemm_ragged"]

OP = "grouped GEMM"


def grouped_gemm_ragged(
    x: Activations,
    w: SlotWeights,
    psum: Tensor,
    *,
    alignment: int = 1,
    row_weights: Tensor | None = None,
    expected_rows: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x [R, K]` sorted by slot, `w [E, N, K]`, `psum [E] int32` -> `[R, N]` in x's dtype (bf16 where x is fp8).

    Rows of slot e lie from `psum[e-1]` rounded up to `alignment` (0 for the first) to `psum[e]`. Results in the gaps
    and past the last slot are unspecified. `row_weights [R] fp32` multiply the results' rows. With `batch_invariant` a
    row's bits depend on that row and its slot's weight alone.

    Block-scaled weights: `torch` dequantises them; `triton` and `deep_gemm` multiply in fp8, summing every 128 products
    in fp32, and quantise a plain x first. `expected_rows`: the mean rows per slot to choose tiles for, where R is a
    worst case; it never changes which rows are right. `backend`: see `choose_backend`.
    Raises KernelError on shapes, dtypes or strides that do not fit.
    """
    check_product(OP, x, w, psum)
    data = x if isinstance(x, Tensor) else x.data
    check_row_weights(OP, row_weights, data.shape[0])
    chosen = choose_backend(data, backend, op=OP, offered=BACKENDS)
    if chosen == "torch":
        located = ragged_rows(psum, data.shape[0], alignment=alignment)
        return _torch(x, w, located, out_dtype, row_weights, batch_invariant)
    rows = RowMarks(psum, None, alignment)
    return _compiled(chosen, x, w, rows, out_dtype, row_weights, expected_rows, batch_invariant)


def grouped_gemm_padded(
    x: Activations,
    w: SlotWeights,
    counts: Tensor,
    *,
    row_weights: Tensor | None = None,
    expected_rows: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x [E, C, K]` of which the first `counts[e]` (`counts [E] int32`) rows are real, `w [E, N, K]` -> `[E, C, N]`.

    Results past a count are unspecified, and what lies there never reaches a real row. `row_weights [E, C]`. Otherwise
    as `grouped_gemm_ragged`.
    """
    check_product(OP, x, w, counts)
    data = x if isinstance(x, Tensor) else x.data
    slots, capacity, _ = data.shape
    weights = None if row_weights is None else row_weights.flatten()
    check_row_weights(OP, weights, slots * capacity)
    chosen = choose_backend(data, backend, op=OP, offered=BACKENDS)
    flat = flat_rows(OP, x, chosen)
    if chosen == "torch":
        out = _torch(flat, w, padded_rows(counts, capacity), out_dtype, weights, batch_invariant)
    else:
        rows = RowMarks(counts, capacity)
        out = _compiled(chosen, flat, w, rows, out_dtype, weights, expected_rows, batch_invariant)
    return out.view(slots, capacity, w.shape[1])


def _torch(
    x: Activations,
    w: SlotWeights,
    rows: SlotRows,
    out_dtype: torch.dtype | None,
    row_weights: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    plain = x if isinstance(x, Tensor) else plain_rows(x, result_dtype(x, out_dtype))
    out = eager.grouped(plain, w, rows, batch_invariant=batch_invariant)
    return out if row_weights is None and out_dtype is None else weigh(out, row_weights, out_dtype)


def _compiled(
    backend: str,
    x: Activations,
    w: SlotWeights,
    rows: RowMarks,
    out_dtype: torch.dtype | None,
    row_weights: Tensor | None,
    expected_rows: int | None,
    batch_invariant: bool,
) -> Tensor:
    dtype = result_dtype(x, out_dtype)
    w = unpacked(OP, w)
    x = like_weights(x, w, ue8m0=False, backend=backend)
    if backend == "deep_gemm":
        from moe_kernels.grouped_gemm import deep_gemm

        require(not batch_invariant, f"{OP}: deep_gemm has no batch-invariant mode; take backend='triton'")
        return weigh(deep_gemm.grouped_gemm(x, w, rows, expected_rows=expected_rows), row_weights, dtype)
    from moe_kernels.grouped_gemm import triton as kernels

    result = kernels.grouped_gemm(
        x,
        w,
        rows,
        out_dtype=dtype,
        rows_per_slot=expected_rows,
        row_weights=row_weights,
        batch_invariant=batch_invariant,
    )
    assert isinstance(result, Tensor), "a plain product is not quantised"
    return result
