"""What the products accept, checked once for all backends. E slots, R rows, C rows per slot, K in, N out."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.backends import require
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights
from moe_kernels.quant import dequantize, quantize_rows
from moe_kernels.scaled import BlockScaled, num_blocks

BACKENDS = ("torch", "triton", "deep_gemm")

Activations = Tensor | BlockScaled
"""`[R, K]` or `[E, C, K]`: plain, or fp8 with scales `[R, ceil(K/128)]` or `[E, C, ceil(K/128)]` of any strides."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_product(op: str, x: Activations, w: SlotWeights, marks: Tensor, *, halves: bool = False) -> None:
    """Raise KernelError unless `x [.., K]`, `w [E, N, K]` and `marks [E]` fit. `halves`: see `plain_slot`."""
    slots, n, k = w.shape
    if isinstance(w, BlockScaled):
        _check_scaled(op, "w", w, (slots, 2 * num_blocks(n // 2) if halves else num_blocks(n), num_blocks(k)))
        fits = isinstance(x, BlockScaled) or x.dtype in FLOATS
    else:
        fits = isinstance(x, Tensor) and x.dtype is w.dtype
    if not fits or x.shape[-1] != k:
        rule = f"{', '.join(map(str, FLOATS))} or BlockScaled" if isinstance(w, BlockScaled) else str(w.dtype)
        seen = f"x {tuple(x.shape)} {_kind(x)} and w {tuple(w.shape)} {_kind(w)}"
        require(False, f"{op} got {seen}; x must be [..., {k}] {rule}")
    if isinstance(x, BlockScaled):
        _check_scaled(op, "x", x, (*x.shape[:-1], num_blocks(k)))
    if marks.shape != (slots,):
        require(False, f"{op} got {tuple(marks.shape)} row marks; {slots} slots need one each")


def _check_scaled(op: str, name: str, t: BlockScaled, blocks: tuple[int, ...]) -> None:
    data, scale = t.data, t.scale
    if data.dtype is not torch.float8_e4m3fn or scale.dtype is not torch.float32 or scale.shape != blocks:
        seen = f"{tuple(data.shape)} {data.dtype} with scales {tuple(scale.shape)} {scale.dtype}"
        require(False, f"{op}: {name} is {seen}; they must be float8_e4m3fn and {blocks} float32")


def _kind(t: Activations | SlotWeights) -> str:
    return "BlockScaled" if isinstance(t, BlockScaled) else str(t.dtype)


def check_row_weights(op: str, row_weights: Tensor | None, rows: int) -> None:
    """Raise KernelError unless `row_weights` is `[rows] fp32`, contiguous, or None."""
    if row_weights is not None:
        fits = row_weights.shape == (rows,) and row_weights.dtype is torch.float32 and row_weights.is_contiguous()
        seen = f"{tuple(row_weights.shape)} {row_weights.dtype}"
        require(
            fits, f"{op}: row_weights are {seen}; they must be ({rows},) float32, contiguous; use .flatten().float()"
        )


def flat_rows(op: str, x: Activations, backend: str) -> Activations:
    """`[E, C, K]` as `[E * C, K]`: a view, but for torch. Scales keep their shape, since theirs need not be a view."""
    if backend == "torch" and isinstance(x, Tensor):
        return x.flatten(0, 1)
    data = x.data if isinstance(x, BlockScaled) else x
    slots, capacity, _ = data.shape
    require(
        slots <= 1 or data.stride(0) == capacity * data.stride(1) or data.numel() == 0,
        f"{op}: x is {tuple(data.shape)} with strides {data.stride()}; slot must follow slot; call .contiguous()",
    )
    return BlockScaled(data.flatten(0, 1), x.scale) if isinstance(x, BlockScaled) else data.flatten(0, 1)


def result_dtype(x: Activations, wanted: torch.dtype | None) -> torch.dtype:
    """`wanted`, or x's dtype, or bf16 where x is fp8."""
    if wanted is not None:
        return wanted
    return torch.bfloat16 if isinstance(x, BlockScaled) else x.dtype


def plain_rows(x: BlockScaled, dtype: torch.dtype) -> Tensor:
    """`[R, K]` dequantised to `dtype`."""
    scale = x.scale.reshape(x.data.shape[0], num_blocks(x.data.shape[1]))
    return dequantize(BlockScaled(x.data, scale), dtype=dtype, backend="torch")


def like_weights(x: Activations, w: SlotWeights, *, ue8m0: bool, backend: str) -> Activations:
    """x in the form of the weights: plain rows are quantised for block-scaled ones."""
    if isinstance(w, BlockScaled) and isinstance(x, Tensor):
        by = "triton" if backend == "triton" else None
        return quantize_rows(x, ue8m0=ue8m0, scale_layout="mn", backend=by)
    return x


def unpacked(op: str, w: SlotWeights) -> Tensor | BlockScaled:
    """The weights, unless they are packed for a CPU: KernelError."""
    if isinstance(w, PackedSlots):
        require(False, f"{op}: weights are packed for oneDNN, which only backend='torch' reads; keep them plain")
        raise AssertionError("unreachable")
    return w


def weigh(out: Tensor, row_weights: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Rows of `out [R, N]` times their weights, in `dtype` (None: as they are)."""
    if row_weights is not None:
        out = (out * row_weights.unsqueeze(1)).to(out.dtype if dtype is None else dtype)
    return out if dtype is None else out.to(dtype)
