"""Grouped GEMM in torch. E slots, R rows, B blocks of C rows, K input width, N output width.

The ways to run one, chosen by measurement (docs/kernels_cpu.md):
* `Single`: one slot, one product;
* `Blocks`: rows cut into blocks of equal height, weights gathered per block, one batched product. For slots so small
  that a call costs more than copying the weight;
* `Segments`: a product per slot that has rows. For large slots, packed or not, and for block-scaled ones;
* `Library`: torch's grouped_mm. For plain fp32 slots with many rows;
* `Tiles`: blocks of 16 rows, a product each. The invariant mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.grouped_gemm.layout import Blocks, SlotRows, cut
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights, plain_slot
from moe_kernels.linear.packed import Weight, cat_rows, onednn_linear
from moe_kernels.linear.tiles import TILE, tile_product, tiled_linear
from moe_kernels.scaled import BlockScaled

GATHER_MAX_BYTES = 1 << 16
"""Largest slot (bytes of one weight) whose copy into a batched product is cheaper than a product per slot."""

MAX_BLOCK = 32
"""Tallest block: more rows per block waste more padding than the saved weight copies cost."""

GATHER_MAX_FP32_ROWS = 6
"""Mean rows per slot from which fp32 runs faster without copies; bf16 has a call to save at any count."""


@dataclass(frozen=True, slots=True)
class Single:
    """One slot owns all rows."""

    batch_invariant: bool


@dataclass(frozen=True, slots=True)
class Segments:
    """`(slot, start, count)` of each slot that has rows."""

    found: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Library:
    """`ends [E] int32` of the slots' spans."""

    ends: Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """Blocks of TILE rows."""

    blocks: Blocks
    slots: list[int]


Way = Single | Segments | Library | Blocks | Tiles


def choose(w: SlotWeights, rows: SlotRows, *, batch_invariant: bool) -> Way | None:
    """How to multiply rows laid out like this by weights like `w`; None where no slot has rows."""
    slots = w.shape[0]
    if slots == 1:
        return Single(batch_invariant)
    total = rows.total()
    if total == 0:
        return None
    if batch_invariant:
        blocks = cut(rows, TILE)
        return Tiles(blocks, blocks.slots.tolist())
    if isinstance(w, PackedSlots | BlockScaled):
        return Segments(rows.segments())
    active = int(rows.counts.count_nonzero())
    mean = total / active
    if w[0].nbytes <= GATHER_MAX_BYTES and (w.dtype is not torch.float32 or mean < GATHER_MAX_FP32_ROWS):
        return _blocks(rows, total, mean)
    # grouped_mm wants strides of 16 bytes (in both products of an MLP), and costs 2 us for a slot without rows.
    fits = w.shape[1] % 8 == w.shape[2] % 4 == 0 and 4 * active > slots and rows.rows < 2 * total
    if fits and w.dtype is torch.float32:
        return Library((rows.starts + rows.spans).clamp_(max=rows.rows).to(torch.int32))
    return Segments(rows.segments())


def _blocks(rows: SlotRows, total: int, mean: float) -> Blocks:
    """As high as the mean count, rounded up to a power of two, at most MAX_BLOCK.

    Below two rows per slot every row is a block of its own, which saves the cut (60 us) and two copies of the rows.
    """
    if mean < 2 and rows.rows < 2 * total:
        return Blocks(rows.slot_of_rows(), None, None, 1)
    return cut(rows, min(1 << (math.ceil(mean) - 1).bit_length(), MAX_BLOCK))


def collect(x: Tensor, way: Way) -> Tensor:
    """`x [R, K]` in the order that `run` takes."""
    match way:
        case Blocks():
            return way.collect(x)
        case Tiles():
            return way.blocks.collect(x)
        case Single() | Segments() | Library():
            return x


def bring_back(y: Tensor, way: Way) -> Tensor:
    """`run`'s result as `[R, N]`; rows that no slot owns are unspecified."""
    match way:
        case Blocks():
            return way.bring_back(y)
        case Tiles():
            return way.blocks.bring_back(y)
        case Single() | Segments() | Library():
            return y


def run(x: Tensor, w: SlotWeights, way: Way, *, halves: bool = False) -> Tensor:
    """`x [.., K]` as `collect` made it -> `[.., N]`. `halves`: see `plain_slot`."""
    match way:
        case Single(batch_invariant):
            one = _slot(w, 0, x.dtype, halves)
            return tiled_linear(x, one) if batch_invariant else _product(x, one)
        case Segments(found):
            return _run_segments(x, w, found, halves)
        case Library(ends):
            assert isinstance(w, Tensor), "packed and scaled slots run as segments"
            return F.grouped_mm(x, w.transpose(1, 2), offs=ends)
        case Blocks():
            assert isinstance(w, Tensor), "packed and scaled slots run as segments"
            chosen = w.index_select(0, way.slots)
            return torch.bmm(x.view(-1, way.height, x.shape[1]), chosen.transpose(1, 2)).flatten(0, 1)
        case Tiles(_, slots):
            if isinstance(w, BlockScaled):
                # A slot's tiles follow each other: it is dequantised once.
                spans = torch.split(x, [TILE * len(list(run)) for _, run in groupby(slots)])
                ones = (_slot(w, slot, x.dtype, halves) for slot, _ in groupby(slots))
                return cat_rows(tiled_linear(span, one) for span, one in zip(spans, ones, strict=True))
            tiles = zip(torch.split(x, TILE), slots, strict=True)
            return cat_rows(tile_product(tile, _slot(w, slot, x.dtype, halves)) for tile, slot in tiles)


def grouped(x: Tensor, w: SlotWeights, rows: SlotRows, *, batch_invariant: bool) -> Tensor:
    """`x [R, K]` -> `[R, N]`; rows that no slot owns are unspecified."""
    way = choose(w, rows, batch_invariant=batch_invariant) if x.shape[0] else None
    if way is None:
        return x.new_zeros(x.shape[0], w.shape[1])
    return bring_back(run(collect(x, way), w, way), way)


def _slot(w: SlotWeights, slot: int, dtype: torch.dtype, halves: bool) -> Weight:
    if isinstance(w, PackedSlots):
        return w.parts[slot]
    return w[slot] if isinstance(w, Tensor) else plain_slot(w, slot, dtype, halves=halves)


def _product(x: Tensor, w: Weight) -> Tensor:
    return torch.mm(x, w.t()) if isinstance(w, Tensor) else onednn_linear(x, w)


def _run_segments(x: Tensor, w: SlotWeights, segments: list[tuple[int, int, int]], halves: bool) -> Tensor:
    """Rows outside the segments are left as they are allocated."""
    rows, parts, done = x.shape[0], [], 0
    for slot, start, count in segments:
        if start > done:
            parts.append(x.new_empty(start - done, w.shape[1]))
        # Rounded up to 4 or 16 rows; the extra rows are those that follow, their products are dropped. oneDNN compiles
        # a kernel per row count (0.3 ms when it is new), and 4 rows run faster than 2: 114 us against 154 us for
        # [1024, 1024] bf16.
        unit = TILE if count > TILE else 4
        tall = min(-(-count // unit) * unit, rows - start)
        y = _product(x[start : start + tall], _slot(w, slot, x.dtype, halves))
        parts.append(y[:count] if tall > count else y)
        done = start + count
    if rows > done:
        parts.append(x.new_empty(rows - done, w.shape[1]))
    return cat_rows(parts)
