"""Grouped GEMM in torch. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.linear.tiles import tiled_linear


def ranges(psum: Tensor, alignment: int) -> list[tuple[int, int, int]]:
    """`(slot, start, end)` of every slot that has rows."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for slot, end in enumerate(psum.tolist()):
        if end > start:
            found.append((slot, start, end))
        start = -(-max(end, start) // alignment) * alignment
    return found


def ragged(x: Tensor, w: Tensor, psum: Tensor, *, alignment: int, batch_invariant: bool) -> Tensor:
    out = x.new_zeros(x.shape[0], w.shape[1])
    for slot, start, end in ranges(psum, alignment):
        if batch_invariant:
            tiled_linear(x[start:end], w[slot], out=out[start:end])
        else:
            torch.mm(x[start:end], w[slot].t(), out=out[start:end])
    return out


def padded(x: Tensor, w: Tensor, counts: Tensor, *, batch_invariant: bool) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1], w.shape[1])
    for slot, count in enumerate(counts.tolist()):
        if count == 0:
            continue
        if batch_invariant:
            tiled_linear(x[slot, :count], w[slot], out=out[slot, :count])
        else:
            torch.mm(x[slot, :count], w[slot].t(), out=out[slot, :count])
    return out
