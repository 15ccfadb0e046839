"""Oracles of the attention cores: fp64, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_absorbed_reference(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, kv_lens: Tensor, *, scale: float
) -> Tensor:
    """`[T, h, C]` fp64."""
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    page_size = cache.shape[1]
    for t, length in enumerate(kv_lens.tolist()):
        if length == 0:
            continue
        rows = torch.stack([cache[int(page_table[t, i // page_size]), i % page_size].double() for i in range(length)])
        latent, rope = rows[:, : q_latent.shape[-1]], rows[:, q_latent.shape[-1] :]
        scores = (q_latent[t].double() @ latent.t() + q_rope[t].double() @ rope.t()) * scale
        out[t] = torch.softmax(scores, dim=-1) @ latent
    return out


def mla_expanded_reference(
    q: Tensor, kv_latent: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, *, scale: float, start: int
) -> Tensor:
    """`[n, h, Dv]` fp64."""
    n, heads, _ = q.shape
    out = torch.zeros(n, heads, w_v.shape[1], dtype=torch.float64)
    for i in range(n):
        latent = kv_latent[: start + i + 1].double()
        rope = k_rope[: start + i + 1].double()
        for head in range(heads):
            key = torch.cat((latent @ w_k[head].double().t(), rope), dim=-1)
            probs = torch.softmax(key @ q[i, head].double() * scale, dim=-1)
            out[i, head] = probs @ (latent @ w_v[head].double().t())
    return out
