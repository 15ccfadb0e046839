"""Quantisation to fp8 e4m3 with fp32 scales. R rows, E slots, N x K a weight, G scales of a row.

A scale is `max(amax, 1e-4) / 448` of its block and a value `x * (1 / scale)`, rounded to nearest (DeepSeek's rule, as
in DeepGEMM's casts). With `ue8m0` the scale is rounded up to a power of two. A block that holds a NaN or an infinity
has an infinite scale, so that all of it comes back as NaN instead of as plausible numbers.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend, require
from moe_kernels.quant import eager
from moe_kernels.scaled import BlockScaled

__all__ = ["SCALE_LAYOUTS", "dequantize", "quantize_blocks", "quantize_rows"]

SCALE_LAYOUTS: Final = ("row", "mn")
"""`row`: scales `[R, G]` contiguous. `mn`: rows are adjacent in memory and columns a multiple of 4 rows (16 bytes)
apart, as TMA loads of DeepGEMM and DeepEP want them; the shape is `[R, G]` in both."""

_INPUTS: Final = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(
    x: Tensor, *, group: int = 128, ue8m0: bool = False, scale_layout: str = "row", backend: str | None = None
) -> BlockScaled:
    """`x [R, K]` fp32, bf16 or fp16, rows of unit stride -> `data [R, K]`, `scale [R, ceil(K/group)]`.

    One scale per row and `group` columns (a power of two, 16..1024); the last group of a row may be short. A row's bits
    depend on that row alone. `backend`: see `choose_backend`; both give the same bits.
    Raises KernelError on another dtype, layout, group or stride.
    """
    _check_input(x, "quantize_rows", (2,))
    _check_group(group, "quantize_rows")
    check_layout(scale_layout, "quantize_rows")
    if choose_backend(x, backend, op="quantize_rows") == "torch":
        return eager.quantize_rows(x, group, ue8m0, scale_layout)
    from moe_kernels.quant import triton as kernels

    return kernels.quantize_rows(x, group, ue8m0, scale_layout)


def quantize_blocks(w: Tensor, *, block: int = 128, ue8m0: bool = False, backend: str | None = None) -> BlockScaled:
    """`w [N, K]` or `[E, N, K]`, contiguous -> `data` like w, `scale [(E,) ceil(N/block), ceil(K/block)]`.

    One scale per `block` x `block` values (a power of two, 16..128). Raises KernelError on another dtype or layout.
    """
    _check_input(w, "quantize_blocks", (2, 3))
    _check_group(block, "quantize_blocks", 128)
    require(
        w.is_contiguous(), f"quantize_blocks: w has strides {w.stride()}; it must be contiguous; call .contiguous()"
    )
    slots = w if w.dim() == 3 else w.unsqueeze(0)
    if choose_backend(w, backend, op="quantize_blocks") == "torch":
        scaled = eager.quantize_blocks(slots, block, ue8m0)
    else:
        from moe_kernels.quant import triton as kernels

        scaled = kernels.quantize_blocks(slots, block, ue8m0)
    return scaled if w.dim() == 3 else BlockScaled(scaled.data[0], scaled.scale[0])


def dequantize(
    scaled: BlockScaled,
    *,
    block: tuple[int, int] = (1, 128),
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """`data * scale` in fp32, rounded to `dtype`; shaped as `scaled.data`, `[R, K]` or `[E, N, K]`.

    `block` is (rows, columns) of one scale: (1, 128) undoes `quantize_rows`, (128, 128) `quantize_blocks`.
    Raises KernelError where the scales do not fit.
    """
    data, scale = scaled.data, scaled.scale
    want = (*data.shape[:-2], *(-(-size // edge) for size, edge in zip(data.shape[-2:], block, strict=True)))
    require(
        data.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == want,
        f"dequantize: data is {tuple(data.shape)} {data.dtype} and scale {tuple(scale.shape)} {scale.dtype}; with "
        f"blocks of {block} they must be float8_e4m3fn and {want} float32",
    )
    _check_group(block[1], "dequantize")
    if choose_backend(data, backend, op="dequantize") == "torch":
        return eager.dequantize(data, scale, block, dtype)
    from moe_kernels.quant import triton as kernels

    return kernels.dequantize(data, scale, block, dtype)


def check_layout(layout: str, op: str) -> None:
    """KernelError unless `layout` is one of SCALE_LAYOUTS."""
    require(
        layout in SCALE_LAYOUTS,
        f"{op}: scale_layout={layout!r} is not there; choose one of {', '.join(SCALE_LAYOUTS)}",
    )


def _check_group(group: int, op: str, most: int = 1024) -> None:
    require(
        16 <= group <= most and group & (group - 1) == 0,
        f"{op}: {group} values share a scale; it must be a power of two, 16..{most}; take 128, as the products do",
    )


def _check_input(x: Tensor, op: str, dims: tuple[int, ...]) -> None:
    require(
        x.dim() in dims and x.dtype in _INPUTS and (x.stride(-1) == 1 or x.shape[-1] <= 1),
        f"{op}: x is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; it must have {' or '.join(map(str, dims))} "
        "dims, be fp32, bf16 or fp16 and have rows of unit stride; call .contiguous()",
    )
