"""GEMM in tiles of a fixed number of rows: what makes a row's bits independent of its neighbours. R rows, K in, N out."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
"""Rows per tile: every product of the invariant mode has exactly this shape, so the library always runs the same code."""


def tiled_linear(x: Tensor, w: Tensor, *, out: Tensor) -> None:
    """Write `x [R, K] @ w [N, K]^T` into `out [R, N]`, always as `[16, K] @ [K, N]` products."""
    wt = w.t()
    tile = torch.zeros(TILE, x.shape[1], dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], TILE):
        rows = min(TILE, x.shape[0] - start)
        tile[:rows] = x[start : start + rows]
        out[start : start + rows] = torch.mm(tile, wt)[:rows]
