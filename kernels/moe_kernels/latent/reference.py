"""Oracle of `mla_prepare_`: fp64, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.norm.reference import rms_norm_reference
from moe_kernels.rope.reference import apply_rope_reference


def latent_reference(down: Tensor, cos: Tensor, sin: Tensor, kv_norm: Tensor, eps: float) -> Tensor:
    """`down [n, C+R]` -> latent rows `[n, C+R]` fp64."""
    rank = kv_norm.shape[0]
    normed = rms_norm_reference(down[:, :rank], kv_norm, eps)
    return torch.cat((normed, apply_rope_reference(down[:, rank:], cos, sin)), dim=-1)
