"""A trace's tokens sent again: from their homes, through a placement, by the runtime's own choice of replicas.

W windows, N tokens with routes, L MoE layers, K top-k, S ep ranks, M nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.trace import Trace
from moe_runtime.errors import TraceError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector
from moe_runtime.types import LogicalRouting

BY_TOKEN_ALONE: Final = (ReplicaChoice.STATIC, ReplicaChoice.NEAREST)
"""Choices that do not look at the other tokens of a dispatch."""


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """Rows of one dispatch direction, one per assignment, and what would travel if a token went to a rank once."""

    rank_loads: Tensor
    """[W, L, S] int64: rows that each rank receives"""
    copies: Tensor
    """[S, S] int64: rows from home rank to serving rank, over all windows and layers"""
    rank_copies: Tensor
    """[S, S] int64: tokens of a home of which a rank receives at least one row, layers counted one by one"""
    node_copies: Tensor
    """[S, M] int64: the same for nodes"""

    def equals(self, trace: Trace) -> bool:
        """Whether every rank has received just these rows in every window and layer of `trace`."""
        return torch.equal(self.rank_loads, trace.rank_loads)


def replay(
    trace: Trace, placement: ExpertPlacement | None = None, *, choice: ReplicaChoice | str | None = None
) -> Replayed:
    """Send the trace's tokens through `placement`, or as recorded: each through the placement in force at its step.

    `choice` None: as recorded, `static` where the trace does not say. Every rank's part of a micro-batch is one call of
    `ReplicaSelector.to_physical`, as it was in the run, so the rows are those that ranks would count, whatever the
    choice (`num_calls`); where a token's mates have no say, all steps are one.

    Raises TraceError where the trace has no routes, or says of no placement, and where the placement has other ranks,
    layers or experts.
    """
    header = trace.header
    moves = placement is None and len(trace.change_step) > 0
    placement = _checked(trace, header.placement() if placement is None else placement)
    kind = ReplicaChoice(choice or header.replica_choice or ReplicaChoice.STATIC)
    ranks, nodes = placement.ep, -(-placement.ep // header.ranks_per_node)
    selectors = [
        placement.selector(rank, choice=kind, ranks_per_node=header.ranks_per_node, rewritable=moves)
        for rank in range(ranks)
    ]
    found = Replayed(
        torch.zeros(trace.num_windows, placement.num_layers, ranks, dtype=torch.int64),
        torch.zeros(ranks, ranks, dtype=torch.int64),
        torch.zeros(ranks, ranks, dtype=torch.int64),
        torch.zeros(ranks, nodes, dtype=torch.int64),
    )
    alone = _alone(placement, kind)
    at_rest = _calls(trace, torch.zeros_like(trace.step), alone=alone)
    home = trace.home.unsqueeze(1)
    for layer in range(placement.num_layers):
        rows = trace.change_phy2log[trace.change_layer == layer].long() if moves else ()
        calls = at_rest
        if len(rows):
            steps = trace.change_step[trace.change_layer == layer]
            calls = _calls(trace, torch.searchsorted(steps, trace.step, right=True), alone=alone)
        slots = _slots(
            trace, layer, calls, selectors, [ExpertPlacement(row[None], header.num_logical, ranks) for row in rows]
        )
        serving = torch.where(slots < 0, ranks, slots // placement.num_local)  # one column more takes what goes nowhere
        found.rank_loads[:, layer] = _count(trace.window.unsqueeze(1), serving, trace.num_windows, ranks)
        found.copies.add_(_count(home, serving, ranks, ranks))
        found.rank_copies.add_(distinct(home, serving, ranks, ranks))
        node = torch.where(slots < 0, nodes, serving // header.ranks_per_node)
        found.node_copies.add_(distinct(home, node, ranks, nodes))
    return found


def num_calls(trace: Trace, placement: ExpertPlacement, *, choice: ReplicaChoice | str | None = None) -> int:
    """Calls of `to_physical` that `replay` makes, changes aside; each takes some 30 µs with `round_robin`, 300 µs with
    `waterfill` (one core of a server, 16 tokens)."""
    alone = _alone(placement, ReplicaChoice(choice or trace.header.replica_choice or ReplicaChoice.STATIC))
    return len(_calls(trace, torch.zeros_like(trace.step), alone=alone).parts) * placement.num_layers


def _alone(placement: ExpertPlacement, choice: ReplicaChoice) -> bool:
    """Whether a token's replicas do not depend on its mates in the dispatch."""
    return choice in BY_TOKEN_ALONE or placement.num_physical == placement.num_logical


def distinct(home: Tensor, target: Tensor, homes: int, targets: int) -> Tensor:
    """[homes, targets] int64: tokens of each home with at least one assignment to each target.

    `home [N, 1]`, `target [N, K]`, `targets` itself for none.
    """
    ordered = np.sort(target.numpy(), axis=1)
    first = np.ones(ordered.shape, dtype=np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    index = (home.numpy() * (targets + 1) + ordered)[first]
    counts = np.bincount(index, minlength=homes * (targets + 1)).reshape(homes, targets + 1)
    return torch.from_numpy(np.ascontiguousarray(counts[:, :targets]))


def _checked(trace: Trace, placement: ExpertPlacement | None) -> ExpertPlacement:
    header = trace.header
    if not len(trace.routes):
        raise TraceError("the trace has no routes of single tokens to send. Record with balance.record=per_token.")
    if placement is None:
        raise TraceError("phy2log is null: the trace does not say where its experts were. Give a placement.")
    seen = (placement.ep, placement.num_layers, placement.num_logical)
    wanted = (header.ep, header.num_layers, header.num_logical)
    if seen != wanted:
        raise TraceError(
            f"a placement with [ep, layers, logical experts]={list(seen)}, and the trace has {list(wanted)}: tokens "
            "are sent from the ranks on which they were recorded. Give a placement for those."
        )
    return placement


@dataclass(frozen=True, slots=True, eq=False)
class _Calls:
    """Tokens that ranks place together, a rank's after another's."""

    order: Tensor
    """[N] int64: places in the trace; a rank's tokens stay in the order of its rows"""
    parts: list[tuple[int, int, int]]
    """(tokens, home rank, changes of the layer's placement before it) of each call, in the order of time"""


def _calls(trace: Trace, era: Tensor, *, alone: bool) -> _Calls:
    """`era [N]`, rising with the step; `alone`: one call takes all tokens of a rank in an era."""
    together = torch.zeros_like(trace.step) if alone else trace.step * 256 + trace.micro_batch
    _, together = torch.unique(together, return_inverse=True)
    ranks, most = trace.header.ep, len(trace.step) + 1
    key = (era * most + together) * ranks + trace.home
    order = key.argsort(stable=True)
    keys, counts = torch.unique_consecutive(key[order], return_counts=True)
    return _Calls(order, list(zip(counts.tolist(), (keys % ranks).tolist(), (keys // ranks // most).tolist())))


def _slots(
    trace: Trace, layer: int, calls: _Calls, selectors: list[ReplicaSelector], rows: list[ExpertPlacement]
) -> Tensor:
    """[N, K] int64: a layer's slots, -1 for none. `rows`: the layer's placement after each of its changes."""
    ids, none = trace.routes[calls.order, layer].long(), torch.empty(0)  # weights have no say in where a token goes
    found, era, first = [], 0, 0
    for count, home, now in calls.parts:
        if now != era:
            era = now
            for selector in selectors:
                selector.write_(layer, selector.tables(rows[era - 1]))
        routing = LogicalRouting(ids[first : first + count], none)
        found.append(selectors[home].to_physical(layer, routing).expert_ids)
        first += count
    slots = torch.empty_like(ids)
    slots[calls.order] = torch.cat(found)
    return slots


def _count(row: Tensor, serving: Tensor, rows: int, ranks: int) -> Tensor:
    """[rows, ranks] int64: assignments of each row to each rank."""
    index = (row * (ranks + 1) + serving).flatten()
    return torch.bincount(index, minlength=rows * (ranks + 1)).view(rows, ranks + 1)[:, :ranks]
