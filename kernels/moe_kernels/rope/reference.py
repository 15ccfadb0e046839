"""Oracle of `apply_rope`: complex rotation in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, ..., R]` -> `[T, ..., R]` fp64: real parts first, then imaginary ones."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    turn = torch.complex(cos.double(), sin.double())
    turned = pairs * turn.view(turn.shape[0], *(1,) * (x.dim() - 2), turn.shape[1])
    return torch.cat((turned.real, turned.imag), dim=-1)
