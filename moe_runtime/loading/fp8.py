"""FP8 weights with one fp32 scale per block of rows x columns (DeepSeek's `weight_scale_inv`).

N rows (out), K columns (in), b block edge: data `[N, K] float8_e4m3fn`, scales `[ceil(N/b), ceil(K/b)]`;
weight = data * scale. The last block of a row or column may be short.
"""

from __future__ import annotations

import torch
from torch import Tensor

Block = tuple[int, int]


def scale_name(weight_name: str) -> str:
    """The name of the scales that belong to a weight."""
    return weight_name + "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """The shape of the scales of a matrix `[N, K]`."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def block_region(bounds: tuple[tuple[int, int], tuple[int, int]], block: Block) -> tuple[slice, slice]:
    """The region of the scales that covers weights `[start, stop)` in both dims."""
    (r0, r1), (c0, c1) = bounds
    return slice(r0 // block[0], -(-r1 // block[0])), slice(c0 // block[1], -(-c1 // block[1]))


def dequantize(
    data: Tensor, scales: Tensor, *, block: Block, row_offset: int = 0, column_offset: int = 0, dtype: torch.dtype
) -> Tensor:
    """Weights `[n, k]` in `dtype` from a region `data [n, k] float8_e4m3fn` and the scales of the blocks it touches.

    `row_offset` and `column_offset` say where the region starts inside its first block (0 on a block's border).
    Works through one row of blocks at a time: beside the result, at most that one row is held in fp32.
    """
    num_rows, num_columns = data.shape
    out = torch.empty(num_rows, num_columns, dtype=dtype)
    per_column = scales.float().repeat_interleave(block[1], dim=1)[:, column_offset : column_offset + num_columns]
    # One row of blocks in fp32, reused: a fresh one per row of blocks left the heap up to 30 MiB larger.
    work = None if dtype == torch.float32 else torch.empty(min(block[0], num_rows), num_columns)
    start = 0
    for block_row in range(per_column.shape[0]):
        stop = min(num_rows, (block_row + 1) * block[0] - row_offset)
        target = out[start:stop] if work is None else work[: stop - start]
        target.copy_(data[start:stop]).mul_(per_column[block_row])
        if work is not None:
            out[start:stop].copy_(target)
        start = stop
    return out
