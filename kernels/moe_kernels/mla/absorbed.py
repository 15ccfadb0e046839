"""Absorbed form: queries live in the latent space, keys are the cache rows themselves.

T query tokens, h heads, C latent width, R rotary width, P pages, S rows per page.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mla_absorbed(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    batch_invariant: bool = False,
) -> Tensor:
    """`q_latent [T, h, C]`, `q_rope [T, h, R]`, `cache [P, S, C+R]`, `page_table [T, max_pages]`, `kv_lens [T]`
    -> `[T, h, C]`: token t attends to the first `kv_lens[t]` rows of its pages. `kv_lens[t] = 0` gives zeros.
    """
    tokens, heads, latent = q_latent.shape
    out = torch.zeros_like(q_latent)
    page_size = cache.shape[1]
    for t, length in enumerate(kv_lens.tolist()):
        if length == 0:
            continue
        pages = page_table[t, : -(-length // page_size)].long()
        rows = cache[pages].flatten(0, 1)[:length]
        q = torch.cat((q_latent[t], q_rope[t]), dim=-1)
        probs = torch.softmax((q @ rows.t()).float() * scale, dim=-1).to(q.dtype)
        out[t] = probs @ rows[:, :latent]
    return out
