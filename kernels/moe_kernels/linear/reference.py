"""Oracle of `linear`: fp64."""

from __future__ import annotations

from torch import Tensor


def linear_reference(x: Tensor, w: Tensor) -> Tensor:
    """`x [..., K] @ w [N, K]^T` in fp64."""
    return x.double() @ w.double().t()
