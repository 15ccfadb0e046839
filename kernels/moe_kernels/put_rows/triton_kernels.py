"""Triton kernels that store to and load from other ranks' blocks by their addresses. Dims as in the package.

What a kernel wrote to other ranks is theirs to read once the next kernel of its stream has released a signal.
FAR: some ranks have no address here (0); NVSHMEM carries what is theirs, from and to memory of the block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.permute.triton import histogram, same_slot_before
from moe_kernels.put_rows import triton_far as far


@triton.jit
def signal_at(base, channel, rank, S: tl.constexpr):
    """Address of the signal of `rank` in the block at `base`."""
    return (base + (channel * S + rank) * 8).to(tl.pointer_type(tl.int64))


@triton.jit
def rows_at(base, AT: tl.constexpr, dtype: tl.constexpr):
    """The rows in the block at `base`. The compiler cannot see that blocks begin at multiples of 16 bytes, and would
    store and load value by value."""
    return tl.multiple_of((base + AT).to(tl.pointer_type(dtype)), 16)


@triton.jit
def await_signals(signals, mask, step, polls, FAR: tl.constexpr):
    """Until every signal under `mask` has come to `step`; an assertion after `polls` looks.

    FAR: NVSHMEM's own wait, which never ends by itself, follows: it makes what came before the signal visible.
    """
    nothing = tl.zeros(signals.shape, tl.int64)
    seen = tl.atomic_add(signals, nothing, mask=mask, sem="acquire", scope="sys")
    late = tl.sum((mask & (seen < step)).to(tl.int32))
    looks = 1
    while (late > 0) & (looks < polls):
        seen = tl.atomic_add(signals, nothing, mask=mask, sem="acquire", scope="sys")
        late = tl.sum((mask & (seen < step)).to(tl.int32))
        looks += 1
    tl.device_assert(late == 0, "put_rows: a rank did not come in time")
    if FAR:
        far.signal_wait_until(signals.to(tl.int64), far.AT_LEAST, tl.where(mask, step, 0))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "rank"])
def announce_kernel(
    slots_ptr,
    totals_ptr,
    addresses_ptr,
    step_ptr,
    N,
    rank,
    COUNTS_AT: tl.constexpr,
    CHANNEL: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    ONE: tl.constexpr,
    CHUNK: tl.constexpr,
    FAR: tl.constexpr,
):
    """To rank `program`: this rank's counts, then the signal."""
    bins = tl.arange(0, BINS)
    if ONE:
        totals = tl.zeros([BINS], tl.int32)
        for first in range(0, N, CHUNK):
            at = first + tl.arange(0, CHUNK)
            totals += histogram(tl.load(slots_ptr + at, mask=at < N, other=-1).to(tl.int32), P, BINS)
    else:
        totals = tl.load(totals_ptr + bins, mask=bins < P, other=0)
    base = tl.load(addresses_ptr + tl.program_id(0))
    own = tl.load(addresses_ptr + rank)
    near = base if not FAR else tl.where(base == 0, own, base)  # for a far rank, all write the same here
    counts = (near + COUNTS_AT).to(tl.pointer_type(tl.int32)) + rank * P
    tl.store(counts + bins, totals, mask=bins < P)
    tl.debug_barrier()
    step = tl.load(step_ptr)
    if FAR:
        if base == 0:
            at = counts.to(tl.int64)
            signal = signal_at(own, CHANNEL, rank, S).to(tl.int64)
            far.put_signal_block(at, at, tl.full((), P * 4, tl.int64), signal, step, far.SET, tl.program_id(0))
        else:
            tl.atomic_xchg(signal_at(base, CHANNEL, rank, S), step, sem="release", scope="sys")
    else:
        tl.atomic_xchg(signal_at(base, CHANNEL, rank, S), step, sem="release", scope="sys")


@triton.jit(do_not_specialize=["rank", "polls", "room"])
def offsets_kernel(
    addresses_ptr,
    step_ptr,
    first_row_ptr,
    ends_ptr,
    rank,
    polls,
    room,
    COUNTS_AT: tl.constexpr,
    CHANNEL: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    SOURCES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PADDED: tl.constexpr,
    FAR: tl.constexpr,
):
    """Once all counts are here: `first_row [P] int32` at rank `program`'s slots, and this rank's own `ends [E]`."""
    home = tl.program_id(0)
    own = tl.load(addresses_ptr + rank)
    source = tl.arange(0, SOURCES)
    await_signals(signal_at(own, CHANNEL, source, S), source < S, tl.load(step_ptr), polls, FAR)
    counts = (own + COUNTS_AT).to(tl.pointer_type(tl.int32))
    slot = tl.arange(0, LANES)
    totals = tl.zeros([LANES], tl.int32)
    before = tl.zeros([LANES], tl.int32)
    for first in range(0, S, CHUNK):
        chunk = first + tl.arange(0, CHUNK)
        at = chunk[:, None] * (S * E) + home * E + slot[None, :]
        found = tl.load(counts + at, mask=(chunk[:, None] < S) & (slot[None, :] < E), other=0)
        totals += tl.sum(found, axis=0)
        before += tl.sum(tl.where(chunk[:, None] < rank, found, 0), axis=0)
    if PADDED:
        starts, ends = slot * room, totals
    else:
        spans = (totals + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        starts = tl.cumsum(spans, 0) - spans
        ends = starts + totals
    tl.store(first_row_ptr + home * E + slot, starts + before, mask=slot < E)
    tl.store(ends_ptr + slot, ends, mask=(slot < E) & (home == rank))


@triton.jit(do_not_specialize=["rank", "blocks"])
def place_kernel(
    x_ptr,
    scale_ptr,
    slots_ptr,
    earlier_ptr,
    first_row_ptr,
    addresses_ptr,
    row_of_ptr,
    rank,
    blocks,
    x_stride,
    scale_stride,
    to_row_stride,
    to_group_stride,
    DATA_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    ONE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGE_AT: tl.constexpr,
    FAR: tl.constexpr,
):
    """A token's row to each of its slots; with GROUPS, a scale per 128 columns along with it."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, LANES)
    mine = tl.load(slots_ptr + token * K + k, mask=k < K, other=-1).to(tl.int32)
    valid = (mine >= 0) & (mine < P)
    row = tl.sum(((mine[:, None] == mine[None, :]) & (k[:, None] < k[None, :])).to(tl.int32), axis=0)
    if ONE:
        for first in range(0, token * K, CHUNK):
            row += same_slot_before(slots_ptr, first, token * K, mine, CHUNK)
    else:
        block = token * K // PER_BLOCK
        row += tl.load(earlier_ptr + mine * blocks + block, mask=valid, other=0)
        row += same_slot_before(slots_ptr, block * PER_BLOCK, token * K, mine, CHUNK)
    row += tl.load(first_row_ptr + mine, mask=valid, other=0)
    row = tl.where(valid, row, -1)
    if part == 0:
        tl.store(row_of_ptr + token * K + k, row.to(tl.int64), mask=k < K)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x_ptr + token * x_stride + column, mask=column < H, other=0)
    size: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    width = tl.minimum(H - part * COLUMNS, COLUMNS) * size
    if FAR:
        own = tl.load(addresses_ptr + rank)
        stage = own + STAGE_AT + (token * H + part * COLUMNS) * size
        offset = tl.arange(0, COLUMNS)
        STEP: tl.constexpr = 16 if H * size % 16 == 0 else size
        there = tl.multiple_of(stage.to(tl.pointer_type(x_ptr.dtype.element_ty)), STEP)
        tl.store(there + offset, values, mask=column < H)
        tl.debug_barrier()
    for i in tl.static_range(K):
        to = tl.sum(tl.where(k == i, row, 0), axis=0).to(tl.int64)
        home = tl.sum(tl.where(k == i, mine, 0), axis=0) // E
        base = tl.load(addresses_ptr + home, mask=to >= 0, other=0)
        if FAR:  # noqa: SIM102 - known when the kernel is compiled
            if (to >= 0) & (base == 0):
                at = own + DATA_AT + (to * H + part * COLUMNS) * size
                far.put_block(at, stage, width.to(tl.int64), home)
        if (to >= 0) & (base != 0):
            data = rows_at(base, DATA_AT, x_ptr.dtype.element_ty)
            tl.store(data + to * H + column, values, mask=column < H)
            if GROUPS:
                group = part * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
                scale = tl.load(scale_ptr + token * scale_stride + group, mask=group < GROUPS, other=0.0)
                scales = (base + SCALES_AT).to(tl.pointer_type(tl.float32))
                tl.store(scales + to * to_row_stride + group * to_group_stride, scale, mask=group < GROUPS)


@triton.jit(do_not_specialize=["rank"])
def signal_kernel(
    addresses_ptr,
    step_ptr,
    rank,
    CHANNEL: tl.constexpr,
    S: tl.constexpr,
    LANES: tl.constexpr,
    FAR: tl.constexpr,
):
    """To every rank: this one has come so far, with all that its stream did before."""
    lane = tl.arange(0, LANES)
    base = tl.load(addresses_ptr + lane, mask=lane < S, other=0)
    number = tl.load(step_ptr)
    step = tl.zeros([LANES], tl.int64) + number
    tl.atomic_xchg(signal_at(base, CHANNEL, rank, S), step, mask=base != 0, sem="release", scope="sys")
    if FAR:
        far.quiet()
        signal = signal_at(tl.load(addresses_ptr + rank), CHANNEL, rank, S).to(tl.int64)
        for other in range(S):
            if tl.load(addresses_ptr + other) == 0:
                far.signal_op(signal, number, far.SET, other)


@triton.jit(do_not_specialize=["rank", "polls"])
def arrive_kernel(
    addresses_ptr,
    step_ptr,
    rank,
    polls,
    CHANNEL: tl.constexpr,
    S: tl.constexpr,
    LANES: tl.constexpr,
    FAR: tl.constexpr,
):
    lane = tl.arange(0, LANES)
    own = tl.load(addresses_ptr + rank)
    await_signals(signal_at(own, CHANNEL, lane, S), lane < S, tl.load(step_ptr), polls, FAR)
