"""The weighted sum of a token's rows in Triton: one launch, in top-k order. T tokens, K top-k, H hidden, R rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require


@triton.jit(do_not_specialize=["begin"])
def unpermute_kernel(
    y_ptr,
    rest_ptr,  # rows from `begin` on, where REST
    row_of_ptr,
    weights_ptr,
    out_ptr,
    y_stride,  # of both
    begin,
    H: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_ptr + token * K + k)
        weight = tl.load(weights_ptr + token * K + k)
        first = (row >= 0) & (row < begin) if REST else row >= 0
        y = tl.load(y_ptr + row * y_stride + column, mask=(column < H) & first, other=0.0).to(tl.float32)
        if REST:
            rest = rest_ptr + (row - begin) * y_stride + column
            y = tl.where(row < begin, y, tl.load(rest, mask=(column < H) & (row >= begin), other=0.0).to(tl.float32))
        total += tl.where(row >= 0, y * weight, 0.0)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


def _columns(hidden: int, itemsize: int) -> tuple[int, int]:
    """(columns of one program, its warps): 16 bytes per thread and row, so that K such loads are in flight together.

    By reasoning, not yet measured on hardware: 128 tokens of 7168 bf16 make 896 programs, 7 for each of 132 SMs.
    """
    columns = min(2048 // itemsize, triton.next_power_of_2(hidden))
    return columns, max(1, min(4, columns * itemsize // 512))


def unpermute(y: Tensor, row_of: Tensor, weights: Tensor, dtype: torch.dtype, rest: Tensor | None = None) -> Tensor:
    """`[T, H]` in `dtype`."""
    require(
        y.dim() == 2 and y.stride(1) == 1 and row_of.is_contiguous() and weights.is_contiguous(),
        f"unpermute: strides are y {y.stride()}, row_of {row_of.stride()}, weights {weights.stride()}; y's rows must "
        "have unit stride, the others be contiguous; call .contiguous()",
    )
    require(
        row_of.dtype == torch.int64 and weights.dtype == torch.float32,
        f"unpermute: row_of is {row_of.dtype} and weights {weights.dtype}; they must be int64 and float32",
    )
    if rest is not None:
        require(
            rest.stride() == y.stride() and rest.dtype == y.dtype,
            f"unpermute: y is {y.dtype} of strides {y.stride()}, rest {rest.dtype} of {rest.stride()}; make them agree",
        )
    tokens, k = row_of.shape
    hidden = y.shape[1]
    out = y.new_empty(tokens, hidden, dtype=dtype)
    if not (y.shape[0] or (rest is not None and rest.shape[0])) or not k:
        return out.zero_()
    if out.numel():
        columns, num_warps = _columns(hidden, y.element_size())
        unpermute_kernel[(tokens, triton.cdiv(hidden, columns))](
            y,
            y if rest is None else rest,
            row_of,
            weights,
            out,
            y.stride(0),
            y.shape[0],
            H=hidden,
            K=k,
            COLUMNS=columns,
            REST=rest is not None,
            num_warps=num_warps,
            # A fused multiply-add would round once where torch rounds twice.
            enable_fp_fusion=False,
        )
    return out


def combine_cases() -> Iterator[AotCase]:
    """DeepSeek-V3 (also with a shared expert as ninth column, and to fp32 for a sum over ranks) and the demo model."""
    shapes = ((7168, 8, "bf16"), (7168, 9, "bf16"), (7168, 8, "fp32"), (128, 8, "bf16"))
    for hidden, k, out, rest in (*[(*shape, False) for shape in shapes], (*shapes[0], True)):
        columns, num_warps = _columns(hidden, 2)
        yield AotCase(
            op="permute",
            name=f"unpermute H{hidden} K{k}{' to fp32' if out == 'fp32' else ''}{' of two' if rest else ''}",
            kernel=unpermute_kernel,
            signature={"y_ptr": "*bf16", "rest_ptr": "*bf16", "row_of_ptr": "*i64", "weights_ptr": "*fp32"}
            | {"out_ptr": f"*{out}", "y_stride": "i32", "begin": "i32"},
            constants={"H": hidden, "K": k, "COLUMNS": columns, "REST": rest},
            num_warps=num_warps,
            aligned=("y_ptr", "rest_ptr", "row_of_ptr", "weights_ptr", "out_ptr", "y_stride"),
            fp_fusion=False,
            quick=(hidden, k, out, rest) == (*shapes[0], False),
        )
