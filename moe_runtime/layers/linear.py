"""Linear layers as plain values: `weight [N, K]` is already this rank's slice."""

from __future__ import annotations

from dataclasses import dataclass

from moe_kernels.linear import LinearWeight, linear, prepare_weight
from moe_kernels.scaled import BlockScaled
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """`y [..., N] = x [..., K] @ weight.T + bias`, in x's dtype. `ue8m0`: x is rounded to fp8 by powers of two."""

    weight: LinearWeight
    bias: Tensor | None = None
    batch_invariant: bool = False
    ue8m0: bool = False

    @classmethod
    def of(
        cls,
        weight: Tensor | BlockScaled,
        bias: Tensor | None = None,
        *,
        batch_invariant: bool = False,
        ue8m0: bool = False,
    ) -> Linear:
        """A layer over `weight [N, K]`, packed where that is faster on this device; fp8 blocks stay as they are."""
        return cls(weight if batch_invariant else prepare_weight(weight), bias, batch_invariant, ue8m0)

    def __call__(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, batch_invariant=self.batch_invariant, ue8m0=self.ue8m0)
        return y if self.bias is None else y + self.bias
