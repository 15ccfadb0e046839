"""Oracle of `swiglu`: fp64."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`gate_up [..., 2I] -> [..., I]` in fp64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return F.silu(gate) * up
