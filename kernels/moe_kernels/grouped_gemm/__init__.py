"""Grouped GEMM: one product per expert slot. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm import eager
from moe_kernels.grouped_gemm.layout import padded_rows, ragged_rows
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights

__all__ = ["PackedSlots", "SlotWeights", "grouped_gemm_padded", "grouped_gemm_ragged"]


def _check(x: Tensor, w: SlotWeights, marks: Tensor, backend: str) -> None:
    if backend != "torch":
        raise KernelError(f"backend={backend!r} is not there; choose 'torch'")
    if x.shape[-1] != w.shape[2] or x.dtype != w.dtype:
        raise KernelError(
            f"grouped GEMM got x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}; "
            f"x must be [..., {w.shape[2]}] {w.dtype}"
        )
    if marks.shape != (w.shape[0],):
        raise KernelError(f"grouped GEMM got {tuple(marks.shape)} row marks; {w.shape[0]} slots need one each")


def grouped_gemm_ragged(
    x: Tensor,
    w: SlotWeights,
    psum: Tensor,
    *,
    alignment: int = 1,
    backend: str = "torch",
    batch_invariant: bool = False,
) -> Tensor:
    """`x [R, K]` sorted by slot, `w [E, N, K]`, `psum [E] int32` -> `[R, N]`.

    Rows of slot e lie from `psum[e-1]` rounded up to `alignment` (0 for the first) to `psum[e]`. Results in the gaps
    and past the last slot are unspecified. With `batch_invariant` a row's bits depend on that row and its slot's weight
    alone. Raises KernelError on shapes or dtypes that differ.
    """
    _check(x, w, psum, backend)
    rows = ragged_rows(psum, x.shape[0], alignment=alignment)
    return eager.grouped(x, w, rows, batch_invariant=batch_invariant)


def grouped_gemm_padded(
    x: Tensor, w: SlotWeights, counts: Tensor, *, backend: str = "torch", batch_invariant: bool = False
) -> Tensor:
    """`x [E, C, K]` of which the first `counts[e]` (`counts [E] int32`) rows are real, `w [E, N, K]` -> `[E, C, N]`.

    Results past a count are unspecified, and what lies there never reaches a real row. With `batch_invariant` a row's
    bits depend on that row and its slot's weight alone. Raises KernelError on shapes or dtypes that differ.
    """
    _check(x, w, counts, backend)
    rows = padded_rows(counts, x.shape[1])
    out = eager.grouped(x.flatten(0, 1), w, rows, batch_invariant=batch_invariant)
    return out.view(x.shape[0], x.shape[1], w.shape[1])
