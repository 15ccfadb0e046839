"""Expanded form: keys and values are rebuilt from the latent rows, then ordinary causal attention.

n queries, h heads, Dn/Dv per-head key/value widths, C latent width, R rotary width, L cached rows, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mla_expanded(
    q: Tensor, kv_latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, *, scale: float, start: int
) -> Tensor:
    """`q [n, h, Dn+R]`, `kv_latent [L, C]`, `k_rope [L, R]`, `w_k [h, Dn, C]`, `w_v [h, Dv, C]` -> `[n, h, Dv]`.

    One sequence: query i, at absolute position `start + i`, attends to rows 0..start+i; L >= start + n.
    """
    out = mla_expanded_batched(
        q.unsqueeze(0), kv_latent.unsqueeze(0), k_rope.unsqueeze(0), w_k, w_v, scale=scale, start=start
    )
    return out.squeeze(0)


def mla_expanded_batched(
    q: Tensor, kv_latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, *, scale: float, start: int
) -> Tensor:
    """`mla_expanded` for B sequences of equal n and start: `q [B, n, h, Dn+R]`, `kv_latent [B, L, C]`,
    `k_rope [B, L, R]` -> `[B, n, h, Dv]`."""
    batch, n, heads, width = q.shape
    length = start + n
    latent = kv_latent[:, :length]
    k_nope = F.linear(latent, w_k.flatten(0, 1)).view(batch, length, heads, w_k.shape[1])
    value = F.linear(latent, w_v.flatten(0, 1)).view(batch, length, heads, w_v.shape[1])
    rope = k_rope[:, :length, None].expand(batch, length, heads, k_rope.shape[-1])
    key = torch.cat((k_nope, rope), dim=-1)
    # CPU's flash kernel wants values as wide as keys.
    narrow = value.shape[-1] < width and q.device.type == "cpu"
    if narrow:
        value = F.pad(value, (0, width - value.shape[-1]))
    mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(start) if start else None
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=not start,
        scale=scale,
    ).transpose(1, 2)
    return out[..., : w_v.shape[1]] if narrow else out
