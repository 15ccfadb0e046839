"""Rows sorted by expert slot, and back. T tokens, K top-k, H hidden, R rows, E slots, G scales of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend
from moe_kernels.errors import KernelError
from moe_kernels.permute import eager
from moe_kernels.quant import check_layout
from moe_kernels.scaled import BlockScaled

__all__ = ["Permuted", "permute", "unpermute"]


@dataclass(frozen=True, slots=True)
class Permuted:
    """`data [R, H]` sorted by slot, `psum [E] int32` end of each slot's rows, `row_of [T, K] int64` the row of each
    assignment (-1 for those that go nowhere); with fp8 data, `scale [R, G] fp32`.

    Gap rows are unspecified: finite with torch, whatever the memory held with Triton, where filling them would cost a
    launch. So nothing may let one row reach another's result; the grouped products and `unpermute` do not.
    """

    data: Tensor
    psum: Tensor
    row_of: Tensor
    scale: Tensor | None = None


def permute(
    x: Tensor | BlockScaled,
    slots: Tensor,
    num_slots: int,
    *,
    alignment: int = 1,
    quantize: bool = False,
    ue8m0: bool = False,
    scale_layout: str = "row",
    num_rows: int | None = None,
    backend: str | None = None,
) -> Permuted:
    """`x [T, H]`, `slots [T, K] int64` -> rows sorted by slot, then token, then k.

    Ids outside 0..num_slots-1 go nowhere. Slot e+1 starts at `psum[e]` rounded up to `alignment`. On a CPU R is the end
    of the last slot's span; elsewhere it is `num_rows`, that end where the host knows it, or else the worst case,
    `T * K + (alignment - 1) * num_slots`, so that the host waits for nothing.
    `quantize`: rows become fp8 with a scale per 128 columns (`ue8m0`, `scale_layout`: see `quantize_rows`). A
    `BlockScaled` x keeps its bytes, and its scales move along. `backend`: see `choose_backend`.
    Raises KernelError where shapes differ.
    """
    tokens = x if isinstance(x, Tensor) else x.data
    if slots.dim() != 2 or slots.shape[0] != tokens.shape[0]:
        raise KernelError(
            f"permute got slots {tuple(slots.shape)} for {tokens.shape[0]} tokens; give one row per token"
        )
    if quantize and not isinstance(x, Tensor):
        raise KernelError("permute: quantize=True got x in fp8 already; pass quantize=False, its scales move along")
    if choose_backend(tokens, backend, op="permute") == "torch":
        if isinstance(x, Tensor) and not quantize:
            data, psum, row_of = eager.permute(x, slots, num_slots, alignment=alignment, num_rows=num_rows)
            return Permuted(data, psum, row_of)
        check_layout(scale_layout, "permute")
        return Permuted(*eager.permute_scaled(x, slots, num_slots, alignment, ue8m0, scale_layout, num_rows))
    from moe_kernels.permute import triton as kernels

    check_layout(scale_layout, "permute")
    return Permuted(*kernels.permute(x, slots, num_slots, alignment, quantize, ue8m0, scale_layout, num_rows))


def unpermute(
    y: Tensor,
    row_of: Tensor,
    weights: Tensor,
    *,
    rest: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y [R, H]`, `row_of [T, K] int64` (-1 = absent), `weights [T, K] fp32` -> `[T, H]` in y's dtype or `out_dtype`.

    Sums `weight * row` in top-k order with an fp32 accumulator; absent assignments contribute nothing, whatever their
    weight and whatever the rows hold. A token's bits depend on its own rows and weights alone. Product and sum are
    rounded one by one (torch's CPU bags fuse them, which differs in the last bit). `rest [R', H]`: rows R to R + R',
    which lie elsewhere (on Triton they are read there). `backend`: see `choose_backend`.
    Raises KernelError where shapes differ.
    """
    if row_of.shape != weights.shape:
        raise KernelError(
            f"unpermute got row_of {tuple(row_of.shape)} and weights {tuple(weights.shape)}; make them agree"
        )
    if choose_backend(y, backend, op="unpermute") == "torch":
        y = y if rest is None else torch.cat((y, rest))
        return eager.unpermute(y, row_of, weights, out_dtype or y.dtype)
    from moe_kernels.permute import triton_combine as kernels

    return kernels.unpermute(y, row_of, weights, out_dtype or y.dtype, rest)
