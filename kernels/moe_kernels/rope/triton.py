"""Rotary position embedding in Triton: one program per token and block of heads. T tokens, h heads, R rotary width."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require


@triton.jit
def rotate_store(
    x_ptr,
    x_stride,
    out_ptr,
    out_stride,
    cos_ptr,
    sin_ptr,
    rows,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Turn `rows` of at most ROWS rows of R values, pairs interleaved, and store them de-interleaved."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 2 * HALF)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=(row < rows) & (column < R), other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(x, [ROWS, HALF, 2]))
    pair = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + pair, mask=pair < R // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=pair < R // 2, other=0.0).to(tl.float32)
    inside = (row < rows) & (pair < R // 2)
    out = out_ptr + row * out_stride + pair
    tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + R // 2, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    x_token_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    rotate_store(
        x_ptr + token * x_token_stride + head * x_head_stride,
        x_head_stride,
        out_ptr + (token * heads + head) * R,
        R,
        cos_ptr + token * cos_stride,
        sin_ptr + token * sin_stride,
        heads - head,
        R,
        ROWS,
        HALF,
    )


def tile(heads: int, width: int) -> tuple[int, int, int]:
    """(heads of one program, pairs rounded up, warps).

    By reasoning, not yet measured on hardware: 2048 values for 4 warps, 32 bytes of bf16 per thread; 128 tokens of 128
    heads make 512 programs for 132 SMs.
    """
    half = triton.next_power_of_2(width // 2)
    rows = min(max(1, 1024 // half), triton.next_power_of_2(heads))
    return rows, half, max(1, min(4, rows * half // 256))


def check_tables(cos: Tensor, sin: Tensor, op: str) -> None:
    """KernelError unless rows of cos and sin have unit stride."""
    require(
        cos.shape[1] == 1 or (cos.stride(1) == 1 and sin.stride(1) == 1),
        f"{op}: cos and sin have strides {cos.stride()} and {sin.stride()}; rows must have unit stride; call "
        ".contiguous()",
    )


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, ..., R]`, `cos, sin [T, R/2]` -> `[T, ..., R]`, contiguous."""
    width = x.shape[-1]
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    rows = x.unsqueeze(1) if x.dim() == 2 else x if x.dim() == 3 else x.reshape(x.shape[0], -1, width)
    require(
        rows.stride(2) == 1,
        f"apply_rope: x is {tuple(x.shape)} with strides {x.stride()}; rows must have unit stride; call .contiguous()",
    )
    check_tables(cos, sin, "apply_rope")
    heads = rows.shape[1]
    tile_rows, half, num_warps = tile(heads, width)
    rope_kernel[(x.shape[0], triton.cdiv(heads, tile_rows))](
        rows,
        out,
        cos,
        sin,
        heads,
        rows.stride(0),
        rows.stride(1),
        cos.stride(0),
        sin.stride(0),
        R=width,
        ROWS=tile_rows,
        HALF=half,
        num_warps=num_warps,
        # As torch: products are rounded before their sum.
        enable_fp_fusion=False,
    )
    return out


def aot_cases() -> Iterator[AotCase]:
    """DeepSeek-V3's rotary width with 128, 32 (tp=4) and 1 heads; the demo model."""
    for heads, width in ((128, 64), (32, 64), (1, 64), (8, 16)):
        rows, half, num_warps = tile(heads, width)
        yield AotCase(
            op="rope",
            name=f"rope h{heads} R{width}",
            kernel=rope_kernel,
            signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "heads": "i32"}
            | dict.fromkeys(("x_token_stride", "x_head_stride", "cos_stride", "sin_stride"), "i32"),
            constants={"R": width, "ROWS": rows, "HALF": half},
            num_warps=num_warps,
            aligned=("x_ptr", "out_ptr", "cos_ptr", "sin_ptr", "x_token_stride", "x_head_stride"),
            fp_fusion=False,
            quick=heads == 128,
        )
