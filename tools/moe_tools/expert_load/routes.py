"""What the routes of single tokens say: experts chosen together, and bytes from rank to rank.

N tokens, L MoE layers, K top-k, E' logical experts, ep ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moe_runtime.balance.trace import Trace
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_runtime.types import LogicalRouting

Ints = NDArray[np.int64]

MOST_TOKENS: Final = 20_000
"""Tokens that the pairs are counted over; of more, an even sample."""
LEAST_TOGETHER: Final = 10
"""Pairs that fewer tokens chose are no finding."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Experts of one layer that tokens chose together."""

    experts: tuple[int, ...]
    """The busiest ones, in order of their load"""
    together: Ints
    """[n, n] tokens that chose both; the diagonal holds each one's own tokens"""
    top: tuple[tuple[int, int, int, float], ...]
    """(expert, other, tokens, lift): tokens over what independent choices would give"""
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Rows of one dispatch direction, all layers together: one per assignment, to the rank of the chosen replica."""

    ranks: Ints
    """[ep, ep]: from the token's home rank to the expert's"""
    to_ranks: int
    """Rows where a token travels once to each rank that it needs, its own left out"""
    to_nodes: int
    """Rows where it travels once to each node, its own left out"""

    def nodes(self, ranks_per_node: int) -> Ints:
        """[nodes, nodes] rows."""
        return by_node(self.ranks, ranks_per_node)

    def off_rank(self) -> int:
        return int(self.ranks.sum() - np.trace(self.ranks))

    def off_node(self, ranks_per_node: int) -> int:
        nodes = self.nodes(ranks_per_node)
        return int(nodes.sum() - np.trace(nodes))


def by_node(matrix: Ints, ranks_per_node: int) -> Ints:
    """[ep, ep] between ranks → [nodes, nodes]."""
    starts = np.arange(0, len(matrix), ranks_per_node)
    return np.asarray(np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1))


def pairs(routes: NDArray[np.int16], layer: int, num_logical: int, *, shown: int, top: int) -> Pairs:
    """Of `routes [N, L, K]`: the `shown` busiest of the first `num_logical` experts against each other, and the `top`
    pairs that chance explains least: by (together − expected) / √expected, where at least 10 tokens chose both."""
    sample = routes[:: max(1, -(-len(routes) // MOST_TOKENS)), layer].astype(np.int64)
    sample = np.where((sample >= 0) & (sample < num_logical), sample, num_logical)
    chosen = np.zeros((len(sample), num_logical + 1), dtype=np.float32)  # the last column is no expert's
    np.put_along_axis(chosen, sample, 1.0, axis=1)
    chosen = chosen[:, :-1]
    both = np.rint(chosen.T @ chosen).astype(np.int64)
    own = np.diag(both)
    expected = np.maximum(own[:, None] * own[None, :], 1) / max(1, len(sample))
    lift = both / expected
    surprise = np.where(np.triu(both >= LEAST_TOGETHER, 1) & (lift > 1), (both - expected) / np.sqrt(expected), 0.0)
    best = np.argsort(-surprise, axis=None, kind="stable")[:top]
    found = [divmod(int(place), num_logical) for place in best]
    busiest = np.argsort(-own, kind="stable")[: min(shown, num_logical)]
    return Pairs(
        experts=tuple(busiest.tolist()),
        together=both[np.ix_(busiest, busiest)],
        top=tuple((a, b, int(both[a, b]), float(lift[a, b])) for a, b in found if surprise[a, b] > 0),
        num_tokens=len(sample),
    )


def replay(
    trace: Trace, placement: ExpertPlacement, *, choice: ReplicaChoice = ReplicaChoice.STATIC
) -> tuple[Ints, Traffic]:
    """Send the trace's tokens from their homes through `placement`, with the runtime's own choice of replicas.

    Returns the rows received, `[W, L, ep] int64`, and the traffic. The trace has routes and the placement's ep. Choices
    that look at a token's mates in its step take those of its window on its rank.
    """
    ep, nodes = placement.ep, trace.header.ranks_per_node
    received = np.zeros((trace.num_windows, placement.num_layers, ep), dtype=np.int64)
    between = np.zeros((ep, ep), dtype=np.int64)
    ranks_once = nodes_once = 0
    for rank in sorted(set(trace.home.tolist())):
        selector = placement.selector(rank, choice=choice, ranks_per_node=nodes)
        at_home = trace.home == rank
        window = trace.window[at_home].numpy()
        for layer, ids in enumerate(trace.routes[at_home].long().unbind(1)):
            routing = LogicalRouting(ids.contiguous(), torch.ones(ids.shape))
            physical = selector.to_physical(layer, routing).expert_ids.numpy()
            owner = np.where(physical < 0, ep, physical // placement.num_local)
            places = (window[:, None] * (ep + 1) + owner).ravel()
            count = np.bincount(places, minlength=trace.num_windows * (ep + 1)).reshape(-1, ep + 1)[:, :ep]
            received[:, layer] += count
            between[rank] += count.sum(axis=0)
            ranks_once += _distinct(owner, rank, ep)
            nodes_once += _distinct(np.where(owner < ep, owner // nodes, ep), rank // nodes, ep)
    return received, Traffic(between, ranks_once, nodes_once)


def _distinct(places: Ints, own: int, nowhere: int) -> int:
    """How many different places the rows of `places [N, K]` name; `own` and `nowhere` do not count."""
    ordered = np.sort(places, axis=1)
    new = np.ones(ordered.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((new & (ordered != own) & (ordered != nowhere)).sum())
