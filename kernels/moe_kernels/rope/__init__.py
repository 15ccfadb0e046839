"""Rotary position embedding over interleaved pairs. T tokens, R rotary width."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend
from moe_kernels.errors import KernelError

__all__ = ["apply_rope"]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """`x [T, ..., R]`, `cos, sin [T, R/2]` -> `[T, ..., R]` in x's dtype, computed in the wider of the two dtypes.

    Input pairs are interleaved, (x0, x1), (x2, x3), ..., as DeepSeek stores them; the output holds all first
    components, then all second ones (de-interleaved), as in transformers. Triton computes in fp32 whatever the dtypes;
    x may be a slice, cos and sin too. `backend`: see `choose_backend`. Raises KernelError where widths do not fit.
    """
    if x.shape[-1] != 2 * cos.shape[-1] or cos.shape != sin.shape or cos.shape[0] != x.shape[0]:
        raise KernelError(
            f"rope got x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            f"cos and sin must be {(x.shape[0], x.shape[-1] // 2)}"
        )
    if choose_backend(x, backend, op="apply_rope") == "triton":
        from moe_kernels.rope import triton as kernels

        return kernels.apply_rope(x, cos, sin)
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[1],)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x.view(*x.shape[:-1], cos.shape[-1], 2).unbind(-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
