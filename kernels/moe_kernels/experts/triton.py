"""The experts' MLP in Triton: two launches. R rows, H hidden, I intermediate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.grouped_gemm import triton as gemm
from moe_kernels.grouped_gemm.layout import RowMarks
from moe_kernels.grouped_gemm.triton import Operand
from moe_kernels.scaled import BlockScaled


def gate_up(
    x: Operand, w13: Operand, rows: RowMarks, *, rows_per_slot: int | None, ue8m0: bool, batch_invariant: bool
) -> Operand:
    """`x [R, H]`, `w13 [E, 2I, H]` -> `silu(gate) * up [R, I]`: in x's dtype, or fp8 with scales for BlockScaled."""
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
    """The first product; the second is the grouped GEMM's."""
    yield from gemm.aot_cases("experts", swiglu=True)
