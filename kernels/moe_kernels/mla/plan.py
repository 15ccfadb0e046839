"""Which cache rows each token reads: the same in every layer of a step. T tokens, L rows, S rows per page."""

from __future__ import annotations

from collections.abc import Sequence
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
    sequence keeps its first).
    """

    first: int
    count: int
    rows: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """BLOCK places of any sequence, before place `end`: `places [BLOCK]`, the page of each (its column in a table) and
    the offset in that page; int64."""

    end: int
    places: Tensor
    pages: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class BlockedPart:
    """Tokens `first .. first + count` in the invariant mode: their rows block by block, since those of all blocks would
    take 8 bytes per token and cached row. The last token stands for those that GROUP lacks.

    `starts [GROUP, pages] int64`: first flat row of each page. `limits`, `last [GROUP, 1] int64`: a token's length (1
    where it has none) and its last flat row. `shortest`: the least limit.
    """

    first: int
    count: int
    blocks: tuple[Block, ...]
    starts: Tensor
    limits: Tensor
    last: Tensor
    shortest: int

    def rows(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """`[GROUP, BLOCK] int64` rows of the flat cache, and a mask of those past their token's length, which repeat
        its last one (None: there are none)."""
        rows = self.starts.index_select(1, block.pages).add_(block.offsets)
        if block.end <= self.shortest:
            return rows, None
        past = block.places >= self.limits
        return torch.where(past, self.last, rows), past


@dataclass(frozen=True, slots=True)
class AbsorbedPlan:
    """Parts of the tokens in `order` (None: as they come; `back` undoes it); `empty [T, 1, 1] bool` marks tokens that
    have no rows (None where all have). `blocked`: the plan is one of the invariant mode."""

    parts: tuple[AbsorbedPart | BlockedPart, ...]
    order: Tensor | None
    back: Tensor | None
    empty: Tensor | None
    blocked: bool


def plan_absorbed(
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    page_size: int,
    batch_invariant: bool = False,
    lengths: Sequence[int] | None = None,
) -> AbsorbedPlan:
    """`page_table [T, max_pages]`, `kv_lens [T]` -> the rows that `mla_absorbed` reads; build it once per step.

    `batch_invariant` is that of the call. `lengths`: the same as `kv_lens`, else it waits for these where they are on a
    device.
    """
    lengths = kv_lens.tolist() if lengths is None else list(lengths)
    empty = kv_lens.eq(0).view(-1, 1, 1) if 0 in lengths else None
    if batch_invariant:
        return AbsorbedPlan(_blocked_parts(page_table, kv_lens, lengths, page_size), None, None, empty, True)
    order = back = None
    if len(lengths) * max(lengths, default=0) <= _SMALL_ROWS:
        spans = [(0, len(lengths))] if lengths else []
    else:
        order = kv_lens.argsort(descending=True, stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(lengths), device=order.device))
        page_table, kv_lens = page_table.index_select(0, order), kv_lens.index_select(0, order)
        empty = None if empty is None else empty.index_select(0, order)
        lengths.sort(reverse=True)
        spans = _spans(lengths)
    parts = []
    for first, count in spans:
        here = slice(first, first + count)
        table, limits = page_table[here].long(), kv_lens[here].long().clamp(min=1).unsqueeze(1)
        parts.append(_part(first, count, table, limits, max(1, *lengths[here]), page_size))
    return AbsorbedPlan(tuple(parts), order, back, empty, False)


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    """Cut descending lengths where they halve or where too many rows would be gathered: `(first, count)`."""
    spans, first = [], 0
    for i, length in enumerate(lengths):
        if 2 * length < lengths[first] or (i - first + 1) * lengths[first] > _MAX_ROWS:
            if i > first:
                spans.append((first, i - first))
            first = i
    return [*spans, (first, len(lengths) - first)]


def _part(first: int, count: int, table: Tensor, limits: Tensor, longest: int, page_size: int) -> AbsorbedPart:
    """`table [t, max_pages]`, `limits [t, 1]` >= 1."""
    places = torch.arange(longest, device=table.device)
    rows = _flat_rows(table, torch.minimum(places, limits - 1), page_size)
    bias = torch.zeros(rows.shape, device=table.device).masked_fill_(places >= limits, -torch.inf)
    return AbsorbedPart(first, count, rows, bias.unsqueeze(1))


def _flat_rows(table: Tensor, places: Tensor, page_size: int) -> Tensor:
    """The flat row of each of `places [t, n]`; a page that is none counts as page 0."""
    pages = table.gather(1, places.div(page_size, rounding_mode="floor")) if table.shape[1] else places * 0
    return pages.mul_(page_size).add_(places.remainder(page_size)).clamp_(min=0)


def _blocked_parts(page_table: Tensor, kv_lens: Tensor, lengths: list[int], page_size: int) -> tuple[BlockedPart, ...]:
    """GROUP tokens each, in the order in which they come."""
    if not lengths:
        return ()
    device, groups = kv_lens.device, -(-len(lengths) // GROUP)
    full = torch.arange(groups * GROUP, device=device).clamp_(max=len(lengths) - 1)
    table = page_table.long().index_select(0, full)
    limits = kv_lens.long().index_select(0, full).clamp_(min=1).unsqueeze(1)
    last = _flat_rows(table, limits - 1, page_size)
    # The places past a sequence's pages, up to a whole block, are masked: any page will do for them.
    starts = table.clamp_(min=0).mul_(page_size) if table.shape[1] else limits * 0
    blocks = _blocks(max(1, *lengths), page_size, num_pages=starts.shape[1], device=device)
    parts = []
    for first in range(0, len(lengths), GROUP):
        here, mine = slice(first, first + GROUP), [max(1, length) for length in lengths[first : first + GROUP]]
        seen = blocks[: -(-max(mine) // BLOCK)]
        parts.append(BlockedPart(first, len(mine), seen, starts[here], limits[here], last[here], min(mine)))
    return tuple(parts)


def _blocks(longest: int, page_size: int, *, num_pages: int, device: torch.device) -> tuple[Block, ...]:
    """The blocks of a sequence of `longest` rows."""
    places = torch.arange(-(-longest // BLOCK) * BLOCK, device=device)
    pages = places.div(page_size, rounding_mode="floor").clamp_(max=num_pages - 1)
    columns = zip(*(torch.split(x, BLOCK) for x in (places, pages, places.remainder(page_size))), strict=True)
    return tuple(Block((i + 1) * BLOCK, *column) for i, column in enumerate(columns))
