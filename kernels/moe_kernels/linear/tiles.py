"""Products in tiles of a fixed number of rows: a row's bits do not depend on its neighbours. R rows, K in, N out.

Every product then has the same shape, so the library runs the same code on every row, however many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.linear.packed import PackedWeight, Weight, cat_rows, has_onednn, onednn_linear

TILE = 16
"""Rows per product of the invariant mode."""


def tile_product(tile: Tensor, w: Weight) -> Tensor:
    """`tile [16, K] @ w [N, K]^T -> [16, N]`."""
    if isinstance(w, PackedWeight) or has_onednn(tile.device, tile.dtype):
        return onednn_linear(tile, w)
    return torch.mm(tile, w.t())


def tiled_linear(x: Tensor, w: Weight) -> Tensor:
    """`x [R, K] @ w [N, K]^T -> [R, N]`, always as products of exactly 16 rows."""
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(0, w.shape[0])
    short = -rows % TILE
    x = F.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    if rows <= TILE:
        return tile_product(x, w)[:rows]
    out = cat_rows([tile_product(tile, w) for tile in torch.split(x, TILE)])
    return out[:rows]
