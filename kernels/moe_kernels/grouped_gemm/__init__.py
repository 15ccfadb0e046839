"""Grouped GEMM: one product per expert slot. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm import eager

__all__ = ["grouped_gemm_padded", "grouped_gemm_ragged"]


def _check(x: Tensor, w: Tensor, marks: Tensor, backend: str) -> None:
    if backend != "torch":
        raise KernelError(f"backend={backend!r} is not there; choose 'torch'")
    if x.shape[-1] != w.shape[2] or x.dtype != w.dtype:
        raise KernelError(
            f"grouped GEMM got x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}; "
            f"x must be [..., {w.shape[2]}] {w.dtype}"
        )
    if marks.shape != (w.shape[0],):
        raise KernelError(f"got {tuple(marks.shape)} row marks for {w.shape[0]} slots; give one per slot")


def grouped_gemm_ragged(
    x: Tensor,
    w: Tensor,
    psum: Tensor,
    *,
    alignment: int = 1,
    backend: str = "torch",
    batch_invariant: bool = False,
) -> Tensor:
    """`x [R, K]` sorted by slot, `w [E, N, K]`, `psum [E] int32` -> `[R, N]`.

    Rows of slot e lie from `psum[e-1]` rounded up to `alignment` (0 for the first) to `psum[e]`. Rows in the gaps
    and past the last slot are unspecified. Raises KernelError on shapes or dtypes that differ.
    """
    _check(x, w, psum, backend)
    return eager.ragged(x, w, psum, alignment=alignment, batch_invariant=batch_invariant)


def grouped_gemm_padded(
    x: Tensor, w: Tensor, counts: Tensor, *, backend: str = "torch", batch_invariant: bool = False
) -> Tensor:
    """`x [E, C, K]` of which the first `counts[e]` (`counts [E] int32`) rows are real, `w [E, N, K]` -> `[E, C, N]`.

    Rows past a count are unspecified and never influence others. Raises KernelError on shapes or dtypes that differ.
    """
    _check(x, w, counts, backend)
    return eager.padded(x, w, counts, batch_invariant=batch_invariant)
