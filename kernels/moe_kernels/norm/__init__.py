"""RMS norm. T tokens, H width."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., H]`, `weight [H]` -> `weight * x / sqrt(mean(x^2) + eps)`, in fp32, rounded to x's dtype before and
    after the weight (as Llama-style models are trained)."""
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`, both `[..., H]` in x's dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total
