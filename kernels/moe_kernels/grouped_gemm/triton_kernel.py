"""Grouped GEMM in Triton for Hopper. E slots, R rows, C rows per slot, K input width, N output width.

One persistent kernel serves every product: each program walks over output tiles and finds a tile's slot from the row
marks, on the device. A tile multiplies BM rows by one or two tiles of BN weight rows:

* `SWIGLU`: the two are the gate's and the up's rows of w13; the epilogue writes `silu(gate) * up`, as it is or (QUANT)
  as fp8 with a scale per row and 128 columns;
* otherwise the two are neighbours, so that one load of x feeds 2 BN columns;
* `SWAP`: the tile is computed as `w @ x^T`, so that the weights' rows fill WGMMA's 64-row side and BM may be 16.

Tiles go slot by slot, and within a slot by groups of row tiles, column by column: a weight tile is read by neighbouring
programs at about the same time. The steps along K run in order, without splits: a row's bits depend on the row, its
slot's weights and the configuration.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.quant.triton import finite_magnitude, scale_of


@triton.jit
def tile_ends(
    marks_ptr, rows, E: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr
):
    """`[SLOTS] int32`: the row tiles of slots 0..e together; slots from E on have none. `rows`: see the kernel."""
    slots = tl.arange(0, SLOTS)
    inside = slots < E
    counts = tl.minimum(tl.load(marks_ptr + slots, mask=inside, other=0), rows)
    if not PADDED:
        before = tl.load(marks_ptr + slots - 1, mask=inside & (slots > 0), other=0)
        counts -= (before + ALIGN - 1) // ALIGN * ALIGN
    counts = tl.where(inside, tl.maximum(counts, 0), 0)
    return tl.cumsum((counts + BM - 1) // BM, axis=0)


@triton.jit
def slot_rows(marks_ptr, slot, rows, PADDED: tl.constexpr, ALIGN: tl.constexpr):
    """(first row, number of rows) of a slot."""
    mark = tl.minimum(tl.load(marks_ptr + slot), rows)
    if PADDED:
        return slot * rows, mark
    else:
        before = tl.load(marks_ptr + slot - 1, mask=slot > 0, other=0)
        start = (before + ALIGN - 1) // ALIGN * ALIGN
        return start, mark - start


@triton.jit
def accumulate(acc, x, w, SWAP: tl.constexpr):
    """`acc + x [BM, BK] @ w [BN, BK]^T`, or its transpose."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def along_rows(values, SWAP: tl.constexpr):
    """`[BM]` per row of the tile, to be broadcast over the tile."""
    if SWAP:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def scales(x_scales, w_scales0, w_scales1, step, x_scale_k, TILES: tl.constexpr, SCALED: tl.constexpr):
    """The scales of one step along K: `[BM]` of x, and those of the two weight tiles."""
    if SCALED:
        x_scale = tl.load(x_scales + step * x_scale_k)
        w_scale0 = tl.load(w_scales0 + step)
        w_scale1 = w_scale0
        if TILES == 2:
            w_scale1 = tl.load(w_scales1 + step)
        return x_scale, w_scale0, w_scale1
    else:
        return 1.0, 1.0, 1.0


@triton.jit
def largest_of_rows(acc, column, N: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr):
    """`[BM]`: each row's largest magnitude within the output's N columns."""
    acc = finite_magnitude(acc)
    if N % WIDE:
        inside = column + tl.arange(0, BN) < N
        if SWAP:
            acc = tl.where(inside[:, None], acc, 0.0)
        else:
            acc = tl.where(inside[None, :], acc, 0.0)
    return tl.max(acc, axis=0 if SWAP else 1)


@triton.jit
def store(outs, held, column, acc, weight, N: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr):
    """Write the held rows of a tile times their weights; columns past N belong to other weights and are dropped."""
    acc *= along_rows(weight, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    columns = column + tl.arange(0, BN)
    kept = held[:, None]
    if N % WIDE:
        kept = kept & (columns < N)[None, :]
    tl.store(outs + columns[None, :], acc.to(outs.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows", "x_scale_slot", "x_scale_row", "x_scale_k", "out_scale_row", "out_scale_n"])
def grouped_gemm_kernel(
    x_desc,
    w_desc,
    out_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    marks_ptr,
    row_weights_ptr,
    rows,
    x_scale_slot,
    x_scale_row,
    x_scale_k,
    out_scale_row,
    out_scale_n,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    SWIGLU: tl.constexpr,
    SCALED: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """`x_desc` [R, K], `w_desc` [E * N (SWIGLU: 2N), K], `out` [R, N]. `rows`: R, or C where PADDED."""
    # The second weight tile lies AWAY rows behind the first; together they make WIDE columns of the output.
    WIDE: tl.constexpr = BN if SWIGLU else BN * TILES
    AWAY: tl.constexpr = N if SWIGLU else BN
    W_ROWS: tl.constexpr = 2 * N if SWIGLU else N
    N_TILES: tl.constexpr = (N + WIDE - 1) // WIDE
    K_TILES: tl.constexpr = (K + BK - 1) // BK
    # Scale blocks of a slot's weights; each half of w13 has its own.
    S_ROWS: tl.constexpr = (W_ROWS // N) * ((N + 127) // 128)
    S_COLS: tl.constexpr = (K + 127) // 128

    ends = tile_ends(marks_ptr, rows, E, SLOTS, PADDED, ALIGN, BM)
    places = tl.arange(0, SLOTS)
    total = tl.max(ends, axis=0) * N_TILES
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        # The last slot that ends at or before this tile: its end and its number in one reduction.
        last = tl.max(tl.where(ends * N_TILES <= tile, ends * SLOTS + places + 1, 0), axis=0)
        slot = last % SLOTS
        start, count = slot_rows(marks_ptr, slot, rows, PADDED, ALIGN)
        local = tile - last // SLOTS * N_TILES
        group = local // (GROUP * N_TILES) * GROUP
        height = tl.minimum((count + BM - 1) // BM - group, GROUP)
        local = local % (GROUP * N_TILES)
        offset = (group + local % height) * BM
        column = local // height * WIDE
        w_row = slot * W_ROWS + column

        if SWAP:
            none = tl.zeros((BN, BM), tl.float32)
        else:
            none = tl.zeros((BM, BN), tl.float32)
        acc0 = none
        acc1 = none
        if PADDED:
            x_scales = x_scale_ptr + slot.to(tl.int64) * x_scale_slot
        else:
            x_scales = x_scale_ptr + start.to(tl.int64) * x_scale_row
        # Rows past the slot's end take the last one's scale: they are not stored.
        x_scales += tl.minimum(offset + tl.arange(0, BM), count - 1) * x_scale_row
        block = column // 128
        block1 = block + (AWAY + 127) // 128
        if N % WIDE != 0 and not SWIGLU:
            # The second tile may lie past the slot's columns.
            block1 = tl.minimum(block1, S_ROWS - 1)
        w_scales0 = w_scale_ptr + (slot * S_ROWS + block) * S_COLS
        w_scales1 = w_scale_ptr + (slot * S_ROWS + block1) * S_COLS
        x_scale, w_scale0, w_scale1 = scales(x_scales, w_scales0, w_scales1, 0, x_scale_k, TILES, SCALED)
        for step in range(K_TILES):
            x = x_desc.load([start + offset, step * BK])
            w0 = w_desc.load([w_row, step * BK])
            if SCALED:
                # Tensor cores sum 128 products at less than fp32 precision; fp32 sums those sums. One sum is spelt as
                # an fma: alike, LLVM joins both into one vector loop after the second product, which spills.
                product = accumulate(none, x, w0, SWAP)
                acc0 = tl.fma(product, along_rows(x_scale * w_scale0, SWAP), acc0)
                if TILES == 2:
                    w1 = w_desc.load([w_row + AWAY, step * BK])
                    product = accumulate(none, x, w1, SWAP)
                    acc1 += product * along_rows(x_scale * w_scale1, SWAP)
                # Read one step ahead, so that they are there when a product is.
                after = tl.minimum(step + 1, K_TILES - 1)
                x_scale, w_scale0, w_scale1 = scales(x_scales, w_scales0, w_scales1, after, x_scale_k, TILES, SCALED)
            else:
                acc0 = accumulate(acc0, x, w0, SWAP)
                if TILES == 2:
                    w1 = w_desc.load([w_row + AWAY, step * BK])
                    acc1 = accumulate(acc1, x, w1, SWAP)

        # Read again: what the stores need would otherwise hold registers through the loop.
        start, count = slot_rows(marks_ptr, slot, rows, PADDED, ALIGN)
        held = offset + tl.arange(0, BM) < count
        lines = start + offset + tl.arange(0, BM)
        outs = out_ptr + lines.to(tl.int64)[:, None] * N
        weight = tl.full((BM,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(row_weights_ptr + lines, mask=held, other=0.0)
        if SWIGLU:
            acc0 = acc0 * acc1 / (1.0 + tl.exp(-acc0))
            if QUANT:
                scale = scale_of(largest_of_rows(acc0, column, N, BN, WIDE, SWAP), UE8M0)
                tl.store(out_scale_ptr + lines * out_scale_row + column // 128 * out_scale_n, scale, mask=held)
                weight = tl.div_rn(weight, scale)
        store(outs, held, column, acc0, weight, N, BN, WIDE, SWAP)
        if TILES == 2 and not SWIGLU:
            store(outs, held, column + BN, acc1, weight, N, BN, WIDE, SWAP)
