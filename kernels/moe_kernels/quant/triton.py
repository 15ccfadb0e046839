"""Quantisation to fp8 in Triton. R rows, E slots, N x K a weight, G scales of a row.

One program takes a tile of whole groups; nothing is shared between programs, so a tile's size never shows in the bits.
Divisions are `div_rn`: Triton's `/` is approximate (div.full.f32), and the bits are to equal torch's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import interpreted
from moe_kernels.quant.eager import FP8, empty_scale
from moe_kernels.scaled import BlockScaled


@triton.jit
def finite_magnitude(x):
    """|x|, NaN as infinity: a maximum on the GPU drops NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scale_of(amax, UE8M0: tl.constexpr):
    """The scale of a block whose largest magnitude is `amax`."""
    scale = tl.div_rn(tl.maximum(amax, 1e-4), tl.full(amax.shape, 448.0, tl.float32))
    if UE8M0:
        # Adding all mantissa bits carries into the exponent unless they are 0 already; infinity stays.
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def quantized_groups(x, UE8M0: tl.constexpr):
    """`x [rows, groups, GROUP] fp32` -> (what e4m3 is to hold, likewise; scale [rows, groups])."""
    scale = scale_of(tl.max(finite_magnitude(x), axis=2), UE8M0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return x * inverse[:, :, None], scale


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    R,
    x_stride,
    scale_row_stride,
    scale_group_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    UE8M0: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = (row < R)[:, None, None] & (column < K)
    x = tl.load(x_ptr + row[:, None, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    values, scale = quantized_groups(x, UE8M0)
    tl.store(data_ptr + row[:, None, None] * K + column, values.to(data_ptr.dtype.element_ty), mask=inside)
    scale_at = scale_ptr + row[:, None] * scale_row_stride + group[None, :] * scale_group_stride
    tl.store(scale_at, scale, mask=(row < R)[:, None] & (group * GROUP < K)[None, :])


@triton.jit
def quantize_blocks_kernel(
    w_ptr, data_ptr, scale_ptr, N, K: tl.constexpr, BLOCK: tl.constexpr, UE8M0: tl.constexpr, GROUPS: tl.constexpr
):
    i, j, slot = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = i * BLOCK + tl.arange(0, BLOCK)
    column = j * BLOCK + tl.arange(0, BLOCK)
    inside = (row < N)[:, None] & (column < K)[None, :]
    place = slot * N * K + row[:, None].to(tl.int64) * K + column[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(finite_magnitude(w), axis=1), axis=0, keep_dims=True), UE8M0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    tl.store(data_ptr + place, (w * inverse[:, None]).to(data_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + (slot * tl.num_programs(1) + i) * GROUPS + j + tl.arange(0, 1), scale)


@triton.jit
def dequantize_kernel(
    data_ptr,
    scale_ptr,
    out_ptr,
    N,
    data_stride,
    scale_slot_stride,
    scale_row_stride,
    scale_group_stride,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    slot = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    scale_at = slot * scale_slot_stride + (row // BLOCK_ROWS * scale_row_stride)[:, None]
    known = (row < N)[:, None] & (group * GROUP < K)[None, :]
    scale = tl.load(scale_ptr + scale_at + group[None, :] * scale_group_stride, mask=known, other=0.0)
    column = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = (row < N)[:, None, None] & (column < K)
    place = slot * N + row[:, None, None]
    data = tl.load(data_ptr + place * data_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place * K + column, (data * scale[:, :, None]).to(out_ptr.dtype.element_ty), mask=inside)


def empty_fp8(*shape: int, device: torch.device) -> Tensor:
    """What kernels write fp8 to; `.to(FP8)` the result. fp32 under the interpreter, which rounds to fp8 wrongly."""
    return torch.empty(shape, dtype=torch.float32 if interpreted() else FP8, device=device)


def rows_tile(rows: int, group: int) -> tuple[int, int]:
    """(rows, groups) of one program's tile.

    By reasoning, not yet measured on hardware: 1024 values of one row where rows are few, so that 32 rows of 7168 make
    224 programs for 132 SMs; else 4096 values, 32 for each of 128 threads, over 4 rows.
    """
    groups = max(1, 1024 // group)
    return (1, groups) if rows <= 512 else (4, groups)


def quantize_rows(x: Tensor, group: int, ue8m0: bool, layout: str) -> BlockScaled:
    rows, width = x.shape
    groups = triton.cdiv(width, group)
    data, scale = empty_fp8(rows, width, device=x.device), empty_scale(rows, groups, layout, x.device)
    if rows and width:
        tile_rows, tile_groups = rows_tile(rows, group)
        quantize_rows_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(groups, tile_groups))](
            x,
            data,
            scale,
            rows,
            x.stride(0),
            scale.stride(0),
            scale.stride(1),
            K=width,
            GROUP=group,
            ROWS=tile_rows,
            GROUPS=tile_groups,
            UE8M0=ue8m0,
            num_warps=tile_rows,
        )
    return BlockScaled(data.to(FP8), scale)


def quantize_blocks(w: Tensor, block: int, ue8m0: bool) -> BlockScaled:
    slots, rows, columns = w.shape
    grid = (triton.cdiv(columns, block), triton.cdiv(rows, block), slots)
    data = empty_fp8(slots, rows, columns, device=w.device)
    scale = torch.empty(slots, grid[1], grid[0], dtype=torch.float32, device=w.device)
    if w.numel():
        quantize_blocks_kernel[grid](
            w, data, scale, rows, K=columns, BLOCK=block, UE8M0=ue8m0, GROUPS=grid[0], num_warps=8
        )
    return BlockScaled(data.to(FP8), scale)


def dequantize(data: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    flat = data if data.is_contiguous() else data.contiguous()
    slots, rows, columns = (1, *flat.shape) if flat.dim() == 2 else flat.shape
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    if out.numel():
        groups = max(1, 1024 // block[1])
        dequantize_kernel[(triton.cdiv(columns, groups * block[1]), triton.cdiv(rows, 4), slots)](
            flat,
            scale,
            out,
            rows,
            columns,
            scale.stride(0) if scale.dim() == 3 else 0,
            scale.stride(-2),
            scale.stride(-1),
            K=columns,
            BLOCK_ROWS=block[0],
            GROUP=block[1],
            ROWS=4,
            GROUPS=groups,
            num_warps=4,
        )
    return out


def aot_cases() -> Iterator[AotCase]:
    """Activations (with scales of powers of two too) and weights of DeepSeek-V3 and of the demo model (hidden 128,
    width 32)."""
    tiles = ((7168, (4, 8)), (7168, (1, 8)), (2048, (4, 8)), (128, (1, 8)), (32, (4, 8)))
    for (width, tile), ue8m0 in (*((shape, False) for shape in tiles), *((shape, True) for shape in tiles[:3])):
        yield AotCase(
            op="quant",
            name=f"quantize_rows K{width} tile {tile[0]}x{tile[1]}{' ue8m0' if ue8m0 else ''}",
            kernel=quantize_rows_kernel,
            signature={"x_ptr": "*bf16", "data_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "R": "i32"}
            | {"x_stride": "i32", "scale_row_stride": "i32", "scale_group_stride": "i32"},
            constants={"K": width, "GROUP": 128, "ROWS": tile[0], "GROUPS": tile[1], "UE8M0": ue8m0},
            num_warps=tile[0],
            aligned=("x_ptr", "data_ptr", "scale_ptr", "x_stride"),
            quick=(width, tile, ue8m0) == (7168, (4, 8), False),
        )
    for width in (7168, 2048, 128):
        yield AotCase(
            op="quant",
            name=f"quantize_blocks K{width}",
            kernel=quantize_blocks_kernel,
            signature={"w_ptr": "*bf16", "data_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "N": "i32"},
            constants={"K": width, "BLOCK": 128, "UE8M0": False, "GROUPS": triton.cdiv(width, 128)},
            num_warps=8,
            aligned=("w_ptr", "data_ptr", "scale_ptr", "N"),
            quick=width == 7168,
        )
        for block in (1, 128):
            strides = ("data_stride", "scale_slot_stride", "scale_row_stride", "scale_group_stride")
            yield AotCase(
                op="quant",
                name=f"dequantize K{width} block {block}x128",
                kernel=dequantize_kernel,
                signature={"data_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_ptr": "*bf16", "N": "i32"}
                | dict.fromkeys(strides, "i32"),
                constants={"K": width, "BLOCK_ROWS": block, "GROUP": 128, "ROWS": 4, "GROUPS": 8},
                num_warps=4,
                aligned=("data_ptr", "scale_ptr", "out_ptr", "data_stride"),
                quick=(width, block) == (7168, 128),
            )
