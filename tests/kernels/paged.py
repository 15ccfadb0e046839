"""Sequences in pages of a latent cache, for tests of the attention kernels that run on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.mla.reference import mla_absorbed_reference
from torch import Tensor

from tests.kernels.devices import DEVICE


@dataclass(frozen=True, slots=True)
class Step:
    """One call's queries and what they read: `rows[t]` in shuffled pages; what no sequence owns is NaN."""

    q_latent: Tensor
    q_rope: Tensor
    cache: Tensor
    page_table: Tensor
    kv_lens: Tensor

    def reference(self, *, scale: float) -> Tensor:
        """fp64, on the CPU."""
        here = (x.cpu() for x in (self.q_latent, self.q_rope, self.cache, self.page_table, self.kv_lens))
        return mla_absorbed_reference(*here, scale=scale)


def step(queries: Tensor, rows: list[Tensor], *, latent: int, page_size: int, spare: int = 0, seed: int = 0) -> Step:
    """`queries [T, h, C+R]` and each token's `[L, C+R]`; the table is `spare` pages wider than it needs to be, with -1
    where a token has no page."""
    pages = [-(-len(one) // page_size) for one in rows]
    order = torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    cache = torch.full((len(order), page_size, queries.shape[2]), torch.nan, dtype=queries.dtype)
    table = torch.full((len(rows), max(pages, default=0) + spare), -1, dtype=torch.int32)
    for t, one in enumerate(rows):
        mine = [order.pop() for _ in range(pages[t])]
        table[t, : pages[t]] = torch.tensor(mine, dtype=torch.int32)
        for i, page in enumerate(mine):
            some = one[i * page_size : (i + 1) * page_size]
            cache[page, : len(some)] = some
    lens = torch.tensor([len(one) for one in rows], dtype=torch.int64)
    queries = queries.to(DEVICE)
    return Step(queries[..., :latent], queries[..., latent:], cache.to(DEVICE), table.to(DEVICE), lens.to(DEVICE))
