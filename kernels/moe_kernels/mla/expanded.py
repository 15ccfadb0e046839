"""Expanded form: keys and values are rebuilt from the latent rows, then ordinary causal attention.

n queries, h heads, Dn/Dv per-head key/value widths, C latent width, R rotary width, L cached rows, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import backends

_MAX_ELEMENTS = 1 << 26
"""Most numbers of keys and values, and of a mask, held at once: 256 MiB in fp32. One head's are never split."""


def mla_expanded_batched(
    q: Tensor, kv_latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, *, scale: float, start: int
) -> Tensor:
    """`q [B, n, h, Dn+R]`, `kv_latent [B, L, C]`, `k_rope [B, L, R]`, `w_k [h, Dn, C]`, `w_v [h, Dv, C]`
    -> `[B, n, h, Dv]`.

    Query i of a sequence, at absolute position `start + i`, attends to its rows 0..start+i; L >= start + n. Sequences,
    then heads, take turns where the keys and values of all would take too much memory. On a GPU torch's fused attention
    runs (flash or cuDNN for 16-bit dtypes), which makes no mask; on a CPU a mask is made for a part of the queries.
    """
    batch, n, heads, width = q.shape
    per_head = (start + n) * (width + max(width, w_v.shape[1]))
    if batch * heads * per_head <= _MAX_ELEMENTS:
        return _attend(q, kv_latent, k_rope, w_k, w_v, scale=scale, start=start)
    if batch > 1:
        each = zip(torch.split(q, 1), torch.split(kv_latent, 1), torch.split(k_rope, 1), strict=True)
        return torch.cat([mla_expanded_batched(*x, w_k=w_k, w_v=w_v, scale=scale, start=start) for x in each])
    some = max(1, _MAX_ELEMENTS // per_head)
    parts = zip(torch.split(q, some, dim=2), torch.split(w_k, some), torch.split(w_v, some), strict=True)
    outs = [_attend(few, kv_latent, k_rope, k, v, scale=scale, start=start) for few, k, v in parts]
    return torch.cat(outs, dim=2)


def _attend(
    q: Tensor, kv_latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, *, scale: float, start: int
) -> Tensor:
    batch, n, heads, width = q.shape
    length, nope = start + n, w_k.shape[1]
    latent = kv_latent[:, :length]
    key = q.new_empty(batch, length, heads, width)
    key[..., :nope] = F.linear(latent, w_k.flatten(0, 1)).view(batch, length, heads, nope)
    key[..., nope:] = k_rope[:, :length, None]
    value = F.linear(latent, w_v.flatten(0, 1)).view(batch, length, heads, w_v.shape[1])
    # Flash kernels want values as wide as keys: those of CPUs, and those of GPUs, which take 16-bit dtypes.
    narrow = value.shape[-1] < width and (q.device.type == "cpu" or q.dtype is not torch.float32)
    if narrow:
        value = F.pad(value, (0, width - value.shape[-1]))
    q, key, value = q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not start:
        out = F.scaled_dot_product_attention(q, key, value, is_causal=True, scale=scale)
    elif backends.default_backend(q.device) == "torch":
        out = _masked(q, key, value, scale=scale, start=start)
    else:
        out = _lower_right(q, key, value, scale=scale)
    out = out.transpose(1, 2)
    return out[..., : w_v.shape[1]] if narrow else out


def _lower_right(q: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """The same as `_masked` where a fused kernel knows that the last query sees the last key."""
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(q.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(q, key, value, attn_mask=bias, scale=scale)


def _masked(q: Tensor, key: Tensor, value: Tensor, *, scale: float, start: int) -> Tensor:
    """`q [B, h, n, D]`, `key`, `value [B, h, L, D]` -> `[B, h, n, D]`, as many queries at once as a mask may have."""
    outs, length = [], key.shape[2]
    for some in torch.split(q, max(1, _MAX_ELEMENTS // length), dim=2):
        mask = torch.ones(some.shape[2], length, dtype=torch.bool, device=q.device).tril(start)
        outs.append(F.scaled_dot_product_attention(some, key, value, attn_mask=mask, scale=scale))
        start += some.shape[2]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
