"""Whether a rank's replica tables, as they lie in memory, are those of a placement.

E logical experts, P slots, R replicas at most. Built from the placement's row alone, not by what builds the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_runtime.parallel.replicas import ReplicaSelector
from moe_runtime.types import NOWHERE, LogicalRouting


def wrong_tables(selector: ReplicaSelector, layer: int, row: Sequence[int]) -> str | None:
    """What is wrong with a layer's tables, made to be rewritten, if `row [P]` names the expert of each slot; None where
    all is right: every expert leads to exactly its slots, id -1 nowhere, and so do ids sent through `to_physical`, R of
    each expert. Reads the tables back from the device."""
    rule = selector.rule
    assert rule is not None, "made to be rewritten"
    experts, num_slots = rule.num_logical, len(row)
    wanted = _slots_of(row, experts, num_slots - experts + 1)
    entry = torch.tensor([*row, experts])  # of each slot; of -1 the last entry
    entries = torch.arange(experts + 1)
    if not torch.equal(entry[selector.fixed[layer].cpu()], entries):
        return "an expert's fixed replica is not one of its slots"
    counts = (wanted >= 0).sum(1).clamp_min(1)
    if not torch.equal(selector.replica_counts[layer].cpu(), counts):
        return "replicas are miscounted"
    rotating = selector.rotating[layer]
    if rotating is not None and not torch.equal(rotating.cpu(), wanted):
        return "experts take turns among other slots than their own"
    if not _waterfill_fits(selector, layer, wanted, counts):
        return "the tables of waterfill name other slots"
    ids = entries.repeat_interleave(wanted.shape[1]).unsqueeze(1)
    ids[ids == experts] = NOWHERE
    sent = LogicalRouting(ids.to(selector.fixed.device), torch.ones_like(ids, dtype=torch.float32))
    found = selector.to_physical(layer, sent).expert_ids.cpu()
    if not torch.equal(entry[found], ids.where(ids != NOWHERE, experts)):
        return "a token is sent to a slot that does not hold its expert"
    return None


def _slots_of(row: Sequence[int], num_experts: int, num_replicas: int) -> Tensor:
    """[E+1, R] int64: each expert's slots in ascending order, padded with -1; the last entry is that of id -1."""
    table = torch.full((num_experts + 1, num_replicas), NOWHERE)
    numbers: list[int] = []
    seen: Counter[int] = Counter()
    for expert in row:
        numbers.append(seen[expert])
        seen[expert] += 1
    table[torch.tensor(row), torch.tensor(numbers)] = torch.arange(len(row))
    return table


def _waterfill_fits(selector: ReplicaSelector, layer: int, wanted: Tensor, counts: Tensor) -> bool:
    if selector.waterfill is None:
        return True
    slots, owners, even, sources, last = (table[layer].cpu() for table in selector.waterfill.tables)
    num_local = len(sources) // selector.waterfill.ep
    held = wanted >= 0
    return (
        torch.equal(slots, wanted)
        and torch.equal(owners, wanted.clamp_min(0) // num_local)
        and torch.equal(even, held / counts.unsqueeze(1))
        and torch.equal(torch.take(slots, sources), torch.arange(len(sources)))
        and torch.equal(last, torch.arange(len(wanted)) * wanted.shape[1] + counts - 1)
    )
