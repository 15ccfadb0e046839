"""Latent rows in Triton: one launch for the query's rotation, the key's norm and rotation, and the write to the cache.

n tokens, h heads, C kv_lora_rank, R rotary width. Per token one program makes the latent row, the others turn heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import interpreted, require
from moe_kernels.mla.latent import GROUP, LatentCache, ScaledLatent
from moe_kernels.quant.triton import quantized_groups
from moe_kernels.rope.triton import check_tables, rotate_store, tile


@triton.jit
def store_latent(
    out_ptr,
    normed,
    down_ptr,
    cos_ptr,
    sin_ptr,
    C: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
):
    """Store one latent row, rounded to down's dtype first, then to out's."""
    column = tl.arange(0, RANK)
    rounded = normed.to(down_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, rounded, mask=column < C)
    store_rope(out_ptr + C, down_ptr, cos_ptr, sin_ptr, C, R, HALF)


@triton.jit
def store_quantized(
    data_ptr, scale_ptr, normed, down_ptr, C: tl.constexpr, RANK: tl.constexpr, GROUP_WIDTH: tl.constexpr
):
    """Store the latent part of one row, rounded to down's dtype first, with a scale per GROUP_WIDTH columns."""
    groups: tl.constexpr = RANK // GROUP_WIDTH
    rounded = normed.to(down_ptr.dtype.element_ty).to(tl.float32)
    values, scale = quantized_groups(tl.reshape(rounded, [1, groups, GROUP_WIDTH]), False)
    group = tl.arange(0, groups)
    column = group[None, :, None] * GROUP_WIDTH + tl.arange(0, GROUP_WIDTH)[None, None, :]
    tl.store(data_ptr + column, values.to(data_ptr.dtype.element_ty), mask=column < C)
    tl.store(scale_ptr + group[None, :], scale, mask=(group * GROUP_WIDTH < C)[None, :])


@triton.jit
def store_rope(out_ptr, down_ptr, cos_ptr, sin_ptr, C: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """Store the rotated part of one row, rounded to down's dtype first, then to out's."""
    inner = down_ptr.dtype.element_ty
    outer = out_ptr.dtype.element_ty
    rope = tl.arange(0, 2 * HALF)
    x = tl.load(down_ptr + C + rope, mask=rope < R, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(x, [HALF, 2]))
    pair = tl.arange(0, HALF)
    inside = pair < R // 2
    cos = tl.load(cos_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair, (first * cos - second * sin).to(inner).to(outer), mask=inside)
    tl.store(out_ptr + R // 2 + pair, (second * cos + first * sin).to(inner).to(outer), mask=inside)


@triton.jit
def prepare_kernel(
    query_ptr,
    down_ptr,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    out_ptr,
    latent_ptr,
    cache_ptr,
    scale_ptr,
    rope_ptr,
    cache_rows_ptr,
    heads,
    query_token_stride,
    query_head_stride,
    down_stride,
    cos_stride,
    sin_stride,
    eps,
    C: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    CACHE: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    if part == 0:
        down_ptr += token * down_stride
        column = tl.arange(0, RANK)
        x = tl.load(down_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        normed = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / C + eps)) * weight
        if KEEP:
            store_latent(latent_ptr + token * (C + R), normed, down_ptr, cos_ptr, sin_ptr, C, RANK, R, HALF)
        if CACHE:
            row = tl.load(cache_rows_ptr + token)
            if row >= 0:
                if GROUP_WIDTH:
                    scales: tl.constexpr = (C + GROUP_WIDTH - 1) // GROUP_WIDTH
                    store_quantized(
                        cache_ptr + row * C, scale_ptr + row * scales, normed, down_ptr, C, RANK, GROUP_WIDTH
                    )
                    store_rope(rope_ptr + row * R, down_ptr, cos_ptr, sin_ptr, C, R, HALF)
                else:
                    store_latent(cache_ptr + row * (C + R), normed, down_ptr, cos_ptr, sin_ptr, C, RANK, R, HALF)
    else:
        head = (part - 1) * ROWS
        rotate_store(
            query_ptr + token * query_token_stride + head * query_head_stride,
            query_head_stride,
            out_ptr + (token * heads + head) * R,
            R,
            cos_ptr,
            sin_ptr,
            heads - head,
            R,
            ROWS,
            HALF,
        )


def mla_prepare(
    query_rope: Tensor,
    down: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_norm: Tensor,
    eps: float,
    cache: LatentCache | None,
    cache_rows: Tensor | None,
    keep_latent: bool,
) -> tuple[Tensor, Tensor | None]:
    """`(rotated query [n, h, R], latent [n, C+R] or None)`."""
    tokens, heads, width = query_rope.shape
    rank = kv_norm.shape[0]
    require(
        query_rope.stride(2) == 1 and down.stride(1) == 1 and kv_norm.is_contiguous(),
        f"mla_prepare_: strides are query_rope {query_rope.stride()}, down {down.stride()} and kv_norm "
        f"{kv_norm.stride()}; rows must have unit stride; call .contiguous()",
    )
    require(
        cache_rows is None or cache_rows.is_contiguous(),
        "mla_prepare_: cache_rows is a slice with a stride; it must be contiguous; call .contiguous()",
    )
    check_tables(cos, sin, "mla_prepare_")
    out = query_rope.new_empty(tokens, heads, width)
    latent = torch.empty(tokens, rank + width, dtype=down.dtype, device=down.device) if keep_latent else None
    written = _written(cache, down)
    if tokens:
        rows, half, num_warps = tile(heads, width)
        prepare_kernel[(tokens, 1 + triton.cdiv(heads, rows))](
            query_rope,
            down,
            cos,
            sin,
            kv_norm,
            out,
            down if latent is None else latent,
            *written,
            down if cache_rows is None else cache_rows,
            heads,
            query_rope.stride(0),
            query_rope.stride(1),
            down.stride(0),
            cos.stride(0),
            sin.stride(0),
            eps,
            C=rank,
            RANK=triton.next_power_of_2(rank),
            R=width,
            ROWS=rows,
            HALF=half,
            CACHE=cache is not None,
            KEEP=keep_latent,
            GROUP_WIDTH=_group_width(rank) if isinstance(cache, ScaledLatent) else 0,
            num_warps=num_warps,
            # As torch: products are rounded before their sum.
            enable_fp_fusion=False,
        )
    if isinstance(cache, ScaledLatent) and written[0] is not cache.data:
        cache.data.copy_(written[0])
    return out, latent


def _written(cache: LatentCache | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel writes: rows or their fp8 values, scales, rotary part. The interpreter rounds to fp8 wrongly, so
    it gets a copy in fp32, which torch rounds."""
    if not isinstance(cache, ScaledLatent):
        return unused if cache is None else cache, unused, unused
    return cache.data.float() if interpreted() else cache.data, cache.scale, cache.rope


def _group_width(rank: int) -> int:
    """Columns that share a scale, within the power of two that holds a row."""
    return min(GROUP, int(triton.next_power_of_2(rank)))


def aot_cases() -> Iterator[AotCase]:
    """DeepSeek-V3 (C 512, R 64) with 128 and 32 (tp=4) heads, and the demo model, to plain and to fp8 caches;
    geometry: see `rope.triton.tile`."""
    strides = ("query_token_stride", "query_head_stride", "down_stride", "cos_stride", "sin_stride")
    halves = ("query_ptr", "down_ptr", "norm_ptr", "out_ptr", "latent_ptr", "cache_ptr", "scale_ptr", "rope_ptr")
    for heads, rank, width, keep, scaled in (
        (128, 512, 64, False, False),
        (32, 512, 64, False, False),
        (32, 512, 64, True, False),
        (8, 64, 16, True, False),
        (128, 512, 64, False, True),
        (32, 512, 64, False, True),
        (8, 64, 16, False, True),
    ):
        rows, half, num_warps = tile(heads, width)
        yield AotCase(
            op="latent",
            name=f"mla_prepare h{heads} C{rank} R{width}{' keep' if keep else ''}{' fp8 cache' if scaled else ''}",
            kernel=prepare_kernel,
            signature=dict.fromkeys(halves, "*bf16")
            | ({"cache_ptr": "*fp8e4nv", "scale_ptr": "*fp32"} if scaled else {})
            | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "cache_rows_ptr": "*i64", "eps": "fp32", "heads": "i32"}
            | dict.fromkeys(strides, "i32"),
            constants={"C": rank, "RANK": triton.next_power_of_2(rank), "R": width, "ROWS": rows, "HALF": half}
            | {"CACHE": True, "KEEP": keep, "GROUP_WIDTH": _group_width(rank) if scaled else 0},
            num_warps=num_warps,
            aligned=(*halves, "cos_ptr", "sin_ptr", "query_token_stride", "query_head_stride", "down_stride"),
            fp_fusion=False,
            quick=heads == 128,
        )
