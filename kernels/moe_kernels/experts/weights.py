"""Weights of expert slots. E slots, H hidden, I intermediate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm.eager import GATHER_MAX_BYTES
from moe_kernels.grouped_gemm.weights import PackedSlots, SlotWeights, num_bytes, some_slots
from moe_kernels.linear.packed import PackedWeight, pack, worth_packing
from moe_kernels.scaled import BlockScaled, num_blocks

FP8 = torch.float8_e4m3fn

OneSlot = Tensor | BlockScaled
"""One slot's weight `[N, K]`."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """`w13 [E, 2I, H]` (gate rows first, then up) and `w2 [E, H, I]`: plain, packed slot by slot, or block-scaled fp8.

    Any form holds the bytes of the plain weights (packed: rows rounded up to 64) and of the scales. In w13 gate and up
    have blocks of their own: `scale [E, 2 ceil(I/128), ceil(H/128)]`, the gate's first, as two matrices of a checkpoint
    have; where 128 divides I these are the blocks of one `[2I, H]` matrix. w2 has `[E, ceil(H/128), ceil(I/128)]`.
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
        """What plain rows come in: the weights' dtype, and bf16 for block-scaled ones (which take any float)."""
        return torch.bfloat16 if isinstance(self.w13, BlockScaled) else self.w13.dtype

    @property
    def num_bytes(self) -> int:
        """Memory that the weights hold."""
        return num_bytes(self.w13) + num_bytes(self.w2)

    @property
    def is_fixed(self) -> bool:
        """Slots stay where they are in memory when they are written; packed ones do not."""
        return not isinstance(self.w13, PackedSlots)

    def slots(self, start: int, stop: int) -> ExpertWeights:
        """Slots `start <= e < stop`, at least one, without a copy. For use at once: a packed slot that is written later
        stays here as it was."""
        return ExpertWeights(some_slots(self.w13, start, stop), some_slots(self.w2, start, stop))

    def write_slot_(self, slot: int, *, w13: OneSlot, w2: OneSlot) -> None:
        """Replace one slot's weights, in place: `w13 [2I, H]`, `w2 [H, I]`, in the form that the slots have.

        Raises KernelError on other forms, shapes or dtypes. What fails leaves both as they were: memory is taken before
        anything is written.
        """
        pairs = (("w13", self.w13, w13), ("w2", self.w2, w2))
        for name, old, new in pairs:
            _check_slot(slot, name, old, new)
        packed = [pack(new) for _, old, new in pairs if isinstance(old, PackedSlots) and isinstance(new, Tensor)]
        for _, old, new in pairs:
            if isinstance(old, BlockScaled):
                assert isinstance(new, BlockScaled), "checked above"
                old.data[slot].copy_(new.data)
                old.scale[slot].copy_(new.scale)
                continue
            assert isinstance(new, Tensor), "checked above"
            if isinstance(old, PackedSlots):
                old.parts[slot] = packed.pop(0)
            else:
                old[slot].copy_(new)

    def take_slot_(self, slot: int, other: ExpertWeights, scratch: ExpertWeights) -> Callable[[], None]:
        """Put the same slot of `other` in place of one slot; what is returned puts the old weights back, and takes no
        memory for it.

        `other` and `scratch`, which has one slot, are as `plain_like` makes them. Fixed storage is exchanged with
        `other`'s, by way of `scratch`, and takes no memory either. A packed slot is made anew, before anything is
        written; the old one is held by what is returned, and `other` stays as it is.
        """
        if isinstance(self.w13, PackedSlots) and isinstance(self.w2, PackedSlots):
            return _take_packed((self.w13, self.w2), slot, other.slot_tensors(slot))
        parts = list(zip(self.slot_tensors(slot), other.slot_tensors(slot), scratch.slot_tensors(0), strict=True))

        def exchange() -> None:
            for mine, theirs, between in parts:
                between.copy_(mine)
                mine.copy_(theirs)
                theirs.copy_(between)

        exchange()
        return exchange

    def slot_tensors(self, slot: int) -> tuple[Tensor, ...]:
        """All that one slot consists of, contiguous: w13 and w2, each followed by its scales where it is block-scaled.
        Views of fixed storage; of packed slots plain copies."""
        return _tensors(self.w13, slot) + _tensors(self.w2, slot)


def _take_packed(held: tuple[PackedSlots, PackedSlots], slot: int, plain: Sequence[Tensor]) -> Callable[[], None]:
    new = [pack(weight) for weight in plain]
    old = [slots.parts[slot] for slots in held]

    def put(parts: list[PackedWeight]) -> None:
        for slots, part in zip(held, parts, strict=True):
            slots.parts[slot] = part

    put(new)
    return partial(put, old)


def plain_like(weights: ExpertWeights, num_slots: int) -> ExpertWeights:
    """So many zero slots of the same shapes and dtypes in fixed storage, also where `weights` are packed."""
    return ExpertWeights(_plain_zeros(weights.w13, num_slots), _plain_zeros(weights.w2, num_slots))


def _plain_zeros(w: SlotWeights, num_slots: int) -> SlotWeights:
    match w:
        case PackedSlots():
            return torch.zeros(num_slots, *w.shape[1:], dtype=w.dtype)
        case BlockScaled():
            data, scale = (x.new_zeros(num_slots, *x.shape[1:]) for x in (w.data, w.scale))
            return BlockScaled(data, scale)
        case _:
            return w.new_zeros(num_slots, *w.shape[1:])


def _tensors(w: SlotWeights, slot: int) -> tuple[Tensor, ...]:
    match w:
        case PackedSlots():
            return (w.parts[slot].dense().contiguous(),)
        case BlockScaled():
            return w.data[slot], w.scale[slot]
        case _:
            return (w[slot],)


def _check_slot(slot: int, name: str, old: SlotWeights, new: OneSlot) -> None:
    if isinstance(old, BlockScaled):
        rule = f"BlockScaled {tuple(old.shape[1:])} with scales {tuple(old.scale.shape[1:])}"
        fits = isinstance(new, BlockScaled) and new.shape == old.shape[1:] and new.scale.shape == old.scale.shape[1:]
        fits = fits and isinstance(new, BlockScaled) and new.data.dtype is FP8 and new.scale.dtype is torch.float32
    else:
        rule = f"{tuple(old.shape[1:])} {old.dtype}"
        fits = isinstance(new, Tensor) and new.shape == old.shape[1:] and new.dtype is old.dtype
    if not fits:
        seen = str(new.dtype) if isinstance(new, Tensor) else f"with scales {tuple(new.scale.shape)}"
        raise KernelError(f"slot {slot} got {name} {tuple(new.shape)} {seen}; it must be {rule}")


def _packs(shape13: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    small = shape13[0] * shape13[1] * dtype.itemsize <= GATHER_MAX_BYTES
    return not small and worth_packing(shape13, dtype, device)


def allocate_experts(
    num_slots: int, hidden: int, intermediate: int, *, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """Zero weights to be filled by `write_slot_`; block-scaled where `dtype` is float8_e4m3fn.

    Packed slots (large ones on a CPU) take memory as they are written; all others are fixed storage.
    """
    if dtype is FP8:
        return ExpertWeights(
            _zero_blocks(num_slots, 2 * intermediate, hidden, 2 * num_blocks(intermediate), device),
            _zero_blocks(num_slots, hidden, intermediate, num_blocks(hidden), device),
        )
    if not _packs((2 * intermediate, hidden), dtype, device):
        w13 = torch.zeros(num_slots, 2 * intermediate, hidden, dtype=dtype, device=device)
        return ExpertWeights(w13, torch.zeros(num_slots, hidden, intermediate, dtype=dtype, device=device))

    def empty(n: int, k: int) -> list[PackedWeight]:
        return [pack(torch.zeros(n, k, dtype=dtype))] * num_slots

    return ExpertWeights(PackedSlots(empty(2 * intermediate, hidden)), PackedSlots(empty(hidden, intermediate)))


def _zero_blocks(slots: int, n: int, k: int, scale_rows: int, device: torch.device) -> BlockScaled:
    data = torch.zeros(slots, n, k, dtype=FP8, device=device)
    return BlockScaled(data, torch.zeros(slots, scale_rows, num_blocks(k), device=device))


def prepare_experts(w13: Tensor | BlockScaled, w2: Tensor | BlockScaled) -> ExpertWeights:
    """`w13 [E, 2I, H]` (gate rows first, then up) and `w2 [E, H, I]` -> what `expert_mlp_*` takes.

    Large plain slots on a CPU are packed (a copy; release the plain weights afterwards), others are used as they are.
    Raises KernelError where forms, shapes or dtypes do not fit together.
    """
    slots, wide, hidden = w13.shape
    kind13, kind2 = (_kind(w) for w in (w13, w2))
    if w2.shape != (slots, hidden, wide // 2) or wide % 2 or kind13 != kind2:
        raise KernelError(
            f"experts got w13 {tuple(w13.shape)} {kind13} and w2 {tuple(w2.shape)} {kind2}; "
            f"for this w13, w2 must be {(slots, hidden, wide // 2)} {kind13}"
        )
    if isinstance(w13, BlockScaled) or isinstance(w2, BlockScaled):
        return ExpertWeights(w13, w2)
    if not slots or not _packs((wide, hidden), w13.dtype, w13.device):
        return ExpertWeights(w13, w2)
    return ExpertWeights(PackedSlots([pack(w) for w in w13]), PackedSlots([pack(w) for w in w2]))


def _kind(w: Tensor | BlockScaled) -> str:
    return str(w.dtype) if isinstance(w, Tensor) else "BlockScaled"
