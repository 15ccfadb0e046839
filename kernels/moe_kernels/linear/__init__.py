"""Dense linear layer. T rows, K input width, N output width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.errors import KernelError
from moe_kernels.linear.tiles import tiled_linear

__all__ = ["linear"]


def linear(x: Tensor, w: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """`x [..., K] @ w [N, K]^T -> [..., N]`, one dtype (fp32 or bf16).

    With `batch_invariant` a row's bits depend on that row and `w` alone.
    Raises KernelError where widths or dtypes differ.
    """
    if x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        raise KernelError(
            f"linear got x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}; "
            f"x must be [..., {w.shape[1]}] {w.dtype}"
        )
    if not batch_invariant:
        return F.linear(x, w)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    tiled_linear(rows, w, out=out)
    return out.view(*x.shape[:-1], w.shape[0])
