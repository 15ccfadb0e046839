"""Dense linear layers. T tokens, h heads, K input width, N output width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.errors import KernelError
from moe_kernels.linear.packed import PackedWeight, Weight, onednn_linear, pack, worth_packing
from moe_kernels.linear.tiles import tiled_linear
from moe_kernels.scaled import BlockScaled

__all__ = ["LinearWeight", "PackedWeight", "Weight", "head_linear", "linear", "prepare_weight"]

LinearWeight = Weight | BlockScaled
"""`[N, K]`: plain, packed for oneDNN, or fp8 with a scale per 128 x 128 values."""


def prepare_weight(w: Tensor | BlockScaled) -> LinearWeight:
    """`w [N, K]` in the form that `linear` multiplies fastest here: packed for oneDNN, or `w` itself."""
    if isinstance(w, BlockScaled):
        return w
    return pack(w) if worth_packing((w.shape[0], w.shape[1]), w.dtype, w.device) else w


def linear(
    x: Tensor | BlockScaled,
    w: LinearWeight,
    *,
    batch_invariant: bool = False,
    ue8m0: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`x [..., K] @ w [N, K]^T -> [..., N]` in x's dtype: that of w (fp32 or bf16), any float for a block-scaled w.

    With a block-scaled w, x is quantised per row and 128 values (`quantize_rows`; `ue8m0`: by powers of two), or comes
    as such (`[T, K]`; the result is bf16), and products run as `grouped_gemm_ragged` with one slot on `backend`, which
    others do not heed: `torch` dequantises both; `cublas`, never chosen unasked, is cuBLASLt's own product of blocks.
    With `batch_invariant` a row's bits depend on that row and `w` alone.
    Raises KernelError where widths, dtypes or scales do not fit.
    """
    if isinstance(w, BlockScaled) or isinstance(x, BlockScaled):
        return _scaled(x, w, batch_invariant, ue8m0, backend)
    if x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        raise KernelError(
            f"linear got x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}; "
            f"x must be [..., {w.shape[1]}] {w.dtype}"
        )
    if not batch_invariant and isinstance(w, Tensor):
        return F.linear(x, w)
    rows = x.reshape(-1, x.shape[-1])
    if batch_invariant:
        out = tiled_linear(rows, w)
    elif rows.shape[0] == 0:
        out = rows.new_empty(0, w.shape[0])
    else:
        out = onednn_linear(rows, w)
    return out.view(*x.shape[:-1], w.shape[0])


def _scaled(
    x: Tensor | BlockScaled, w: LinearWeight, batch_invariant: bool, ue8m0: bool, backend: str | None
) -> Tensor:
    from moe_kernels.linear.scaled import scaled_linear  # the grouped GEMM imports this package

    if not isinstance(w, BlockScaled):
        raise KernelError(f"linear got fp8 x with scales and w {tuple(w.shape)} {w.dtype}; w must be BlockScaled too")
    return scaled_linear(x, w, batch_invariant=batch_invariant, ue8m0=ue8m0, backend=backend)


def head_linear(x: Tensor, w: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """One product per head: `x [T, h, K]`, `w [h, N, K]` -> `[T, h, N]`.

    With `batch_invariant` a token's bits depend on that token and `w` alone. Raises KernelError where widths differ.
    """
    if x.shape[1:] != (w.shape[0], w.shape[2]) or x.dtype != w.dtype:
        raise KernelError(
            f"head_linear got x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}; "
            f"x must be [T, {w.shape[0]}, {w.shape[2]}] {w.dtype}"
        )
    if batch_invariant:
        return torch.stack([tiled_linear(part, weight) for part, weight in zip(x.unbind(1), w, strict=True)], dim=1)
    return torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)
