"""Reads matrices from a checkpoint: in their FP8 blocks where these are kept, else in a plain dtype.

H hidden, I expert width, S shared experts, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from moe_kernels.experts import ExpertWeights, OneSlot, allocate_experts
from moe_kernels.linear.packed import cat_rows
from moe_kernels.scaled import BlockScaled, stack_rows
from torch import Tensor

from moe_models.kept_fp8 import KeptFp8, Part
from moe_runtime.layers.experts import MLP, DenseMLP, ScaledMLP
from moe_runtime.layers.linear import Linear
from moe_runtime.loading.checkpoint import Region
from moe_runtime.loading.source import WeightSource

_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of one rank; names come without `.weight`."""

    source: WeightSource
    kept: KeptFp8
    batch_invariant: bool

    def linear(
        self,
        part: Part,
        names: Sequence[str],
        region: Region | None = None,
        *,
        bias: Tensor | None = None,
        reorder: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Linear:
        """The region of each matrix, one below the other. `reorder` puts plain rows in order; kept ones are in it."""
        weight: Tensor | BlockScaled
        if self.keeps(part, names):
            weight = stack_rows([self.source.read_blocks(f"{name}.weight", region) for name in names])
        else:
            weight = reorder(cat_rows([self.source.read(f"{name}.weight", region) for name in names]))
        return Linear.of(weight, bias, batch_invariant=self.batch_invariant, ue8m0=self.kept.ue8m0)

    def mlp(self, part: Part, prefix: str) -> MLP:
        """A whole MLP."""
        names = [prefix + name for name in _MLP]
        if self.keeps(part, names):
            gate, up, down = (self.source.read_blocks(f"{name}.weight") for name in names)
            both = _halves(gate, up)
            return ScaledMLP(ExpertWeights(_one_slot(both), _one_slot(down)), self.batch_invariant, self.kept.ue8m0)
        gate_up = torch.cat([self.source.read(f"{name}.weight") for name in names[:2]])
        return DenseMLP(
            Linear.of(gate_up, batch_invariant=self.batch_invariant),
            Linear.of(self.source.read(f"{names[2]}.weight"), batch_invariant=self.batch_invariant),
        )

    def experts(
        self, prefix: str, logical: Sequence[int], *, routed: int, hidden: int, width: int, dtype: torch.dtype
    ) -> ExpertWeights:
        """Slots with these logical experts, in order; ids from `routed` on are slices of width I of the shared MLP.

        In FP8 where all of them are kept, else in `dtype`.
        """
        places = [_place(prefix, expert, routed, width) for expert in logical]
        kept = self.keeps("experts", [stem + name for stem, _, _ in places for name in _MLP])
        weights = allocate_experts(
            len(places), hidden, width, dtype=torch.float8_e4m3fn if kept else dtype, device=self.source.device
        )
        for slot, place in enumerate(places):
            w13, w2 = self._scaled_expert(*place) if kept else self._plain_expert(*place, dtype)
            weights.write_slot_(slot, w13=w13, w2=w2)
        return weights

    def keeps(self, part: Part, names: Sequence[str]) -> bool:
        """Whether these matrices stay in FP8: the run keeps such, and the checkpoint has all of them in FP8."""
        return part in self.kept.parts and all(self.source.is_fp8(f"{name}.weight") for name in names)

    def _scaled_expert(self, stem: str, rows: Region | None, columns: Region | None) -> tuple[OneSlot, OneSlot]:
        regions = zip(_MLP, (rows, rows, columns), strict=True)
        gate, up, down = (self.source.read_blocks(f"{stem}{name}.weight", region) for name, region in regions)
        return _halves(gate, up), down

    def _plain_expert(
        self, stem: str, rows: Region | None, columns: Region | None, dtype: torch.dtype
    ) -> tuple[OneSlot, OneSlot]:
        """`w13 [2I, H]`, `w2 [H, I]`."""
        regions = zip(_MLP, (rows, rows, columns), strict=True)
        gate, up, down = (self.source.read(f"{stem}{name}.weight", region, dtype=dtype) for name, region in regions)
        return torch.cat((gate, up)), down


def _place(prefix: str, logical: int, routed: int, width: int) -> tuple[str, Region | None, Region | None]:
    """Where an expert is stored: prefix of its names, its rows of gate and up, its columns of down."""
    shared = logical - routed
    if shared < 0:
        return f"{prefix}experts.{logical}.", None, None
    cut, every = slice(shared * width, (shared + 1) * width), slice(None)
    return f"{prefix}shared_experts.", (cut, every), (every, cut)


def _halves(gate: BlockScaled, up: BlockScaled) -> BlockScaled:
    """`w13` of two `[I, H]`, each with blocks of its own."""
    return BlockScaled(torch.cat((gate.data, up.data)), torch.cat((gate.scale, up.scale)))


def _one_slot(w: BlockScaled) -> BlockScaled:
    return BlockScaled(w.data.unsqueeze(0), w.scale.unsqueeze(0))
