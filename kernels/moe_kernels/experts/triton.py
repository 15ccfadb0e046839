"""The experts' MLP in Triton: two launches, three for one or two slots of few fp8 rows. R rows, H hidden, I width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.grouped_gemm import triton as gemm
from moe_kernels.grouped_gemm.configs import separate_swiglu
from moe_kernels.grouped_gemm.layout import RowMarks
from moe_kernels.grouped_gemm.triton import Operand
from moe_kernels.scaled import BlockScaled
from moe_kernels.swiglu import swiglu_quantized


def gate_up(
    x: Operand, w13: Operand, rows: RowMarks, *, rows_per_slot: int | None, ue8m0: bool, batch_invariant: bool
) -> Operand:
    """`x [R, H]`, `w13 [E, 2I, H]` -> `silu(gate) * up [R, I]`: in x's dtype, or fp8 with scales for BlockScaled.

    In fp8 either way the hidden row is computed in fp32 and rounded once.
    """
    if isinstance(w13, BlockScaled) and not batch_invariant and _apart(x, w13, rows, rows_per_slot):
        products = gemm.grouped_gemm(x, w13, rows, out_dtype=torch.float32, rows_per_slot=rows_per_slot)
        assert isinstance(products, Tensor), "a plain product is not quantised"
        end = rows.marks[-1:] if rows.capacity is None else None
        return swiglu_quantized(products, ue8m0=ue8m0, scale_layout="mn", end=end, backend="triton")
    return gemm.grouped_gemm(
        x,
        w13,
        rows,
        out_dtype=gemm.data_of(x).dtype,
        rows_per_slot=rows_per_slot,
        swiglu=True,
        quantize=isinstance(w13, BlockScaled),
        ue8m0=ue8m0,
        batch_invariant=batch_invariant,
    )


def _apart(x: Operand, w13: BlockScaled, rows: RowMarks, rows_per_slot: int | None) -> bool:
    slots, wide, hidden = w13.shape
    total = gemm.data_of(x).shape[0]
    return bool(slots and total) and separate_swiglu(
        rows_per_slot=rows.mean(total) if rows_per_slot is None else rows_per_slot,
        total_rows=total,
        slots=slots,
        width=wide // 2,
        k=hidden,
    )


def expert_mlp(
    x: Operand,
    w13: Operand,
    w2: Operand,
    rows: RowMarks,
    *,
    out_dtype: torch.dtype,
    rows_per_slot: int | None,
    row_weights: Tensor | None,
    ue8m0: bool,
    batch_invariant: bool,
) -> Tensor:
    """`x [R, H] -> [R, H]`."""
    hidden = gate_up(x, w13, rows, rows_per_slot=rows_per_slot, ue8m0=ue8m0, batch_invariant=batch_invariant)
    out = gemm.grouped_gemm(
        hidden,
        w2,
        rows,
        out_dtype=out_dtype,
        rows_per_slot=rows_per_slot,
        row_weights=row_weights,
        batch_invariant=batch_invariant,
    )
    assert isinstance(out, Tensor), "the second product is not quantised"
    return out


def aot_cases() -> Iterator[AotCase]:
    """The fused first product; the second, and the first where SwiGLU is apart, are the grouped GEMM's."""
    yield from gemm.aot_cases("experts", swiglu=True)
