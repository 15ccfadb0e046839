"""Oracle of `permute` and `unpermute`: plain loops. T tokens, K top-k, H hidden, R rows, E slots."""

from __future__ import annotations

import torch
from torch import Tensor


def permute_reference(
    x: Tensor, slots: Tensor, num_slots: int, *, alignment: int = 1
) -> tuple[Tensor, list[int], Tensor]:
    """`(data [R, H], psum, row_of [T, K])` as `permute` defines them."""
    data: list[Tensor] = []
    psum: list[int] = []
    row_of = torch.full_like(slots, -1)
    for slot in range(num_slots):
        for token, k in (slots == slot).nonzero().tolist():
            row_of[token, k] = len(data)
            data.append(x[token])
        psum.append(len(data))
        while len(data) % alignment:
            data.append(torch.zeros_like(x[0]))
    return torch.stack(data) if data else x[:0], psum, row_of


def unpermute_reference(y: Tensor, row_of: Tensor, weights: Tensor) -> Tensor:
    """`[T, H]` fp64."""
    out = torch.zeros(row_of.shape[0], y.shape[1], dtype=torch.float64)
    for token, rows in enumerate(row_of.tolist()):
        for k, row in enumerate(rows):
            if row >= 0:
                out[token] += weights[token, k].double() * y[row].double()
    return out
