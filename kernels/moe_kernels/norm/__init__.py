"""RMS norm. T tokens, H width."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., H]`, `weight [H]` -> `weight * x / sqrt(mean(x^2) + eps)` in x's dtype, computed in fp32.

    A row's bits depend on that row alone (the tests check it over widths, row counts, positions and memory offsets).
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`, both `[..., H]` in x's dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total
