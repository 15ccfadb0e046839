"""Which tiles a grouped GEMM on Triton takes: a pure function of static shapes, so that captured graphs stay valid.

E slots, R rows, K input width, N output width. Nothing here was measured: every entry comes from counting registers
(65,536 per SM), shared memory (227 KiB per SM) and bytes in flight on an H200 (4.8 TB/s over 132 SMs need about 40 KiB
per SM at 1 us latency), and from what the compiler reports (`python -m moe_kernels.aot --only grouped_gemm experts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

SMS: Final = 132
"""SMs of an H100 or H200: the configuration must not differ between them."""


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

# (bytes of an element, swiglu, block_m): entries. One stage holds (block_m + tiles * block_n) * block_k elements; with
# swiglu the two weight tiles are gate and up, whose 128 columns share a scale.
_TABLE: Final = {
    (1, True, 16): Entry(
        "triton", Config(16, 128, 128, 2, True, 4, 3, 2), COUNTED + "2 x 102 KiB; one loads as one stores"
    ),
    (1, True, 32): Entry("triton", Config(32, 128, 128, 2, True, 4, 3, 2), COUNTED + "2 x 108 KiB, 168-176 registers"),
    (1, True, 64): Entry(
        "triton", Config(64, 128, 128, 2, False, 8, 5, 1), COUNTED + "64 rows fill WGMMA; 4 warps spill"
    ),
    (1, True, 128): Entry(
        "triton", Config(128, 128, 128, 2, False, 8, 4, 1), COUNTED + "170 FLOP per byte of L2; 4 x 48 KiB"
    ),
    (1, False, 16): Entry(
        "triton", Config(16, 128, 128, 1, True, 4, 5, 2), COUNTED + "one weight tile: twice the tiles"
    ),
    (1, False, 32): Entry(
        "triton", Config(32, 128, 128, 1, True, 4, 5, 2), COUNTED + "one weight tile: twice the tiles"
    ),
    (1, False, 64): Entry("triton", Config(64, 128, 128, 2, False, 8, 5, 1), COUNTED + "as with swiglu"),
    (1, False, 128): Entry("triton", Config(128, 128, 128, 2, False, 8, 4, 1), COUNTED + "as with swiglu"),
    # bf16 and fp16: the same bytes per stage, in half the step.
    (2, True, 16): Entry("triton", Config(16, 128, 64, 2, True, 4, 3, 2), COUNTED + "as fp8"),
    (2, True, 32): Entry("triton", Config(32, 128, 64, 2, True, 4, 3, 2), COUNTED + "as fp8"),
    (2, True, 64): Entry("triton", Config(64, 128, 64, 2, False, 8, 5, 1), COUNTED + "as fp8"),
    (2, True, 128): Entry("triton", Config(128, 128, 64, 2, False, 8, 4, 1), COUNTED + "as fp8"),
    (2, False, 16): Entry("triton", Config(16, 128, 64, 1, True, 4, 5, 2), COUNTED + "as fp8"),
    (2, False, 32): Entry("triton", Config(32, 128, 64, 1, True, 4, 5, 2), COUNTED + "as fp8"),
    (2, False, 64): Entry("triton", Config(64, 128, 64, 2, False, 8, 5, 1), COUNTED + "as fp8"),
    (2, False, 128): Entry("triton", Config(128, 128, 64, 2, False, 8, 4, 1), COUNTED + "as fp8"),
    # fp32 has no exact tensor cores and serves comparisons: one small tile for all.
    (4, True, 32): Entry("triton", Config(32, 64, 32, 2, False, 4, 3, 1), "exactness only"),
    (4, False, 32): Entry("triton", Config(32, 64, 32, 1, False, 4, 3, 1), "exactness only"),
}

INVARIANT_BLOCK_M: Final = 64
"""Rows per tile of the invariant mode: wide enough for prefill, and decode pads at most 64 rows per slot."""


def configure(
    *, rows_per_slot: int, slots: int, n: int, dtype: torch.dtype, swiglu: bool, batch_invariant: bool
) -> Config:
    """The tiles for slots of about `rows_per_slot` rows (the mean of ragged rows, the capacity of padded ones).

    `n`: columns of the output. With `batch_invariant` a function of dtype and `swiglu` alone.
    """
    size = dtype.itemsize
    if size == 4:
        return _TABLE[4, swiglu, 32].config
    if batch_invariant:
        return _TABLE[size, swiglu, INVARIANT_BLOCK_M].config
    block_m = next((most for most in (16, 32, 64) if rows_per_slot <= most), 128)
    # Where a tile's height would leave SMs idle, lower tiles spread the same rows over more of them.
    if block_m == 128 and _tiles(_TABLE[size, swiglu, 128].config, rows_per_slot, slots, n, swiglu) <= SMS // 2:
        block_m = 64
    return _TABLE[size, swiglu, block_m].config


def _tiles(config: Config, rows_per_slot: int, slots: int, n: int, swiglu: bool) -> int:
    return slots * -(-rows_per_slot // config.block_m) * -(-n // columns(config, swiglu=swiglu))


def columns(config: Config, *, swiglu: bool) -> int:
    """Output columns of one tile."""
    return config.block_n if swiglu else config.block_n * config.tiles


def shipped() -> list[tuple[int, bool, Entry]]:
    """Every entry: (bytes of an element, swiglu, entry)."""
    return [(size, swiglu, entry) for (size, swiglu, _), entry in _TABLE.items()]
