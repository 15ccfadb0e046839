"""Rows sorted by expert slot, and back. T tokens, K top-k, H hidden, R rows, E slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Permuted", "permute", "unpermute"]


@dataclass(frozen=True, slots=True)
class Permuted:
    """`data [R, H]` sorted by slot (gap rows zero), `psum [E] int32` end of each slot's rows, `row_of [T, K] int64`
    the row of each assignment (-1 for those that go nowhere)."""

    data: Tensor
    psum: Tensor
    row_of: Tensor


def permute(x: Tensor, slots: Tensor, num_slots: int, *, alignment: int = 1) -> Permuted:
    """`x [T, H]`, `slots [T, K] int64` in 0..num_slots-1 or -1 (nowhere) -> rows sorted by slot, then by token.

    Slot e+1 starts at `psum[e]` rounded up to `alignment`.
    """
    tokens, k = slots.shape
    flat = slots.reshape(-1)
    counts = torch.bincount(flat + 1, minlength=num_slots + 1)[1:]
    spans = -(-counts // alignment) * alignment
    starts = spans.cumsum(0) - spans
    psum = (starts + counts).to(torch.int32)
    order = flat.argsort(stable=True)
    absent = int((flat < 0).sum())
    order = order[absent:]
    sorted_slots = flat[order]
    first = counts.cumsum(0) - counts
    rows = torch.arange(order.numel(), device=x.device) - first[sorted_slots] + starts[sorted_slots]
    total = int(spans.sum())
    data = x.new_zeros(total, x.shape[1])
    data[rows] = x[order // k]
    row_of = flat.new_full((tokens * k,), -1)
    row_of[order] = rows
    return Permuted(data, psum, row_of.view(tokens, k))


def unpermute(y: Tensor, row_of: Tensor, weights: Tensor) -> Tensor:
    """`y [R, H]`, `row_of [T, K]` (-1 = absent), `weights [T, K] fp32` -> `[T, H]` in y's dtype.

    Sums `weight * row` in top-k order in fp32; absent assignments contribute nothing, whatever their weight.
    """
    out = torch.zeros(row_of.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    if y.shape[0] == 0:
        return out.to(y.dtype)
    for k in range(row_of.shape[1]):
        rows = row_of[:, k]
        term = y[rows.clamp(min=0)].float() * weights[:, k : k + 1]
        out = out + term.masked_fill_((rows < 0).unsqueeze(-1), 0.0)
    return out.to(y.dtype)
