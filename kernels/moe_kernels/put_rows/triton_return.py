"""Triton kernels that put outputs out to be read, and read them from other ranks' blocks. Dims as in the package.

FAR: see `triton_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.put_rows import triton_far as far
from moe_kernels.put_rows.triton_kernels import await_signals, rows_at, signal_at


@triton.jit(do_not_specialize=["rank", "room"])
def publish_kernel(
    y_ptr,
    ends_ptr,
    addresses_ptr,
    rank,
    room,
    DATA_AT: tl.constexpr,
    H: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (e, i) of n: the i-th, i+n-th, … row of slot e."""
    slot = tl.program_id(0)
    end = tl.load(ends_ptr + slot)
    if PADDED:
        start = slot * room
        end += start
    else:
        previous = tl.load(ends_ptr + slot - 1, mask=slot > 0, other=0)
        start = (previous + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    data = rows_at(tl.load(addresses_ptr + rank), DATA_AT, y_ptr.dtype.element_ty)
    first_row = start + tl.program_id(1)
    for row in range(0, end - first_row, tl.num_programs(1)):
        at = (first_row + row).to(tl.int64) * H
        for first in range(0, H, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            tl.store(data + at + column, tl.load(y_ptr + at + column, mask=column < H), mask=column < H)


@triton.jit(do_not_specialize=["rank", "polls"])
def pull_kernel(
    addresses_ptr,
    step_ptr,
    slots_ptr,
    row_of_ptr,
    weights_ptr,
    out_ptr,
    rank,
    polls,
    CHANNEL: tl.constexpr,
    DATA_AT: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PULL_AT: tl.constexpr,
    FAR: tl.constexpr,
):
    """A token's sum, in out's dtype, of rows of that dtype."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    offset = tl.arange(0, COLUMNS)
    column = first + offset
    size: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth // 8
    STEP: tl.constexpr = 16 if H * size % 16 == 0 else size  # rows begin at multiples of it
    k = tl.arange(0, LANES)
    some = (k < K) & (tl.load(row_of_ptr + token * K + k, mask=k < K, other=-1) >= 0)
    homes = tl.load(slots_ptr + token * K + k, mask=some, other=0) // E
    own = tl.load(addresses_ptr + rank)
    await_signals(signal_at(own, CHANNEL, homes, S), some, tl.load(step_ptr), polls, FAR)
    total = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(K):
        row = tl.load(row_of_ptr + token * K + i)
        slot = tl.load(slots_ptr + token * K + i)
        weight = tl.load(weights_ptr + token * K + i)
        base = tl.load(addresses_ptr + slot // E, mask=row >= 0, other=0)
        at = base + DATA_AT + (row * H + first) * size
        if FAR:  # noqa: SIM102 - known when the kernel is compiled
            if (row >= 0) & (base == 0):
                at = own + PULL_AT + ((token * K + i) * H + first) * size
                theirs = own + DATA_AT + (row * H + first) * size
                width = (tl.minimum(H - first, COLUMNS) * size).to(tl.int64)
                far.get_block(at, theirs, width, (slot // E).to(tl.int32))
                tl.debug_barrier()
        data = tl.multiple_of(at.to(tl.pointer_type(out_ptr.dtype.element_ty)), STEP) + offset
        y = tl.load(data, mask=(column < H) & (row >= 0), other=0.0).to(tl.float32)
        total += tl.where(row >= 0, y * weight, 0.0)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)
