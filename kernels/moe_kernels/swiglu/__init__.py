"""SwiGLU. I intermediate width; the gate half comes first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.backends import choose_backend
from moe_kernels.errors import KernelError
from moe_kernels.quant import check_layout, quantize_rows
from moe_kernels.scaled import BlockScaled

__all__ = ["swiglu", "swiglu_quantized"]


def swiglu(gate_up: Tensor, *, fast: bool = False, backend: str | None = None) -> Tensor:
    """`gate_up [..., 2I] -> [..., I]`: `silu(gate) * up`, in the input's dtype.

    A value's bits do not depend on its position: silu(g) = g / (1 + exp(-g)) runs step by step in fp32, each step
    correctly rounded but `exp`, whose CPU kernel runs the same code over vector body and tail. `fast` takes the
    library's silu, which does not (and rounds once more in bf16). On Triton both are the same steps in fp32, rounded
    once. `backend`: see `choose_backend`. Raises KernelError on an odd width.
    """
    width = gate_up.shape[-1]
    _check_width(width)
    if choose_backend(gate_up, backend, op="swiglu") == "triton":
        from moe_kernels.swiglu import triton as kernels

        return kernels.swiglu(gate_up)
    if fast:
        gate, up = torch.split(gate_up, width // 2, dim=-1)
        # Rows of fewer than 64 bf16 values miss the vector loop: 8192 rows of 32 take 0.88 ms in place, 0.22 ms copied.
        copied = gate.dtype is torch.bfloat16 and width < 128
        return F.silu(gate.contiguous() if copied else gate).mul_(up)
    return _in_fp32(gate_up).to(gate_up.dtype)


def swiglu_quantized(
    gate_up: Tensor,
    *,
    ue8m0: bool = False,
    scale_layout: str = "row",
    end: Tensor | None = None,
    backend: str | None = None,
) -> BlockScaled:
    """`gate_up [R, 2I]` -> `data [R, I] fp8`, `scale [R, ceil(I/128)]`: as `quantize_rows` of the fp32 values.

    The values are not rounded to the input's dtype in between. On Triton one launch; `end [1] int32`: rows from there
    on are no one's and left as they are. Raises KernelError as `swiglu` and `quantize_rows` do.
    """
    _check_width(gate_up.shape[-1])
    check_layout(scale_layout, "swiglu_quantized")
    if choose_backend(gate_up, backend, op="swiglu_quantized") == "torch":
        return quantize_rows(_in_fp32(gate_up), ue8m0=ue8m0, scale_layout=scale_layout, backend="torch")
    from moe_kernels.swiglu import triton as kernels

    return kernels.swiglu_quantized(gate_up, ue8m0, scale_layout, end)


def _in_fp32(gate_up: Tensor) -> Tensor:
    gate, up = torch.split(gate_up.float(), gate_up.shape[-1] // 2, dim=-1)
    return (gate / gate.neg().exp_().add_(1.0)).mul_(up)


def _check_width(width: int) -> None:
    if width % 2:
        raise KernelError(f"swiglu got width {width}; it needs gate and up halves, so an even width like {width + 1}")
