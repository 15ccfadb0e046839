"""Slot weights packed one by one for oneDNN. E slots, N output width, K input width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.linear.packed import PackedWeight, pack


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

    def write_slot_(self, slot: int, w: Tensor) -> None:
        """Replace one slot by `w [N, K]`; the old packed weight is released."""
        self.parts[slot] = pack(w)


SlotWeights = Tensor | PackedSlots


def num_bytes(w: SlotWeights) -> int:
    """Memory that the weights hold."""
    return w.num_bytes if isinstance(w, PackedSlots) else w.nbytes
