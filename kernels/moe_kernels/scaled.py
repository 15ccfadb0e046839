"""fp8 values with one fp32 scale per block of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 128
"""Edge of a block of weights, and values of a row that share a scale."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockScaled:
    """`data float8_e4m3fn` and `scale fp32`; the value is `data * scale` of its block.

    Activations: `data [R, K]`, `scale [R, ceil(K/128)]`, of any strides. Weights: `data [N, K]` or `[E, N, K]`,
    `scale [ceil(N/128), ceil(K/128)]`, or the same with a leading E. The last block of a row or column may be short.
    """

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def num_bytes(self) -> int:
        """Memory that values and scales take."""
        return self.data.nbytes + self.scale.nbytes


def num_blocks(size: int) -> int:
    """Blocks along a dim of `size` values."""
    return -(-size // BLOCK)
