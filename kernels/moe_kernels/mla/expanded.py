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
    """`mla_expanded` for B sequences of equal n, L and start: `q [B, n, h, Dn+R]`, `kv_latent [B, L, C]`,
    `k_rope [B, L, R]` -> `[B, n, h, Dv]`."""
    batch, n, heads, _ = q.shape
    length = start + n
    latent = kv_latent[:, :length]
    k_nope = torch.einsum("blc,hdc->bhld", latent, w_k)
    value = torch.einsum("blc,hdc->bhld", latent, w_v)
    rope = k_rope[:, None, :length].expand(batch, heads, length, k_rope.shape[-1])
    key = torch.cat((k_nope, rope), dim=-1)
    mask = None
    if start:
        mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(start)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), key, value, attn_mask=mask, is_causal=not start, scale=scale
    )
    return out.transpose(1, 2)
