"""Oracle of the grouped GEMM: fp64, row by row. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_of_rows(psum: Tensor, rows: int, *, alignment: int = 1) -> list[int]:
    """The slot that owns each of `rows` rows, -1 in the gaps."""
    owners = [-1] * rows
    start = 0
    for slot, end in enumerate(psum.tolist()):
        owners[start:end] = [slot] * (end - start)
        start = (end + alignment - 1) // alignment * alignment
    return owners


def ragged_reference(x: Tensor, w: Tensor, psum: Tensor, *, alignment: int = 1) -> Tensor:
    """`x [R, K]`, `w [E, N, K]` -> `[R, N]` fp64, zero in the gaps."""
    out = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for row, slot in enumerate(slot_of_rows(psum, x.shape[0], alignment=alignment)):
        if slot >= 0:
            out[row] = w[slot].double() @ x[row].double()
    return out


def padded_reference(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """`x [E, C, K]`, `w [E, N, K]` -> `[E, C, N]` fp64, zero past the counts."""
    out = torch.zeros(x.shape[0], x.shape[1], w.shape[1], dtype=torch.float64)
    for slot, count in enumerate(counts.tolist()):
        for row in range(count):
            out[slot, row] = w[slot].double() @ x[slot, row].double()
    return out
