"""Grouped GEMM by DeepGEMM, an optional library: fp8 on Hopper. E slots, R rows, C rows per slot, K in, N out, I width.

Written to its documented contract (2.6) and tested against a double that enforces it; not yet run on hardware.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from moe_kernels.backends import require
from moe_kernels.grouped_gemm.layout import RowMarks
from moe_kernels.scaled import BLOCK, BlockScaled
from moe_kernels.swiglu import swiglu_quantized

HOW_TO_GET: Final = (
    "build it from https://github.com/deepseek-ai/DeepGEMM (2.6 or newer; the package of that name on PyPI is not it), "
    "or take backend='triton'"
)


@cache
def library() -> Any:
    """The `deep_gemm` module. Raises KernelError where it is missing or older than what is called here."""
    try:
        import deep_gemm
    except ImportError as error:
        require(False, f"deep_gemm cannot be imported ({error}); {HOW_TO_GET}")
    found = str(getattr(deep_gemm, "__version__", "unknown"))
    contiguous = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_contiguous", None)
    masked = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_masked", None)
    require(
        callable(contiguous) and callable(masked),
        f"deep_gemm {found} has no m_grouped_fp8_gemm_nt_contiguous and _masked; {HOW_TO_GET}",
    )
    require(
        _takes(contiguous, "use_psum_layout"),
        f"deep_gemm {found} takes no end offsets (use_psum_layout); {HOW_TO_GET}",
    )
    return deep_gemm


def _takes(function: Any, keyword: str) -> bool:
    """Whether `function` has the parameter; compiled functions name theirs in the docstring, if at all."""
    try:
        return keyword in inspect.signature(function).parameters
    except (TypeError, ValueError):
        text = function.__doc__ or keyword
        return keyword in text


def grouped_gemm(
    x: Tensor | BlockScaled, w: Tensor | BlockScaled, rows: RowMarks, *, expected_rows: int | None
) -> Tensor:
    """`x [R, K]`, `w [E, N, K]`, both BlockScaled -> `[R, N] bf16`."""
    if not (isinstance(x, BlockScaled) and isinstance(w, BlockScaled)):
        require(False, "deep_gemm serves block-scaled fp8 operands here; quantise them, or take backend='triton'")
        raise AssertionError("unreachable")
    slots, n, k = w.shape
    total = x.shape[0]
    out = torch.empty(total, n, dtype=torch.bfloat16, device=x.data.device)
    require(
        w.data.is_contiguous() and w.scale.is_contiguous() and x.data.is_contiguous() and rows.marks.is_contiguous(),
        "deep_gemm: weights, their scales, x and the row marks must be contiguous; call .contiguous()",
    )
    require(
        rows.marks.dtype is torch.int32,
        f"deep_gemm: row marks are {rows.marks.dtype}; they must be int32; use .to(torch.int32)",
    )
    if not total or not slots:
        return out
    weights = (w.data, w.scale)
    if rows.capacity is None:
        require(
            rows.alignment == BLOCK,
            f"deep_gemm: slots start at multiples of {rows.alignment} rows; it needs {BLOCK}; permute with "
            f"alignment={BLOCK}, or take backend='triton'",
        )
        library().m_grouped_fp8_gemm_nt_contiguous(
            (x.data, x.scale), weights, out, rows.marks, use_psum_layout=True, ensure_zero_padding=False
        )
        return out
    scale = x.scale if x.scale.dim() == 3 else torch.unflatten(x.scale, 0, (slots, rows.capacity))
    expected = max(1, rows.capacity if expected_rows is None else min(expected_rows, rows.capacity))
    library().m_grouped_fp8_gemm_nt_masked(
        (x.data.view(slots, rows.capacity, k), scale),
        weights,
        out.view(slots, rows.capacity, n),
        rows.marks,
        expected,
    )
    return out


def expert_mlp(
    x: Tensor | BlockScaled,
    w13: Tensor | BlockScaled,
    w2: Tensor | BlockScaled,
    rows: RowMarks,
    *,
    expected_rows: int | None,
    ue8m0: bool,
) -> Tensor:
    """`x [R, H]`, `w13 [E, 2I, H]`, `w2 [E, H, I]` -> `[R, H] bf16`: product, SwiGLU with quantisation, product."""
    width = w13.shape[1] // 2
    require(
        width % BLOCK == 0,
        f"deep_gemm: experts are {width} wide; {BLOCK} must divide it, so that gate and up do not share a block; take "
        "backend='triton'",
    )
    gate_up = grouped_gemm(x, w13, rows, expected_rows=expected_rows)
    hidden = swiglu_quantized(gate_up, ue8m0=ue8m0, scale_layout="mn")
    return grouped_gemm(hidden, w2, rows, expected_rows=expected_rows)
