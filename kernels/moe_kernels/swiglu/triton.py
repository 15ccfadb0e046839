"""SwiGLU in Triton, in fp32, also with fp8 output. R rows, I intermediate width; the gate half comes first."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require
from moe_kernels.quant.eager import FP8, empty_scale
from moe_kernels.quant.triton import empty_fp8, quantized_groups, rows_tile
from moe_kernels.scaled import BlockScaled

GROUP = 128


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` in fp32: g / (1 + exp(-g)), every step but exp correctly rounded."""
    gate = gate.to(tl.float32)
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up.to(tl.float32)


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, R, x_stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < R) & (column < WIDTH)
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + WIDTH + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_quantized_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    end_ptr,
    R,
    x_stride,
    scale_row_stride,
    scale_group_stride,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    UE8M0: tl.constexpr,
    ENDS: tl.constexpr,
):
    if ENDS:  # programs past it load and store nothing
        R = tl.minimum(R, tl.load(end_ptr))
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = (row < R)[:, None, None] & (column < WIDTH)
    here = x_ptr + row[:, None, None] * x_stride + column
    hidden = silu_times(tl.load(here, mask=inside, other=0.0), tl.load(here + WIDTH, mask=inside, other=0.0))
    values, scale = quantized_groups(hidden, UE8M0)
    tl.store(data_ptr + row[:, None, None] * WIDTH + column, values.to(data_ptr.dtype.element_ty), mask=inside)
    scale_at = scale_ptr + row[:, None] * scale_row_stride + group[None, :] * scale_group_stride
    tl.store(scale_at, scale, mask=(row < R)[:, None] & (group * GROUP < WIDTH)[None, :])


def _tile(rows: int, width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of one program; the bits do not depend on it.

    By reasoning, not yet measured on hardware: 1024 values for 4 warps, 16 bytes of bf16 per thread and half; where
    rows are many, 4096 values. Narrow rows share a program.
    """
    columns = min(1024, triton.next_power_of_2(width))
    values = 1024 if rows * width <= 1 << 20 else 4096
    return values // columns, columns, 4


def swiglu(gate_up: Tensor) -> Tensor:
    """`[..., 2I] -> [..., I]` in the input's dtype."""
    x, rows, width = _rows(gate_up)
    out = x.new_empty(rows, width)
    if out.numel():
        tile_rows, columns, num_warps = _tile(rows, width)
        grid = (triton.cdiv(rows, tile_rows), triton.cdiv(width, columns))
        swiglu_kernel[grid](
            x, out, rows, x.stride(0), WIDTH=width, ROWS=tile_rows, COLUMNS=columns, num_warps=num_warps
        )
    return out.view(*gate_up.shape[:-1], width)


def swiglu_quantized(gate_up: Tensor, ue8m0: bool, layout: str, end: Tensor | None) -> BlockScaled:
    """`[R, 2I]` -> `data [R, I]`, `scale [R, ceil(I/128)]`."""
    require(
        gate_up.dim() == 2, f"swiglu_quantized: x is {tuple(gate_up.shape)}; it must be [R, 2I]; call .flatten(0, -2)"
    )
    x, rows, width = _rows(gate_up)
    groups = triton.cdiv(width, GROUP)
    data, scale = empty_fp8(rows, width, device=x.device), empty_scale(rows, groups, layout, x.device)
    if data.numel():
        tile_rows, tile_groups = rows_tile(rows, GROUP)
        swiglu_quantized_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(groups, tile_groups))](
            x,
            data,
            scale,
            x if end is None else end,
            rows,
            x.stride(0),
            scale.stride(0),
            scale.stride(1),
            WIDTH=width,
            GROUP=GROUP,
            ROWS=tile_rows,
            GROUPS=tile_groups,
            UE8M0=ue8m0,
            ENDS=end is not None,
            num_warps=2 * tile_rows,
        )
    return BlockScaled(data.to(FP8), scale)


def _rows(gate_up: Tensor) -> tuple[Tensor, int, int]:
    """(`[R, 2I]` with rows of unit stride, R, I)."""
    x = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, gate_up.shape[-1])
    require(
        x.stride(1) == 1 or not x.numel(),
        f"swiglu: x is {tuple(gate_up.shape)} with strides {gate_up.stride()}; rows must have unit stride; call "
        ".contiguous()",
    )
    return x, x.shape[0], x.shape[1] // 2


def aot_cases() -> Iterator[AotCase]:
    """DeepSeek-V3's shared expert (I 2048), a dense layer (I 18432), both also over tp=4; the demo model (32, 384)."""
    for rows, width in ((32, 2048), (16_384, 2048), (16_384, 18_432), (32, 4608), (32, 512), (32, 32), (4096, 384)):
        tile_rows, columns, num_warps = _tile(rows, width)
        yield AotCase(
            op="swiglu",
            name=f"swiglu I{width} tile {tile_rows}x{columns}",
            kernel=swiglu_kernel,
            signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "R": "i32", "x_stride": "i32"},
            constants={"WIDTH": width, "ROWS": tile_rows, "COLUMNS": columns},
            num_warps=num_warps,
            aligned=("x_ptr", "out_ptr", "R", "x_stride"),
            quick=(rows, width) == (16_384, 2048),
        )
    # From fp32: the experts' first product where SwiGLU is apart.
    quantized = [(rows, width, "bf16") for rows, width in ((32, 2048), (16_384, 2048), (16_384, 18_432), (32, 32))]
    plain = (*quantized, (16, 2048, "fp32"))
    for (rows, width, kind), ue8m0 in (*((case, False) for case in plain), (plain[0], True), (plain[-1], True)):
        tile_rows, groups = rows_tile(rows, GROUP)
        yield AotCase(
            op="swiglu",
            name=f"swiglu_quantized {kind} I{width} tile {tile_rows}x{groups}{' ue8m0' if ue8m0 else ''}",
            kernel=swiglu_quantized_kernel,
            signature={"x_ptr": f"*{kind}", "data_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
            | {"end_ptr": "*i32" if kind == "fp32" else f"*{kind}", "R": "i32", "x_stride": "i32"}
            | {"scale_row_stride": "i32", "scale_group_stride": "i32"},
            constants={"WIDTH": width, "GROUP": GROUP, "ROWS": tile_rows, "GROUPS": groups, "UE8M0": ue8m0}
            | {"ENDS": kind == "fp32"},
            num_warps=2 * tile_rows,
            aligned=("x_ptr", "data_ptr", "scale_ptr", "R", "x_stride"),
            quick=(rows, width) == (16_384, 2048),
        )
