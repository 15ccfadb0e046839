"""Oracle of the norms: fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., H]` -> `[..., H]` fp64."""
    wide = x.double()
    return weight.double() * wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + eps)
