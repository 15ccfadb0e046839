"""Weights of expert slots. E slots, H hidden, I intermediate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm.eager import GATHER_MAX_BYTES
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights, num_bytes
from moe_kernels.linear.packed import PackedWeight, pack, worth_packing


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """`w13 [E, 2I, H]` (gate rows first, then up) and `w2 [E, H, I]`, plain or packed slot by slot.

    Either form holds the bytes of the plain weights (packed: rows rounded up to 64).
    """

    w13: SlotWeights
    w2: SlotWeights

    @property
    def num_slots(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden(self) -> int:
        return self.w13.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.w13.dtype

    @property
    def num_bytes(self) -> int:
        """Memory that the weights hold."""
        return num_bytes(self.w13) + num_bytes(self.w2)

    def write_slot_(self, slot: int, *, w13: Tensor, w2: Tensor) -> None:
        """Replace one slot's weights: `w13 [2I, H]`, `w2 [H, I]`. Raises KernelError on other shapes or dtypes."""
        for name, old, new in (("w13", self.w13, w13), ("w2", self.w2, w2)):
            if new.shape != old.shape[1:] or new.dtype != old.dtype:
                rule = f"{tuple(old.shape[1:])} {old.dtype}"
                raise KernelError(f"slot {slot} got {name} {tuple(new.shape)} {new.dtype}; it must be {rule}")
            if isinstance(old, PackedSlots):
                old.write_slot_(slot, new)
            else:
                old[slot].copy_(new)

    def read_slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Copies of one slot's plain weights: `(w13 [2I, H], w2 [H, I])`."""
        if isinstance(self.w13, PackedSlots) and isinstance(self.w2, PackedSlots):
            return self.w13.parts[slot].dense(), self.w2.parts[slot].dense()
        assert isinstance(self.w13, Tensor) and isinstance(self.w2, Tensor), "both weights have one form"
        return self.w13[slot].clone(), self.w2[slot].clone()


def _packs(shape13: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    small = shape13[0] * shape13[1] * dtype.itemsize <= GATHER_MAX_BYTES
    return not small and worth_packing(shape13, dtype, device)


def allocate_experts(
    num_slots: int, hidden: int, intermediate: int, *, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """Zero weights to be filled by `write_slot_`; packed slots take memory as they are written."""
    if not _packs((2 * intermediate, hidden), dtype, device):
        w13 = torch.zeros(num_slots, 2 * intermediate, hidden, dtype=dtype, device=device)
        return ExpertWeights(w13, torch.zeros(num_slots, hidden, intermediate, dtype=dtype, device=device))

    def empty(n: int, k: int) -> list[PackedWeight]:
        return [pack(torch.zeros(n, k, dtype=dtype))] * num_slots

    return ExpertWeights(PackedSlots(empty(2 * intermediate, hidden)), PackedSlots(empty(hidden, intermediate)))


def prepare_experts(w13: Tensor, w2: Tensor) -> ExpertWeights:
    """`w13 [E, 2I, H]` (gate rows first, then up) and `w2 [E, H, I]` -> what `expert_mlp_*` takes.

    Large slots on a CPU are packed (a copy; release the plain weights afterwards), others are used as they are.
    Raises KernelError where shapes or dtypes do not fit together.
    """
    slots, wide, hidden = w13.shape
    if w2.shape != (slots, hidden, wide // 2) or wide % 2 or w13.dtype != w2.dtype:
        raise KernelError(
            f"experts got w13 {tuple(w13.shape)} {w13.dtype} and w2 {tuple(w2.shape)} {w2.dtype}; "
            f"for this w13, w2 must be {(slots, hidden, wide // 2)} {w13.dtype}"
        )
    if not slots or not _packs((wide, hidden), w13.dtype, w13.device):
        return ExpertWeights(w13, w2)
    return ExpertWeights(PackedSlots([pack(w) for w in w13]), PackedSlots([pack(w) for w in w2]))
