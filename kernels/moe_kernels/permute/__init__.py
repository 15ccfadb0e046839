"""Rows sorted by expert slot, and back. T tokens, K top-k, H hidden, R rows, E slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.permute import eager

__all__ = ["Permuted", "permute", "unpermute"]


@dataclass(frozen=True, slots=True)
class Permuted:
    """`data [R, H]` sorted by slot (gap rows unspecified but finite), `psum [E] int32` end of each slot's rows,
    `row_of [T, K] int64` the row of each assignment (-1 for those that go nowhere)."""

    data: Tensor
    psum: Tensor
    row_of: Tensor


def permute(x: Tensor, slots: Tensor, num_slots: int, *, alignment: int = 1) -> Permuted:
    """`x [T, H]`, `slots [T, K] int64` in 0..num_slots-1 or -1 (nowhere) -> rows sorted by slot, then by token.

    Slot e+1 starts at `psum[e]` rounded up to `alignment`. On a CPU R is the end of the last slot's span; elsewhere it
    is the worst case, `T * K + (alignment - 1) * num_slots`, so that the host waits for nothing.
    Raises KernelError where shapes differ.
    """
    if slots.dim() != 2 or slots.shape[0] != x.shape[0]:
        raise KernelError(f"permute got slots {tuple(slots.shape)} for {x.shape[0]} tokens; give one row per token")
    data, psum, row_of = eager.permute(x, slots, num_slots, alignment=alignment)
    return Permuted(data, psum, row_of)


def unpermute(y: Tensor, row_of: Tensor, weights: Tensor) -> Tensor:
    """`y [R, H]`, `row_of [T, K] int64` (-1 = absent), `weights [T, K] fp32` -> `[T, H]` in y's dtype.

    Sums `weight * row` in top-k order with an fp32 accumulator; absent assignments contribute nothing, whatever their
    weight and whatever the rows hold. A token's bits depend on its own rows and weights alone.
    Raises KernelError where shapes differ.
    """
    if row_of.shape != weights.shape:
        raise KernelError(
            f"unpermute got row_of {tuple(row_of.shape)} and weights {tuple(weights.shape)}; make them agree"
        )
    return eager.unpermute(y, row_of, weights)
