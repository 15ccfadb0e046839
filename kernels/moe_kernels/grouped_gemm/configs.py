"""Which tiles a grouped GEMM on Triton takes: a pure function of static shapes, so that captured graphs stay valid.

E slots, R rows, K input width, N output width. Nothing here was measured: every entry comes from counting registers
(65,536 per SM), shared memory (227 KiB per SM) and bytes in flight on an H200 (4.8 TB/s over 132 SMs need about 40 KiB
per SM at 1 us latency), and from what the compiler reports (`python -m moe_kernels.aot --only grouped_gemm experts`).
Up to 64 rows per slot decide the height; among the rest of the entries the least counted time (`counted_us`) does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

SMS: Final = 132
"""SMs of an H100 or H200: the configuration must not differ between them."""

HBM_BYTES_PER_US: Final = 4.3e6
"""What an H200's memory gives at best: 90 % of its datasheet."""

L2_BYTES_PER_US: Final = 5.5e6
"""What all SMs together read out of L2, by published measurements of an H100."""

SM_BYTES_PER_US: Final = 9.5e4
"""What one SM takes in: 85 % of 64 bytes a clock at 1.755 GHz."""

SM_BYTE_FLOPS_PER_US: Final = 1.5e7
"""FLOP of one SM's tensor cores times the bytes of an element: 1979 TFLOP/s of fp8, half of bf16."""

LAUNCH_US: Final = 3.0
"""A small kernel more in a captured graph: its start, its tail and the gap."""

WORTH: Final = 0.9
IDLE_US: Final = 0.001
"""A program that has nothing to do, by reasoning: 132 SMs start and end a thousand in about a microsecond."""
"""What another way may count, of the fused one's time, to be taken: the count is no finer than that."""


@dataclass(frozen=True, slots=True)
class Config:
    """Tiles of `block_m` rows by `tiles` x `block_n` weight rows, along K in steps of `block_k`.

    `swap`: computed transposed, for fewer than 64 rows; `group`: row tiles that go through the columns together (L2);
    `programs_per_sm`: how many programs fit one SM, so the grid.
    """

    block_m: int
    block_n: int
    block_k: int
    tiles: int
    swap: bool
    warps: int
    stages: int
    programs_per_sm: int
    group: int = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: who serves a class of shapes, how, and why (`source`: a measurement, or the reasoning)."""

    backend: str
    config: Config
    source: str


COUNTED: Final = "counted, not measured: "


def _entry(source: str, *numbers: int, swap: bool = False) -> Entry:
    """`numbers`: block_m, block_n, block_k, tiles, warps, stages, programs_per_sm."""
    block_m, block_n, block_k, tiles, warps, stages, programs = numbers
    return Entry("triton", Config(block_m, block_n, block_k, tiles, swap, warps, stages, programs), COUNTED + source)


def _swapped(source: str, *numbers: int) -> Entry:
    return _entry(source, *numbers, swap=True)


_ONE_TILE: Final = "one weight tile: twice the tiles of a pair"
_NARROW: Final = "few slots of few rows, or few columns: more SMs pull weights"
_AS_FP8: Final = "as fp8, in half the step"

# (bytes of an element, swiglu, block_m): entries, widest first. One stage holds (block_m + tiles * block_n) * block_k
# elements; with swiglu the two weight tiles are gate and up, and in fp8 their 128 columns share a scale, so that there
# nothing is narrower. Two narrow tiles would share a block of scales, which the kernel does not serve.
_TABLE: Final = {
    (1, True, 16): (_swapped("2 x 102 KiB, one loads as one stores", 16, 128, 128, 2, 4, 3, 2),),
    (1, True, 32): (_swapped("2 x 108 KiB, 168-176 registers", 32, 128, 128, 2, 4, 3, 2),),
    (1, True, 64): (_entry("64 rows fill WGMMA, 4 warps spill", 64, 128, 128, 2, 8, 5, 1),),
    (1, True, 128): (_entry("170 FLOP per byte of L2, 4 x 48 KiB", 128, 128, 128, 2, 8, 4, 1),),
    (1, False, 16): (
        _swapped(_ONE_TILE, 16, 128, 128, 1, 4, 5, 2),
        _swapped(_NARROW, 16, 64, 128, 1, 4, 10, 2),
    ),
    (1, False, 32): (
        _swapped(_ONE_TILE, 32, 128, 128, 1, 4, 5, 2),
        _swapped(_NARROW, 32, 64, 128, 1, 4, 8, 2),
    ),
    (1, False, 64): (
        _entry("as with swiglu", 64, 128, 128, 2, 8, 5, 1),
        _entry(_NARROW, 64, 128, 128, 1, 4, 8, 1),
        _entry(_NARROW, 64, 64, 128, 1, 4, 6, 2),
    ),
    (1, False, 128): (
        _entry("as with swiglu", 128, 128, 128, 2, 8, 4, 1),
        _entry(_NARROW, 128, 128, 128, 1, 8, 6, 1),
    ),
    # bf16 and fp16.
    (2, True, 16): (_swapped(_AS_FP8, 16, 128, 64, 2, 4, 3, 2), _swapped(_NARROW, 16, 64, 64, 2, 4, 5, 2)),
    (2, True, 32): (_swapped(_AS_FP8, 32, 128, 64, 2, 4, 3, 2), _swapped(_NARROW, 32, 64, 64, 2, 4, 5, 2)),
    (2, True, 64): (_entry(_AS_FP8, 64, 128, 64, 2, 8, 5, 1), _entry(_NARROW, 64, 64, 64, 2, 4, 8, 1)),
    (2, True, 128): (_entry(_AS_FP8, 128, 128, 64, 2, 8, 4, 1),),
    (2, False, 16): (_swapped(_AS_FP8, 16, 128, 64, 1, 4, 5, 2), _swapped(_NARROW, 16, 64, 64, 1, 4, 10, 2)),
    (2, False, 32): (_swapped(_AS_FP8, 32, 128, 64, 1, 4, 5, 2), _swapped(_NARROW, 32, 64, 64, 1, 4, 8, 2)),
    (2, False, 64): (
        _entry(_AS_FP8, 64, 128, 64, 2, 8, 5, 1),
        _entry(_NARROW, 64, 128, 64, 1, 4, 8, 1),
        _entry(_NARROW, 64, 64, 64, 1, 4, 6, 2),
    ),
    (2, False, 128): (_entry(_AS_FP8, 128, 128, 64, 2, 8, 4, 1), _entry(_NARROW, 128, 128, 64, 1, 8, 6, 1)),
    # fp32 has no exact tensor cores and serves comparisons: one small tile for all.
    (4, True, 32): (_entry("exactness only", 32, 64, 32, 2, 4, 3, 1),),
    (4, False, 32): (_entry("exactness only", 32, 64, 32, 1, 4, 3, 1),),
}

INVARIANT_BLOCK_M: Final = 64
"""Rows per tile of the invariant mode: wide enough for prefill, and decode pads at most 64 rows per slot."""


def configure(
    *, rows_per_slot: int, slots: int, n: int, k: int, dtype: torch.dtype, swiglu: bool, batch_invariant: bool
) -> Entry:
    """The tiles for slots of about `rows_per_slot` rows (the mean of ragged rows, the capacity of padded ones).

    `n`: columns of the output, `k` of the input. With `batch_invariant` a function of dtype and `swiglu` alone.
    """
    size = dtype.itemsize
    if size == 4:
        return _TABLE[4, swiglu, 32][0]
    if batch_invariant:
        return _TABLE[size, swiglu, INVARIANT_BLOCK_M][0]
    lowest = next((most for most in (16, 32, 64) if rows_per_slot <= most), 128)
    heights = (128, 64) if lowest == 128 else (lowest,)
    return min(
        (entry for height in heights for entry in _TABLE[size, swiglu, height]),
        key=lambda entry: counted_us(entry.config, rows_per_slot, slots, n=n, k=k, size=size, swiglu=swiglu),
    )


def counted_us(config: Config, rows_per_slot: int, slots: int, *, n: int, k: int, size: int, swiglu: bool) -> float:
    """Microseconds at best: weights from memory once, all tiles' operands out of L2, and the busiest SM's tiles."""
    tiles = slots * -(-max(1, rows_per_slot) // config.block_m) * -(-n // columns(config, swiglu=swiglu))
    weights = slots * n * (2 if swiglu else 1) * k * size
    operands = (config.block_m + config.tiles * config.block_n) * k * size
    products = 2.0 * config.block_m * config.tiles * config.block_n * k
    one_tile = max(operands / SM_BYTES_PER_US, products * size / SM_BYTE_FLOPS_PER_US)
    return max(weights / HBM_BYTES_PER_US, tiles * operands / L2_BYTES_PER_US, -(-tiles // SMS) * one_tile)


def separate_swiglu(*, rows_per_slot: int, total_rows: int, slots: int, width: int, k: int) -> bool:
    """Whether the experts' first product in fp8 is better followed by SwiGLU in a launch of its own.

    Fused tiles are 128 columns wide (a scale's group), so 16 for a slot of DeepSeek-V3; plain ones may be 64 of twice
    as many columns. That pays where one or two slots have few rows. `total_rows`: the room that SwiGLU's programs are
    launched for, of which those past the last slot's end do nothing. `width`: columns of its output. Not for the
    invariant mode, whose epilogue is always the fused one.
    """
    if width % 128:
        return False  # gate and up would share a block of scales
    shape = {"rows_per_slot": rows_per_slot, "slots": slots, "k": k, "dtype": torch.float8_e4m3fn}
    fused = configure(n=width, swiglu=True, batch_invariant=False, **shape).config  # type: ignore[arg-type]
    plain = configure(n=2 * width, swiglu=False, batch_invariant=False, **shape).config  # type: ignore[arg-type]
    one = counted_us(fused, rows_per_slot, slots, n=width, k=k, size=1, swiglu=True)
    two = counted_us(plain, rows_per_slot, slots, n=2 * width, k=k, size=1, swiglu=False)
    # Gate and up come and go in fp32: 16 bytes a column, and one for what is written.
    moved = 17 * min(rows_per_slot * slots, total_rows) * width / HBM_BYTES_PER_US
    idle = IDLE_US * (total_rows / 4) * (width / 1024)
    return two + LAUNCH_US + moved + idle < WORTH * one


def columns(config: Config, *, swiglu: bool) -> int:
    """Output columns of one tile."""
    return config.block_n if swiglu else config.block_n * config.tiles


def shipped() -> list[tuple[int, bool, Entry]]:
    """Every entry: (bytes of an element, swiglu, entry)."""
    return [(size, swiglu, entry) for (size, swiglu, _), entries in _TABLE.items() for entry in entries]
