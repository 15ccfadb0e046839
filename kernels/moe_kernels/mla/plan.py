"""Which cache rows each token reads: the same in every layer of a step. T tokens, L rows, S rows per page."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Cache rows per block of the invariant mode, counted from the sequence's start, whatever the page size."""

GROUP = 8
"""Tokens per product of the invariant mode."""


@dataclass(frozen=True, slots=True)
class AbsorbedPlan:
    """`rows [T, L] int64` rows of the flat cache; those past a token's length repeat its last one, so that nothing
    but the token's own rows is ever read; `hidden [T, L] bool` marks these; `lengths [T]` of `page_table`'s tokens.

    `blocked` plans have T rounded up to GROUP and L to BLOCK.
    """

    rows: Tensor
    hidden: Tensor
    lengths: tuple[int, ...]
    blocked: bool


def plan_absorbed(
    page_table: Tensor, kv_lens: Tensor, *, page_size: int, batch_invariant: bool = False
) -> AbsorbedPlan:
    """`page_table [T, max_pages]`, `kv_lens [T]` -> the rows that `mla_absorbed` reads; build it once per step."""
    lengths: list[int] = kv_lens.tolist()
    longest = max(lengths, default=0)
    if batch_invariant:
        longest = -(-longest // BLOCK) * BLOCK
        short = -len(lengths) % GROUP
        if short:
            page_table = torch.cat((page_table, page_table.new_zeros(short, page_table.shape[1])))
            kv_lens = torch.cat((kv_lens, kv_lens.new_zeros(short)))
    limits = kv_lens.long().unsqueeze(1)
    places = torch.arange(longest, device=kv_lens.device)
    seen = torch.minimum(places, (limits - 1).clamp_(min=0))
    pages = page_table.long().gather(1, seen.div(page_size, rounding_mode="floor"))
    rows = pages.mul_(page_size).add_(seen.remainder_(page_size)).clamp_(min=0)
    return AbsorbedPlan(rows, places >= limits, tuple(lengths), batch_invariant)
