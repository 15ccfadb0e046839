"""Which cache rows each token reads: the same in every layer of a step. T tokens, L rows, S rows per page."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Cache rows per block of the invariant mode, counted from the sequence's start, whatever the page size."""

GROUP = 8
"""Tokens per product of the invariant mode."""

_SMALL_ROWS = 4096
"""Up to here (tokens times longest) one part is fastest, however the lengths differ."""

_MAX_ROWS = 8192
"""Rows gathered at once, at most (one token's own are never split): 9 MB of 576-wide bf16."""


@dataclass(frozen=True, slots=True)
class AbsorbedPart:
    """Tokens `first .. first + count` of the plan's order, their lengths alike.

    `rows [t, L] int64` rows of the flat cache; those past a token's length repeat its last one, so that nothing but the
    token's own rows is ever read. `bias [t, 1, L] fp32` is 0 for the token's rows and -inf past them (an empty
    sequence keeps its first). t = count, or GROUP in the invariant mode, where L is a multiple of BLOCK.
    """

    first: int
    count: int
    rows: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class AbsorbedPlan:
    """Parts of the tokens in `order` (None: as they come; `back` undoes it); `empty [T, 1, 1] bool` marks tokens that
    have no rows (None where all have)."""

    parts: tuple[AbsorbedPart, ...]
    order: Tensor | None
    back: Tensor | None
    empty: Tensor | None
    blocked: bool


def plan_absorbed(
    page_table: Tensor, kv_lens: Tensor, *, page_size: int, batch_invariant: bool = False
) -> AbsorbedPlan:
    """`page_table [T, max_pages]`, `kv_lens [T]` -> the rows that `mla_absorbed` reads; build it once per step.

    `batch_invariant` is that of the call. Waits for the lengths where they are on a device.
    """
    lengths: list[int] = kv_lens.tolist()
    order = back = None
    if batch_invariant:
        spans = [(first, min(GROUP, len(lengths) - first)) for first in range(0, len(lengths), GROUP)]
    elif len(lengths) * max(lengths, default=0) <= _SMALL_ROWS:
        spans = [(0, len(lengths))] if lengths else []
    else:
        order = kv_lens.argsort(descending=True, stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(lengths), device=order.device))
        page_table, kv_lens = page_table.index_select(0, order), kv_lens.index_select(0, order)
        lengths.sort(reverse=True)
        spans = _spans(lengths)
    parts = []
    for first, count in spans:
        here = slice(first, first + count)
        longest = max(1, *lengths[here])
        table, limits = page_table[here].long(), kv_lens[here].long().clamp(min=1).unsqueeze(1)
        if batch_invariant:
            longest = -(-longest // BLOCK) * BLOCK
            table, limits = _fill(table, 0), _fill(limits, 1)
        parts.append(_part(first, count, table, limits, longest, page_size))
    empty = kv_lens.eq(0).view(-1, 1, 1) if 0 in lengths else None
    return AbsorbedPlan(tuple(parts), order, back, empty, batch_invariant)


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    """Cut descending lengths where they halve or where too many rows would be gathered: `(first, count)`."""
    spans, first = [], 0
    for i, length in enumerate(lengths):
        if 2 * length < lengths[first] or (i - first + 1) * lengths[first] > _MAX_ROWS:
            if i > first:
                spans.append((first, i - first))
            first = i
    return [*spans, (first, len(lengths) - first)]


def _fill(x: Tensor, value: int) -> Tensor:
    """Rows of `value` up to GROUP rows."""
    short = GROUP - x.shape[0]
    return torch.cat((x, x.new_full((short, x.shape[1]), value))) if short else x


def _part(first: int, count: int, table: Tensor, limits: Tensor, longest: int, page_size: int) -> AbsorbedPart:
    """`table [t, max_pages]`, `limits [t, 1]` >= 1."""
    places = torch.arange(longest, device=table.device)
    seen = torch.minimum(places, limits - 1)
    pages = table.gather(1, seen.div(page_size, rounding_mode="floor")) if table.shape[1] else seen * 0
    rows = pages.mul_(page_size).add_(seen.remainder_(page_size)).clamp_(min=0)
    bias = torch.zeros(rows.shape, device=table.device).masked_fill_(places >= limits, -torch.inf)
    return AbsorbedPart(first, count, rows, bias.unsqueeze(1))
