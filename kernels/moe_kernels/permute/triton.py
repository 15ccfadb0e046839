"""Permutation in Triton, without atomics and without a wait of the host. T tokens, K top-k, H hidden, R rows, E slots.

Assignments are numbered n = t * K + k. Assignment n goes to row start(slot) + (how many before n have its slot), so the
order is that of a stable sort. Up to ONE_LAUNCH assignments every token's program counts all of them: one launch.
Beyond that, `count_kernel` counts block by block of tokens, `scan_kernel` sums each slot's counts over the blocks, and
a token's program counts within its own block only: three launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require
from moe_kernels.permute.triton_combine import combine_cases
from moe_kernels.quant.eager import FP8, empty_scale
from moe_kernels.quant.triton import empty_fp8, quantized_groups
from moe_kernels.scaled import BlockScaled

ONE_LAUNCH = 4096
GROUP = 128
BLOCK_TOKENS = 64
PLAIN, QUANTIZE, SCALED = 0, 1, 2
_QUANTIZE = tl.constexpr(QUANTIZE)
Tokens = Tensor | BlockScaled


@triton.jit
def histogram(slots, E: tl.constexpr, BINS: tl.constexpr):
    """`slots [N] int32` -> `[BINS]`; ids outside 0..E-1 go nowhere."""
    valid = (slots >= 0) & (slots < E)
    return tl.histogram(tl.where(valid, slots, 0), BINS, mask=valid)


@triton.jit(do_not_specialize=["N"])
def count_kernel(
    slots_ptr, counts_ptr, N, PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr
):
    """`counts [E, blocks] int32`: the assignments of each block of PER_BLOCK to each slot."""
    block = tl.program_id(0)
    offset = tl.arange(0, CHUNK)
    place = block * PER_BLOCK + offset
    slots = tl.load(slots_ptr + place, mask=(offset < PER_BLOCK) & (place < N), other=-1).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins * tl.num_programs(0) + block, histogram(slots, E, BINS), mask=bins < E)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(counts_ptr, totals_ptr, blocks, BLOCKS: tl.constexpr):
    """Per slot: its counts become those of earlier blocks; `totals [E] int32`."""
    slot = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    counts = tl.load(counts_ptr + slot * blocks + block, mask=block < blocks, other=0)
    tl.store(counts_ptr + slot * blocks + block, tl.cumsum(counts, 0) - counts, mask=block < blocks)
    tl.store(totals_ptr + slot, tl.sum(counts))


@triton.jit
def same_slot_before(slots_ptr, first, stop, mine, CHUNK: tl.constexpr):
    """For each slot in `mine`, its assignments among numbers first..stop-1, of which there are at most CHUNK."""
    place = first + tl.arange(0, CHUNK)
    slots = tl.load(slots_ptr + place, mask=place < stop, other=-1).to(tl.int32)
    return tl.sum((slots[:, None] == mine[None, :]).to(tl.int32), axis=0)


@triton.jit
def with_scale(values, data_ptr, x_scale_at, known, MODE: tl.constexpr, UE8M0: tl.constexpr):
    """`values [N]` as the rows hold them, and the scale of each 128: computed, or those that came with them."""
    if MODE == _QUANTIZE:
        groups: tl.constexpr = values.shape[0] // 128
        wide, scale = quantized_groups(tl.reshape(values.to(tl.float32), [1, groups, 128]), UE8M0)
        return tl.reshape(wide, values.shape).to(data_ptr.dtype.element_ty), tl.reshape(scale, [groups])
    else:
        return values, tl.load(x_scale_at, mask=known, other=0.0)


@triton.jit(do_not_specialize=["N", "blocks"])
def place_kernel(
    x_ptr,
    x_scale_ptr,
    slots_ptr,
    earlier_ptr,
    totals_ptr,
    data_ptr,
    scale_ptr,
    psum_ptr,
    row_of_ptr,
    N,
    blocks,
    x_stride,
    x_scale_row_stride,
    x_scale_group_stride,
    scale_row_stride,
    scale_group_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ONE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
    UE8M0: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, LANES)
    mine = tl.load(slots_ptr + token * K + k, mask=k < K, other=-1).to(tl.int32)
    valid = (mine >= 0) & (mine < E)
    bins = tl.arange(0, BINS)
    # Of the same token, assignments before k.
    row = tl.sum(((mine[:, None] == mine[None, :]) & (k[:, None] < k[None, :])).to(tl.int32), axis=0)
    if ONE:
        totals = tl.zeros([BINS], tl.int32)
        for first in range(0, N, CHUNK):
            place = first + tl.arange(0, CHUNK)
            slots = tl.load(slots_ptr + place, mask=place < N, other=-1).to(tl.int32)
            totals += histogram(slots, E, BINS)
            slots = tl.where(place < token * K, slots, -1)
            row += tl.sum((slots[:, None] == mine[None, :]).to(tl.int32), axis=0)
    else:
        totals = tl.load(totals_ptr + bins, mask=bins < E, other=0)
        block = token * K // PER_BLOCK
        row += tl.load(earlier_ptr + mine * blocks + block, mask=valid, other=0)
        row += same_slot_before(slots_ptr, block * PER_BLOCK, token * K, mine, CHUNK)
    spans = (totals + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    starts = tl.cumsum(spans, 0) - spans
    row += tl.sum(tl.where(bins[:, None] == mine[None, :], starts[:, None], 0), axis=0)
    row = tl.where(valid, row, -1)
    if part == 0:
        tl.store(row_of_ptr + token * K + k, row.to(tl.int64), mask=k < K)
        tl.store(psum_ptr + bins, starts + totals, mask=(bins < E) & (token == 0))
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x_ptr + token * x_stride + column, mask=column < H, other=0)
    if MODE != 0:
        groups = part * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
        known = groups * 128 < H
        x_scale_at = x_scale_ptr + token * x_scale_row_stride + groups * x_scale_group_stride
        values, scale = with_scale(values, data_ptr, x_scale_at, known, MODE, UE8M0)
    for i in tl.static_range(K):
        target = tl.sum(tl.where(k == i, row, 0)).to(tl.int64)
        if target >= 0:
            tl.store(data_ptr + target * H + column, values, mask=column < H)
            if MODE != 0:
                tl.store(scale_ptr + target * scale_row_stride + groups * scale_group_stride, scale, mask=known)


@dataclass(frozen=True, slots=True)
class Config:
    """Launch geometry; no choice here shows in the results."""

    one: bool
    columns: int
    num_warps: int


def configure(tokens: int, k: int, hidden: int, itemsize: int) -> Config:
    """By reasoning, not yet measured on hardware: the widest part of a row that still gives 1056 programs (8 for each
    of 132 SMs), since each one ranks its token's assignments anew; 4 warps read 2 KiB at 16 bytes a thread, 8 more.
    """
    columns = max(2048 // itemsize, GROUP)
    while columns < min(hidden, 8192) and tokens * triton.cdiv(hidden, 2 * columns) >= 1056:
        columns *= 2
    columns = min(columns, max(GROUP, triton.next_power_of_2(hidden)))
    return Config(tokens * k <= ONE_LAUNCH, columns, 4 if columns * itemsize <= 2048 else 8)


def _place_constants(k: int, num_slots: int, alignment: int, config: Config) -> dict[str, object]:
    """Constants of `place_kernel` that do not come from the rows' form."""
    return {
        "K": k,
        "LANES": triton.next_power_of_2(k),
        "E": num_slots,
        "BINS": max(32, triton.next_power_of_2(num_slots)),
        "ALIGNMENT": alignment,
        "ONE": config.one,
        "PER_BLOCK": BLOCK_TOKENS * k,
        "CHUNK": 1024 if config.one else triton.next_power_of_2(BLOCK_TOKENS * k),
        "COLUMNS": config.columns,
    }


def permute(
    x: Tokens, slots: Tensor, num_slots: int, alignment: int, quantize: bool, ue8m0: bool, layout: str, room: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(data [R, H], psum [E] int32, row_of [T, K] int64, scale [R, G] or None)`."""
    source = x if isinstance(x, Tensor) else x.data.view(torch.uint8)
    tokens, hidden = source.shape
    k, device = slots.shape[1], source.device
    require(
        source.stride(1) == 1 and slots.dtype == torch.int64 and slots.is_contiguous() and 1 <= num_slots <= 4096,
        f"permute: x has strides {source.stride()}, slots are {slots.dtype} with strides {slots.stride()} for "
        f"{num_slots} slots; rows must have unit stride, slots be contiguous int64 and at most 4096; .contiguous()",
    )
    rows, mode = tokens * k + (alignment - 1) * num_slots if room is None else room, PLAIN
    scale: Tensor | None = None
    if quantize or not isinstance(x, Tensor):
        scale = empty_scale(rows, triton.cdiv(hidden, GROUP), layout, device)
        mode = QUANTIZE if quantize else SCALED
    data = empty_fp8(rows, hidden, device=device) if quantize else source.new_empty(rows, hidden)
    row_of = torch.empty(tokens, k, dtype=torch.int64, device=device)
    if not row_of.numel():
        return _as_fp8(data, mode), torch.zeros(num_slots, dtype=torch.int32, device=device), row_of, scale
    psum = torch.empty(num_slots, dtype=torch.int32, device=device)
    config = configure(tokens, k, hidden, source.element_size())
    constants = _place_constants(k, num_slots, alignment, config)
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    earlier = totals = psum
    if not config.one:
        earlier = torch.empty(num_slots, blocks, dtype=torch.int32, device=device)
        totals = torch.empty_like(psum)
        shared = {name: constants[name] for name in ("PER_BLOCK", "CHUNK", "E", "BINS")}
        count_kernel[(blocks,)](slots, earlier, tokens * k, **shared, num_warps=4)
        scan_kernel[(num_slots,)](earlier, totals, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1)
    x_scale = scale if isinstance(x, Tensor) else x.scale
    place_kernel[(tokens, triton.cdiv(hidden, config.columns))](
        source,
        source if x_scale is None else x_scale,
        slots,
        earlier,
        totals,
        data,
        data if scale is None else scale,
        psum,
        row_of,
        tokens * k,
        blocks,
        source.stride(0),
        *((0, 0) if x_scale is None else x_scale.stride()),
        *((0, 0) if scale is None else scale.stride()),
        H=hidden,
        **constants,
        MODE=mode,
        UE8M0=ue8m0,
        num_warps=config.num_warps,
    )
    return _as_fp8(data, mode), psum, row_of, scale


def _as_fp8(data: Tensor, mode: int) -> Tensor:
    """Rows as the caller wants them: bytes of fp8 were copied as integers."""
    return data if mode == PLAIN else data.view(FP8) if mode == SCALED else data.to(FP8)


def aot_cases() -> Iterator[AotCase]:
    """DeepSeek-V3 at 128 and 16,384 tokens, rows plain, quantised and scaled; the demo model."""
    pointers = {"x_scale_ptr": "*fp32", "slots_ptr": "*i64", "row_of_ptr": "*i64", "scale_ptr": "*fp32"}
    pointers |= dict.fromkeys(("earlier_ptr", "totals_ptr", "psum_ptr"), "*i32")
    strides = ("x_stride", "x_scale_row_stride", "x_scale_group_stride", "scale_row_stride", "scale_group_stride")
    scalars = dict.fromkeys(("N", "blocks", *strides), "i32")
    forms = {
        PLAIN: ("plain", "*bf16", "*bf16"),
        QUANTIZE: ("quantize", "*bf16", "*fp8e4nv"),
        SCALED: ("scaled", "*u8", "*u8"),
    }
    shapes = ((128, 7168), (16_384, 7168), (128, 128))
    for (tokens, hidden), (mode, (form, source, data)) in product(shapes, forms.items()):
        config = configure(tokens, 8, hidden, 1 if mode == SCALED else 2)
        constants = _place_constants(8, 256, 128, config) | {"H": hidden, "MODE": mode, "UE8M0": False}
        yield AotCase(
            op="permute",
            name=f"permute {form} T{tokens} H{hidden}",
            kernel=place_kernel,
            signature=pointers | scalars | {"x_ptr": source, "data_ptr": data},
            constants=constants,
            num_warps=config.num_warps,
            aligned=("x_ptr", "data_ptr", "slots_ptr", "x_stride"),
            quick=(tokens, hidden, mode) == (16_384, 7168, QUANTIZE),
        )
    shared = {"PER_BLOCK": BLOCK_TOKENS * 8, "CHUNK": 512, "E": 256, "BINS": 256}
    yield AotCase(
        op="permute",
        name="count",
        kernel=count_kernel,
        signature={"slots_ptr": "*i64", "counts_ptr": "*i32", "N": "i32"},
        constants=shared,
        num_warps=4,
        aligned=("slots_ptr", "counts_ptr"),
        quick=True,
    )
    yield AotCase(
        op="permute",
        name="scan",
        kernel=scan_kernel,
        signature={"counts_ptr": "*i32", "totals_ptr": "*i32", "blocks": "i32"},
        constants={"BLOCKS": 256},
        num_warps=1,
        aligned=("counts_ptr", "totals_ptr"),
        quick=True,
    )
    yield from combine_cases()
