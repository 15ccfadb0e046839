"""Grouped GEMM in torch. E slots, R rows, B blocks of C rows, K input width, N output width.

Three ways, chosen by measurement (docs/kernels_cpu.md):
* blocks: rows cut into blocks of equal height, weights gathered per block, one batched product. For slots so small that
  a call costs more than copying the weight;
* segments: one product per slot that has rows. For large slots, which are packed or multiplied in place;
* tiles: blocks of 16 rows, one product each. The invariant mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.grouped_gemm.layout import Blocks, SlotRows, cut
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights
from moe_kernels.linear.packed import Weight, cat_rows, onednn_linear
from moe_kernels.linear.tiles import TILE, tile_product

GATHER_MAX_BYTES = 1 << 17
"""Largest slot (bytes of one weight) whose copy into a batched product is cheaper than a product per slot."""

MAX_BLOCK = 32
"""Tallest block: more rows per block waste more padding than the saved weight copies cost."""


def slot_weight(w: SlotWeights, slot: int) -> Weight:
    return w.parts[slot] if isinstance(w, PackedSlots) else w[slot]


def product(x: Tensor, w: Weight) -> Tensor:
    """`x [M, K] @ w [N, K]^T -> [M, N]`, M > 0."""
    return torch.mm(x, w.t()) if isinstance(w, Tensor) else onednn_linear(x, w)


def gathers(w: SlotWeights) -> bool:
    """Whether these weights run as blocks (else as segments)."""
    return isinstance(w, Tensor) and w[0].nbytes <= GATHER_MAX_BYTES


def block_height(rows: SlotRows) -> int:
    """Rows per block: the mean count of the slots that have rows, rounded up to a power of two, at most MAX_BLOCK."""
    active = int(rows.counts.count_nonzero())
    mean = -(-int(rows.counts.sum()) // max(active, 1))
    return int(min(1 << (mean - 1).bit_length(), MAX_BLOCK)) if mean > 0 else 1


def run_blocks(x: Tensor, w: SlotWeights, blocks: Blocks, *, batch_invariant: bool) -> Tensor:
    """`x [B * C, K]` in block order -> `[B * C, N]`."""
    if batch_invariant:
        slots: list[int] = blocks.slots.tolist()
        return cat_rows(
            tile_product(tile, slot_weight(w, slot)) for tile, slot in zip(torch.split(x, TILE), slots, strict=True)
        )
    assert isinstance(w, Tensor), "packed slots run as segments"
    chosen = w.index_select(0, blocks.slots)
    return torch.bmm(x.view(-1, blocks.height, x.shape[1]), chosen.transpose(1, 2)).flatten(0, 1)


def run_segments(x: Tensor, w: SlotWeights, segments: list[tuple[int, int, int]]) -> Tensor:
    """`x [R, K]` -> `[R, N]`, a product per segment; rows outside the segments are left as they are allocated."""
    rows, parts, done = x.shape[0], [], 0
    for slot, start, count in segments:
        if start > done:
            parts.append(x.new_empty(start - done, w.shape[1]))
        # More than 16 rows run as a multiple of 16 (the extra rows are those that follow, their products are dropped):
        # oneDNN compiles a kernel per row count, which costs 0.3 ms when that count is new.
        tall = min(-(-count // TILE) * TILE, rows - start) if count > TILE else count
        y = product(x[start : start + tall], slot_weight(w, slot))
        parts.append(y[:count] if tall > count else y)
        done = start + count
    if rows > done:
        parts.append(x.new_empty(rows - done, w.shape[1]))
    return cat_rows(parts)


def grouped(x: Tensor, w: SlotWeights, rows: SlotRows, *, batch_invariant: bool) -> Tensor:
    """`x [R, K]` -> `[R, N]`; rows that no slot owns are unspecified."""
    if w.shape[0] == 1 and not batch_invariant:
        return product(x, slot_weight(w, 0)) if x.shape[0] else x.new_empty(0, w.shape[1])
    if not bool(rows.counts.any()):
        return x.new_zeros(x.shape[0], w.shape[1])
    if not batch_invariant and not gathers(w):
        return run_segments(x, w, rows.segments())
    blocks = cut(rows, TILE if batch_invariant else block_height(rows))
    y = run_blocks(x.index_select(0, blocks.gather), w, blocks, batch_invariant=batch_invariant)
    return y.index_select(0, blocks.back)
