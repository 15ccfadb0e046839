"""Slot weights in the forms that a product takes. E slots, N output width, K input width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.linear.packed import PackedWeight
from moe_kernels.quant import dequantize
from moe_kernels.scaled import BLOCK, BlockScaled


@dataclass(frozen=True, slots=True)
class PackedSlots:
    """`[E, N, K]` weights, each slot in oneDNN's layout."""

    parts: list[PackedWeight]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


SlotWeights = Tensor | PackedSlots | BlockScaled


def num_bytes(w: SlotWeights) -> int:
    """Memory that the weights hold."""
    return w.nbytes if isinstance(w, Tensor) else w.num_bytes


def some_slots(w: SlotWeights, start: int, stop: int) -> SlotWeights:
    """Slots `start <= e < stop`, at least one, without a copy; packed ones as they are now, others as they will be."""
    match w:
        case PackedSlots():
            return PackedSlots(w.parts[start:stop])
        case BlockScaled():
            return BlockScaled(w.data[start:stop], w.scale[start:stop])
        case _:
            return w[start:stop]


def plain_slot(w: BlockScaled, slot: int, dtype: torch.dtype, *, halves: bool) -> Tensor:
    """One slot's weight `[N, K]` in `dtype`. `halves`: the upper and lower N/2 rows have blocks of their own (w13)."""
    data, scale = w.data[slot], w.scale[slot]
    if not halves:
        return dequantize(BlockScaled(data, scale), block=(BLOCK, BLOCK), dtype=dtype, backend="torch")
    pairs = zip(data.chunk(2), scale.chunk(2), strict=True)
    parts = [dequantize(BlockScaled(*pair), block=(BLOCK, BLOCK), dtype=dtype, backend="torch") for pair in pairs]
    return torch.cat(parts)
