"""Who reads which cache rows in the Triton backend: a work list made on the device, the same in every layer of a step.

T query tokens, N work items, M partial results. A token's rows are cut into equal parts; one program per part and head
block. Shapes depend on static numbers only, so a plan can be made inside a CUDA graph: N is an upper bound, and
programs behind the last item exit at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_kernels.backends import require

PART_MULTIPLE: Final = 64
"""A part's rows are a multiple of it, so that the blocks of rows of every configuration begin where a part does."""

INVARIANT_PART: Final = 1024
"""Rows per part of the invariant mode, as long as a token has no more than MOST_PARTS of them."""

MOST_PARTS: Final = 32
"""Parts of a token in the invariant mode: longer sequences have longer parts, a function of their length alone."""

_PARTIALS_PER_SLOT: Final = 8
"""Partial results that balancing may make, per program that the device runs at once: 138 MB for 128 heads of 512."""

_MOST_PARTIALS: Final = 2048
"""Partial results of one launch in the invariant mode; more tokens take turns. 537 MB for 128 heads of 512."""

_OVERHEAD_ROWS: Final = 128
"""What a part costs beside its rows (query, first loads, partial result, merge), in rows. Reasoned, not measured."""


@dataclass(frozen=True, slots=True)
class Config:
    """Launch geometry of the attention kernel."""

    head_block: int
    row_block: int
    num_warps: int
    num_stages: int
    split_warps: bool
    """Two warpgroups share a block's scores: see `scores_by_two` in triton.py."""
    per_sm: int
    """Programs that fit on a multiprocessor at once."""


def configure(heads: int, latent: int, *, itemsize: int, scaled: bool = False) -> Config:
    """The configuration for `heads` local heads, `latent` columns and values of `itemsize` bytes.

    Independent of the number of tokens and of their lengths: a row's bits are the same in every batch.
    All entries are chosen by reasoning over registers and shared memory; not yet measured on hardware.
    """
    if itemsize == 4:
        stages = 1 if scaled else 2  # two stages of fp8 rows spill
        return Config(16, 16, 4, stages, split_warps=False, per_sm=1)
    if latent <= 128:
        return Config(16 if heads <= 16 else 64, 32, 4, 3, split_warps=False, per_sm=2)
    if scaled and heads <= 32:  # 8 warps: rescaling fp8 rows in 4 spills
        return Config(16, 32, 8, 4, split_warps=False, per_sm=1)
    if heads <= 16:  # bytes bound: two programs per multiprocessor, one loads while the other one computes
        return Config(16, 32, 4, 3, split_warps=False, per_sm=2)
    if heads <= 32:
        return Config(32, 32, 8, 4, split_warps=False, per_sm=1)
    # FLOP bound: WGMMA's 64 rows, accumulator of 64 x 512 in 128 registers of each of 256 threads.
    return Config(64, 64, 8, 2, split_warps=True, per_sm=1)


@dataclass(frozen=True, slots=True)
class WorkChunk:
    """Work of the tokens `first .. first + count`.

    `tokens [count, 4] int32`: rows, rows per part, first item, first partial result (of tokens of several parts).
    `items [N] int32`: the token of each item, counted from `first`; `count` where there is no item.
    """

    first: int
    count: int
    tokens: Tensor
    items: Tensor
    num_partials: int


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """What `plan_absorbed` makes for the Triton backend. `page_table [T, max_pages] int32`, columns adjacent."""

    chunks: tuple[WorkChunk, ...]
    page_table: Tensor
    page_size: int
    batch_invariant: bool


def plan_work(
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    page_size: int,
    batch_invariant: bool,
    lengths: Sequence[int] | None = None,
    num_heads: int = 128,
) -> WorkPlan:
    """See `plan_absorbed`. Nothing is read back from the device; `lengths` only tightens the bounds."""
    tokens, pages = page_table.shape
    capacity = pages * page_size
    require(
        page_size > 0 and page_size & (page_size - 1) == 0,
        f"plan_absorbed: page_size is {page_size}; it must be a power of two; the nearest is "
        f"{1 << max(page_size - 1, 1).bit_length()}",
    )
    require(
        kv_lens.shape == (tokens,) and page_table.dtype in (torch.int32, torch.int64),
        f"plan_absorbed: page_table is {tuple(page_table.shape)} {page_table.dtype}, kv_lens {tuple(kv_lens.shape)}; "
        "one length per table row is wanted, and int32 or int64 pages",
    )
    if lengths is not None:
        longest = max(lengths, default=0)
        require(
            len(lengths) == tokens and longest <= capacity,
            f"plan_absorbed: {len(lengths)} lengths, the longest {longest}, for {tokens} table rows of {pages} pages "
            f"of {page_size}; widen the table",
        )
        capacity = longest
    # 32 bits, as the kernels are compiled ahead of time: half the loads and registers of 64, once for all layers.
    page_table = page_table.to(torch.int32)
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lens = kv_lens.long().clamp(min=0, max=capacity)
    if not tokens:
        chunks: tuple[WorkChunk, ...] = ()
    elif batch_invariant:
        most = min(MOST_PARTS, max(1, -(-capacity // INVARIANT_PART)))
        some = max(1, _MOST_PARTIALS // most) if most > 1 else tokens
        firsts = range(0, tokens, some)
        pieces = [lens[first : first + some] for first in firsts]
        chunks = tuple(
            _chunk(first, piece, _invariant_size(piece), len(piece) * most, len(piece) * most if most > 1 else 0)
            for first, piece in zip(firsts, pieces, strict=True)
        )
    else:
        config = configure(num_heads, 512, itemsize=2)
        head_blocks = -(-num_heads // config.head_block)
        slots = config.per_sm * num_multiprocessors(lens.device)
        partials = _PARTIALS_PER_SLOT * -(-slots // head_blocks)
        size = _balanced_size(lens, capacity, head_blocks=head_blocks, slots=slots, partials=partials)
        chunks = (_chunk(0, lens, size, tokens + partials, partials),)
    return WorkPlan(chunks, page_table, page_size, batch_invariant)


def num_multiprocessors(device: torch.device) -> int:
    """2 where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _round_up(x: Tensor) -> Tensor:
    return (x + (PART_MULTIPLE - 1)).div(PART_MULTIPLE, rounding_mode="floor").clamp_(min=1).mul_(PART_MULTIPLE)


def _parts(lens: Tensor, size: Tensor) -> Tensor:
    return (lens + size - 1).div(size, rounding_mode="floor")


def _invariant_size(lens: Tensor) -> Tensor:
    return _round_up((lens + (MOST_PARTS - 1)).div(MOST_PARTS, rounding_mode="floor")).clamp_(min=INVARIANT_PART)


def _balanced_size(lens: Tensor, capacity: int, *, head_blocks: int, slots: int, partials: int) -> Tensor:
    """Rows per part for each of `lens [T]`: of some sizes, the one with the least time, were all programs as long as
    the longest, among those that make no more than `partials` partial results (no cut at all makes none)."""
    steps = 1
    while ((2 + ((steps - 1) & 1)) << ((steps - 1) >> 1)) * PART_MULTIPLE < capacity:
        steps += 1
    step = torch.arange(steps, device=lens.device)
    wanted = ((step & 1) + 2).bitwise_left_shift(step >> 1).mul_(PART_MULTIPLE).unsqueeze(1)  # 128, 192, 256, 384, …
    size = _round_up(_parts(lens, _parts(lens, wanted).clamp_(min=1)))  # a token's parts are alike
    parts = _parts(lens, size)
    rounds = (parts.sum(1) * head_blocks + (slots - 1)).div(slots, rounding_mode="floor")
    cost = rounds * (size.amax(1) + _OVERHEAD_ROWS)
    cost = cost.masked_fill_((parts * (parts > 1)).sum(1) > partials, 1 << 40)
    best = (cost * steps + step).argmin().view(1)
    return size.index_select(0, best).squeeze(0)


def _chunk(first: int, lens: Tensor, size: Tensor, num_items: int, num_partials: int) -> WorkChunk:
    parts = _parts(lens, size)
    ends, partials = parts.cumsum(0), parts * (parts > 1)
    table = torch.stack((lens, size, ends - parts, partials.cumsum(0) - partials), dim=1)
    numbers = torch.arange(num_items, device=lens.device)
    items = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    return WorkChunk(first, len(lens), table.int(), items, num_partials)
