"""fp8 values with one fp32 scale per block of them."""

from __future__ import annotations

from collections.abc import Sequence
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


def stack_rows(parts: Sequence[BlockScaled]) -> BlockScaled:
    """Weights `[Ni, K]` as one `[sum Ni, K]`; all but the last must end on the border of a block."""
    assert all(part.shape[0] % BLOCK == 0 for part in parts[:-1]), f"rows of {[p.shape[0] for p in parts]} share blocks"
    if len(parts) == 1:
        return parts[0]
    return BlockScaled(torch.cat([part.data for part in parts]), torch.cat([part.scale for part in parts]))
