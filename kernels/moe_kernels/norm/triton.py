"""RMS norm in Triton: one program per row, the row held in registers. T tokens, H width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require

MAX_WIDTH = 16_384
"""Widest row that one program holds (DeepSeek-V3: 7168)."""


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * H + columns, mask=inside, other=0.0).to(tl.float32)
        # The sum is rounded to the stream's dtype first, as torch's `x + residual` is.
        total = (wide + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * H + columns, total, mask=inside)
        wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=0) / H
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = wide * (1.0 / tl.sqrt(mean + eps)) * weight
    tl.store(out_ptr + row * H + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def _num_warps(block: int) -> int:
    """16 bytes of bf16 per thread and load, as far as 16 warps."""
    return min(16, max(1, block // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x [T, H]` with unit stride in rows, `weight [H]` -> `(normed [T, H], x + residual or x)`."""
    rows, width = x.shape
    require(
        0 < width <= MAX_WIDTH and x.stride(1) == 1 and weight.is_contiguous(),
        f"rms_norm: x is {tuple(x.shape)} with strides {x.stride()}; rows must be contiguous and at most {MAX_WIDTH} "
        "wide; call .contiguous()",
    )
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if rows:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            total,
            x.stride(0),
            eps,
            H=width,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=_num_warps(block),
        )
    return out, total


def aot_cases() -> Iterator[AotCase]:
    """The widths of DeepSeek-V3: hidden, query rank, latent; with and without the residual."""
    for width, add in ((7168, True), (7168, False), (1536, False), (512, False)):
        block = triton.next_power_of_2(width)
        yield AotCase(
            op="norm",
            name=f"{'add_' if add else ''}rms_norm H{width}",
            kernel=rms_norm_kernel,
            signature={
                "x_ptr": "*bf16",
                "residual_ptr": "*bf16",
                "weight_ptr": "*bf16",
                "out_ptr": "*bf16",
                "total_ptr": "*bf16",
                "x_stride": "i32",
                "eps": "fp32",
            },
            constants={"H": width, "BLOCK": block, "ADD": add},
            num_warps=_num_warps(block),
            aligned=("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "total_ptr", "x_stride"),
            quick=add,
        )
