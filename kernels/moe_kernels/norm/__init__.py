"""RMS norm. T tokens, H width."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moe_kernels.backends import choose_backend

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """`x [..., H]`, `weight [H]` -> `weight * x / sqrt(mean(x^2) + eps)` in x's dtype, computed in fp32.

    A row's bits depend on that row alone (the tests check it over widths, row counts, positions and memory offsets).
    `backend`: see `choose_backend`.
    """
    if choose_backend(x, backend, op="rms_norm") == "torch":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    from moe_kernels.norm import triton as kernels

    return kernels.rms_norm(_rows(x), weight, eps)[0].view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`, both `[..., H]` in x's dtype."""
    if choose_backend(x, backend, op="add_rms_norm") == "torch":
        total = x + residual
        return rms_norm(total, weight, eps, backend="torch"), total
    from moe_kernels.norm import triton as kernels

    normed, total = kernels.rms_norm(_rows(x), weight, eps, _rows(residual).contiguous())
    return normed.view(x.shape), total.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """`[..., H] -> [T, H]`, without a copy where rows have unit stride."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
