"""Replicas chosen by what a rank's own step asks for: its tokens are spread so that what it sends evens out over ranks.

Every rank does so for its own tokens; nothing is exchanged. A sum of even parts is even, and where sources see alike
loads, each sees the others' skew in its own. L layers, E logical experts, P slots on ep ranks, R replicas at most,
T tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from moe_runtime.types import NOWHERE

if TYPE_CHECKING:
    from moe_runtime.parallel.placement import ExpertPlacement

_ROUNDS: Final = 3
"""Of levelling; docs/balance.md has the balance after each."""
_GOLDEN: Final = 0.6180339887498949
_PLASTIC: Final = 0.7548776662466927


@dataclass(frozen=True, slots=True, eq=False)
class Waterfill:
    """One rank's tables of all layers; the entry of expert E is where id -1 lands. Those made to be rewritten are
    (`ReplicaSelector.write_`)."""

    slots: Tensor
    """[L, E+1, R] int64, padded with -1."""
    owners: Tensor
    """[L, E+1, R] int64: the rank of each; 0 for padding."""
    even: Tensor
    """[L, E+1, R] float32: equal shares; 0 for padding."""
    sources: Tensor
    """[L, P] int64: a slot's place in a layer's flat `[E+1, R]`."""
    last: Tensor
    """[L, E+1] int64: the place of an expert's last replica in a layer's flat `[E+1, R]`."""
    turn: Tensor
    """[E+1] float64 in 0..1: where this rank begins among the replicas of each expert, so that ranks differ."""
    ep: int

    @classmethod
    def build(
        cls, placement: ExpertPlacement, ep_rank: int, *, num_replicas: int | None = None, device: torch.device | str
    ) -> Waterfill:
        """`num_replicas`: R, where it is to hold any placement of these slots."""
        width = placement.log2phy.shape[2] if num_replicas is None else num_replicas
        padding = (0, width - placement.log2phy.shape[2], 0, 1)
        slots = torch.nn.functional.pad(placement.log2phy, padding, value=NOWHERE)
        held = slots != NOWHERE
        places = torch.arange(slots[0].numel()).view(slots.shape[1:]).expand_as(slots)
        sources = torch.empty(placement.num_layers, placement.num_physical, dtype=torch.int64)
        for layer in range(placement.num_layers):
            sources[layer, slots[layer][held[layer]]] = places[layer][held[layer]]
        experts = torch.arange(placement.num_logical + 1, dtype=torch.float64)
        return cls(
            slots=slots.to(device),
            owners=(slots.clamp_min(0) // placement.num_local).to(device),
            even=(held / held.sum(dim=2, keepdim=True).clamp_min(1)).to(device),
            sources=sources.to(device),
            last=(places[..., 0] + held.sum(dim=2).clamp_min(1) - 1).to(device),
            turn=((experts * _PLASTIC + ep_rank * _GOLDEN) % 1.0).to(device),
            ep=placement.ep,
        )

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Those that depend on the placement."""
        return self.slots, self.owners, self.even, self.sources, self.last

    def choose(self, layer: int, expert_ids: Tensor) -> Tensor:
        """`expert_ids [T, K] int64`, -1 for none -> `[T, K] int64` slots, -1 kept. No host sync, fixed shapes."""
        slots = self.slots[layer]
        entries = slots.shape[0]
        experts = expert_ids.remainder(entries).flatten()  # -1 is the last entry
        counts = torch.zeros(entries, dtype=torch.int64, device=experts.device)
        counts.scatter_add_(0, experts, torch.ones_like(experts))
        ends = self._shares(layer, counts).double().cumsum_(1)
        # Where an assignment stands in 0..1 among those of its expert: neighbours far apart, so any run of tokens is
        # spread like the whole, and each share gets its part but for a token or two.
        at = torch.frac(self.turn[experts] + _occurrence(experts, counts) * _GOLDEN)
        bounds = (ends + torch.arange(entries, device=experts.device).unsqueeze(1)).flatten()
        place = torch.searchsorted(bounds, at + experts, right=True)
        return torch.take(slots, torch.minimum(place, self.last[layer][experts])).view_as(expert_ids)

    def _shares(self, layer: int, counts: Tensor) -> Tensor:
        """[E+1, R] float32: of `counts [E+1]` each replica's part.

        Each round a replica's share falls with the square of what this rank sends to its rank: at rest where an
        expert's ranks are level; the cube swings. Sums have a fixed order: the same counts give the same shares.
        """
        shares, owners, sources = self.even[layer], self.owners[layer], self.sources[layer]
        tokens = counts.unsqueeze(1).float()
        for _ in range(_ROUNDS):
            of_slots = torch.take(shares * tokens, sources)
            ranks = of_slots.view(self.ep, -1).sum(dim=1)
            shares = shares / (ranks + 1.0).square_()[owners]
            shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return shares


def _occurrence(experts: Tensor, counts: Tensor) -> Tensor:
    """[N] int64: how many of the assignments before this one go to the same of `experts [N]`."""
    order = experts.argsort(stable=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(experts.shape[0], device=experts.device) - first[experts[order]]
    return torch.empty_like(rank).scatter_(0, order, rank)
