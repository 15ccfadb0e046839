"""Latent rows in torch. n tokens, h heads, C kv_lora_rank, R rotary width."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.mla.latent import LatentCache, ScaledLatent
from moe_kernels.norm import rms_norm
from moe_kernels.rope import apply_rope


def mla_prepare(
    query_rope: Tensor, down: Tensor, cos: Tensor, sin: Tensor, kv_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`(rotated query [n, h, R], latent [n, C+R])`. The key is rotated as one more head, in the same call."""
    rank = kv_norm.shape[0]
    rotated = apply_rope(torch.cat((query_rope, down[:, None, rank:]), dim=1), cos, sin, backend="torch")
    normed = rms_norm(down[:, :rank], kv_norm, eps, backend="torch")
    return rotated[:, :-1], torch.cat((normed, rotated[:, -1]), dim=-1)


def write_rows_(cache: LatentCache, rows: Tensor, latent: Tensor) -> None:
    """Write `latent [n, C+R]` at `rows [n]`, not where they are negative. Waits for the device."""
    if rows.numel() and int(rows.min()) < 0:
        kept = (rows >= 0).nonzero().squeeze(1)
        rows, latent = rows[kept], latent[kept]
    if isinstance(cache, ScaledLatent):
        cache.write_(rows, latent, backend="torch")
    else:
        cache.view(-1, cache.shape[-1]).index_copy_(0, rows, latent.to(cache.dtype))
