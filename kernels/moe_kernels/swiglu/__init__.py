"""SwiGLU. I intermediate width; the gate half comes first."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.errors import KernelError

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """`gate_up [..., 2I] -> [..., I]`: `silu(gate) * up` with silu(g) = g / (1 + exp(-g)), computed in fp32.

    Every step is elementwise and correctly rounded but `exp`, whose CPU kernel runs the same code for the vector body
    and the tail (that of `torch.sigmoid` does not): a value's bits do not depend on its position.
    Raises KernelError on an odd width.
    """
    width = gate_up.shape[-1]
    if width % 2:
        raise KernelError(f"swiglu got width {width}; it needs gate and up halves, so an even width like {width + 1}")
    gate, up = gate_up.float().split(width // 2, dim=-1)
    return (gate / gate.neg().exp_().add_(1.0)).mul_(up).to(gate_up.dtype)
