"""Kernels of absorbed attention: flash decoding over pages, parts of a sequence merged in order.

T query tokens, h heads, C latent width, R rotary width, P pages, S rows per page, N work items, M partial results.
Rows come by masked 16-byte asynchronous copies and not by TMA: what lies behind a sequence's last row of its last page
may be anything, and only a mask keeps it out of the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores_by_two(q_latent, q_rope, latent, rope_t, begin, start, stop):
    """`[BH, BN]` scores, half of the columns by each of two warpgroups.

    Both conditions hold always. But a dot whose result reaches the next dot without leaving a branch is laid out for
    warps along the heads only, and with 64 heads both warpgroups would compute the same scores.
    """
    scores = tl.zeros([q_latent.shape[0], latent.shape[0]], tl.float32)
    if begin >= start:
        scores = tl.dot(q_rope, rope_t, input_precision="ieee")
    if stop > start:
        scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
    return scores


@triton.jit
def fold(scores, latent, inside, scale, peak, total, acc):
    """One block of rows into the running softmax, in base 2."""
    scores = tl.where(inside[None, :], scores * scale, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    probs = tl.exp2(scores - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(probs, 1)
    acc = tl.dot(probs.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def load_queries(query_ptr, head_stride, heads, H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`[BH, BLOCK]` of one token, 0 outside."""
    columns = tl.arange(0, BLOCK)
    place = heads[:, None] * head_stride + columns[None, :]
    return tl.load(query_ptr + place, mask=(heads < H)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_rows(cache_ptr, row, inside, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`[BN, BLOCK]` of the flat rows `row [BN]`, 0 outside."""
    columns = tl.arange(0, BLOCK)
    place = (row * ROW)[:, None] + columns[None, :]
    return tl.load(cache_ptr + place, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def rescale(latent, scale_ptr, row, inside, C: tl.constexpr, BC: tl.constexpr, GROUP_WIDTH: tl.constexpr):
    """fp8 latents `[BN, BC]` times the scale of their row and group."""
    GROUPS: tl.constexpr = (C + GROUP_WIDTH - 1) // GROUP_WIDTH
    BG: tl.constexpr = BC // GROUP_WIDTH
    factor = load_rows(scale_ptr, row, inside, GROUPS, GROUPS, BG)
    wide = tl.reshape(latent.to(tl.float32), (latent.shape[0], BG, GROUP_WIDTH)) * factor[:, :, None]
    return tl.reshape(wide, (latent.shape[0], BC))


@triton.jit
def attend(
    q_latent,
    q_rope,
    latent_ptr,
    scale_ptr,
    rope_ptr,
    table,
    start,
    stop,
    scale,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_WARPS: tl.constexpr,
):
    """Rows `start .. stop` of a sequence: (maximum, sum, unnormalised output)."""
    BH: tl.constexpr = q_latent.shape[0]
    BC: tl.constexpr = q_latent.shape[1]
    peak, total = tl.full([BH], float("-inf"), tl.float32), tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BC], tl.float32)
    offsets = tl.arange(0, BN)
    # A block's page numbers are loaded one block ahead: an address that waits for a load would stall the copies.
    page = load_pages(table, start, stop, offsets, PAGE, BN)
    for begin in tl.range(start, stop, BN, num_stages=STAGES):
        inside = begin + offsets < stop
        next_page = load_pages(table, begin + BN, stop, offsets, PAGE, BN)
        row = page.to(tl.int64) * PAGE + ((begin % PAGE) + offsets if PAGE >= BN else (begin + offsets) % PAGE)
        latent = load_rows(latent_ptr, row, inside, LATENT_ROW, C, BC)
        if GROUP_WIDTH:
            latent = rescale(latent, scale_ptr, row, inside, C, BC, GROUP_WIDTH)
        rope = load_rows(rope_ptr, row, inside, ROPE_ROW, R, q_rope.shape[1])
        if latent.dtype != q_latent.dtype:
            latent = latent.to(tl.float32).to(q_latent.dtype)
        if rope.dtype != q_rope.dtype:
            rope = rope.to(tl.float32).to(q_rope.dtype)
        rope_t = tl.trans(rope)
        if SPLIT_WARPS:
            # Always true. Inside a branch the products wait for each other, and two buffers of rows are enough to load
            # the next block during all of this one's work; outside it takes three, which do not fit.
            if begin < stop:
                scores = scores_by_two(q_latent, q_rope, latent, rope_t, begin, start, stop)
                peak, total, acc = fold(scores, latent, inside, scale, peak, total, acc)
        else:
            scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
            scores = tl.dot(q_rope, rope_t, scores, input_precision="ieee")
            peak, total, acc = fold(scores, latent, inside, scale, peak, total, acc)
        page = next_page
    return peak, total, acc


@triton.jit
def load_pages(table, begin, stop, offsets, PAGE: tl.constexpr, BN: tl.constexpr):
    """The page of the block of rows from `begin`, one number, or `[BN]` where pages are shorter than blocks."""
    if PAGE >= BN:
        page = tl.load(table + begin // PAGE, mask=begin < stop, other=0)
    else:
        page = tl.load(table + (begin + offsets) // PAGE, mask=begin + offsets < stop, other=0)
    return page


@triton.jit(do_not_specialize=["table_stride", "num_tokens"])
def absorbed_kernel(
    q_latent_ptr,
    q_rope_ptr,
    latent_ptr,
    scale_ptr,
    rope_ptr,
    table_ptr,
    tokens_ptr,
    items_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    q_latent_token,
    q_latent_head,
    q_rope_token,
    q_rope_head,
    table_stride,
    num_tokens,
    scale,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    PAGE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_WARPS: tl.constexpr,
):
    """One part of one token's rows for one block of heads; the output itself where the part is all."""
    item = tl.program_id(1)
    token = tl.load(items_ptr + item).to(tl.int64)
    if token >= num_tokens:
        return
    length, part_rows = tl.load(tokens_ptr + token * 4), tl.load(tokens_ptr + token * 4 + 1)
    part = item - tl.load(tokens_ptr + token * 4 + 2)
    start = part * part_rows
    stop, table = tl.minimum(start + part_rows, length), table_ptr + token * table_stride
    heads = tl.program_id(0) * BH + tl.arange(0, BH)
    q_latent = load_queries(q_latent_ptr + token * q_latent_token, q_latent_head, heads, H, C, BC)
    q_rope = load_queries(q_rope_ptr + token * q_rope_token, q_rope_head, heads, H, R, BR)
    rows = (latent_ptr, scale_ptr, rope_ptr, table, start, stop, scale)
    peak, total, acc = attend(
        q_latent, q_rope, *rows, C, R, PAGE, LATENT_ROW, ROPE_ROW, GROUP_WIDTH, BN, STAGES, SPLIT_WARPS
    )

    acc = acc / total[:, None]
    columns = tl.arange(0, BC)
    kept = (heads < H)[:, None] & (columns < C)[None, :]
    if part_rows >= length:
        place = (token * H + heads)[:, None] * C + columns[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=kept)
    else:
        slot = (tl.load(tokens_ptr + token * 4 + 3) + part).to(tl.int64) * H + heads
        tl.store(partial_ptr + slot[:, None] * C + columns[None, :], acc, mask=kept)
        tl.store(lse_ptr + slot, peak + tl.log2(total), mask=heads < H)


@triton.jit
def merge_kernel(
    tokens_ptr, out_ptr, partial_ptr, lse_ptr, H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr
):
    """A token's parts in order; zeros for a token without rows; nothing to do where one part is all."""
    token = tl.program_id(0).to(tl.int64)
    length = tl.load(tokens_ptr + token * 4)
    part_rows = tl.load(tokens_ptr + token * 4 + 1)
    if (length > 0) & (length <= part_rows):
        return
    first = tl.load(tokens_ptr + token * 4 + 3).to(tl.int64)
    heads, columns = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BC)
    kept = (heads < H)[:, None] & (columns < C)[None, :]
    peak = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BC], tl.float32)
    for part in range(tl.cdiv(length, part_rows)):
        slot = (first + part) * H + heads
        lse = tl.load(lse_ptr + slot, mask=heads < H, other=0.0)
        values = tl.load(partial_ptr + slot[:, None] * C + columns[None, :], mask=kept, other=0.0)
        new_peak = tl.maximum(peak, lse)
        decay, weight = tl.exp2(peak - new_peak), tl.exp2(lse - new_peak)
        acc = acc * decay[:, None] + values * weight[:, None]
        total = total * decay + weight
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (token * H + heads)[:, None] * C + columns[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=kept)
