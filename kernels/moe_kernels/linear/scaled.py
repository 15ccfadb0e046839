"""Products with a block-scaled fp8 weight: the grouped GEMM with one slot. T tokens, K input width, N output width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.backends import require
from moe_kernels.grouped_gemm import grouped_gemm_ragged
from moe_kernels.grouped_gemm.layout import every_row
from moe_kernels.linear import cublas
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BLOCK, BlockScaled, num_blocks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def scaled_linear(
    x: Tensor | BlockScaled, w: BlockScaled, *, batch_invariant: bool, ue8m0: bool, backend: str | None
) -> Tensor:
    """`x [..., K] @ w [N, K]^T -> [..., N]`; see `linear`."""
    _check(x, w)
    if backend == "cublas":
        require(not batch_invariant, "linear: cublas has no batch-invariant mode; take backend='triton'")
        return _by_cublas(x, w, ue8m0)
    rows = _quantized(x.reshape(-1, x.shape[-1]), ue8m0, backend) if isinstance(x, Tensor) else x
    total, device = rows.shape[0], rows.data.device
    # DeepGEMM reads as many rows as it is told; the others stop at the last one.
    exact = backend == "deep_gemm"
    out = grouped_gemm_ragged(
        rows,
        BlockScaled(w.data.unsqueeze(0), w.scale.unsqueeze(0)),
        torch.full((1,), total, dtype=torch.int32, device=device) if exact else every_row(device),
        alignment=BLOCK,
        out_dtype=x.dtype if isinstance(x, Tensor) else torch.bfloat16,
        backend=backend,
        batch_invariant=batch_invariant,
    )
    return out.view(*x.shape[:-1], w.shape[0])


def _by_cublas(x: Tensor | BlockScaled, w: BlockScaled, ue8m0: bool) -> Tensor:
    """Rows filled up to a multiple of what cuBLASLt takes; those that come quantised must be such already."""
    if isinstance(x, BlockScaled):
        return cublas.scaled_product(x, w)
    rows = x.reshape(-1, x.shape[-1])
    total = rows.shape[0]
    if total == 0:
        return x.new_empty(*x.shape[:-1], w.shape[0])
    filled = F.pad(rows, (0, 0, 0, -total % cublas.ROW_UNIT)) if total % cublas.ROW_UNIT else rows
    out = cublas.scaled_product(quantize_rows(filled, ue8m0=ue8m0, scale_layout="mn"), w)
    return out[:total].to(x.dtype).view(*x.shape[:-1], w.shape[0])


def _quantized(x: Tensor, ue8m0: bool, backend: str | None) -> BlockScaled:
    return quantize_rows(x, ue8m0=ue8m0, scale_layout="mn", backend=None if backend == "deep_gemm" else backend)


def _check(x: Tensor | BlockScaled, w: BlockScaled) -> None:
    n, k = w.shape
    want = (num_blocks(n), num_blocks(k))
    require(
        w.data.dtype is torch.float8_e4m3fn
        and w.scale.dtype is torch.float32
        and w.scale.shape == want
        and w.scale.is_contiguous(),
        f"linear: w is {(n, k)} {w.data.dtype} with scales {tuple(w.scale.shape)} {w.scale.dtype}; they must be "
        f"float8_e4m3fn and {want} float32, contiguous",
    )
    if isinstance(x, BlockScaled):
        want = (*x.shape[:-1], num_blocks(k))
        seen = f"{tuple(x.shape)} {x.data.dtype} with scales {tuple(x.scale.shape)}"
        fits = x.data.dim() == 2 and x.shape[1] == k and x.scale.shape == want
    else:
        seen = f"{tuple(x.shape)} {x.dtype}"
        fits = x.shape[-1] == k and x.dtype in FLOATS
    require(
        fits,
        f"linear got x {seen} and block-scaled w {(n, k)}; x must be [..., {k}] of {', '.join(map(str, FLOATS))}, or "
        f"fp8 [T, {k}] with scales [T, {num_blocks(k)}]",
    )
