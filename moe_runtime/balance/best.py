"""The `best` policy: greedy starts, local search, and the better of that and EPLB for every layer.

W windows, V views (the whole load and its worst windows), L layers, E experts, D ranks, S slots of a rank.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from moe_runtime.balance.arrays import Bools, Grid, Ints
from moe_runtime.balance.eplb import node_experts, to_layers
from moe_runtime.balance.exact import MOST_SLOTS, exact_plan
from moe_runtime.balance.measures import clashes, loads_of
from moe_runtime.balance.pack import pack_apart, per_item, replicate
from moe_runtime.balance.search import Search

MAX_STEPS: Final = 400
_WORST_WINDOWS: Final = 3
_ROUNDING: Final = 1e-9


def best(loads: Grid, base: Ints, *, nodes: int, num_groups: int) -> Ints:
    """`loads [W, L, E]`, EPLB's plan `base [L, D, S]` -> experts `[L, D, S]`."""
    ep, num_slots = base.shape[1:]
    views = views_of(loads, base)
    apart = can_be_apart(num_slots, views.shape[2])
    if apart and not can_be_apart(num_slots, views.shape[2] // nodes):
        nodes = num_groups = 1  # a node's experts are too few for its ranks
    node = np.arange(ep) // (ep // nodes)
    if not apart:
        return best_of(loads, [base, Search(views, base, node=node, apart=False).run(MAX_STEPS)])
    plans = [base]
    ids = node_experts(views[0], nodes=nodes, num_groups=num_groups)
    for grouping in [ids, _even_nodes(views[0], ids, num_groups)] if nodes > 1 else [ids]:
        plans += _searched(views, start(views[0], grouping, ep=ep, num_slots=num_slots), node)
    chosen = best_of(loads, plans)
    left = np.flatnonzero((chosen == base).all(axis=(1, 2)))
    if left.size:  # EPLB's own start, made of distinct replicas, in the layers where nothing beat it
        again = _searched(views[:, left], part(views[0, left], base[left], node), node)
        chosen[left] = best_of(loads[:, left], [base[left], *again])
    if nodes == 1 and base[0].size <= MOST_SLOTS:
        _part_exactly(loads, views, base, chosen)
    return chosen


def _part_exactly(loads: Grid, views: Grid, base: Ints, chosen: Ints) -> None:
    """In small layers that still have two replicas of one expert on a rank: whether there is a way without."""
    for layer in np.flatnonzero([clashes(slots) for slots in chosen]):
        _, slots = exact_plan(views[0, layer], ep=base.shape[1], num_slots=base.shape[2])
        chosen[layer] = best_of(loads[:, [layer]], [base[[layer]], chosen[[layer]], slots[None]])[0]


def can_be_apart(num_slots: int, num_experts: int) -> bool:
    """Whether a rank of `num_slots` slots can do without two replicas of one of `num_experts` experts."""
    return num_slots <= num_experts


def _searched(views: Grid, slots: Ints, node: Ints) -> list[Ints]:
    """The search for the whole load, and from there for the worst windows too."""
    plans = [Search(views[:1], slots, node=node).run(MAX_STEPS)]
    if len(views) > 1:
        plans.append(Search(views, plans[0], node=node).run(MAX_STEPS))
    return plans


def start(weights: Grid, ids: Ints, *, ep: int, num_slots: int) -> Ints:
    """Greedy plan `[L, D, S]` for `weights [L, E]`, no rank with two replicas of one expert; `ids [L, nodes, …]`."""
    layers, nodes, _ = ids.shape
    local = np.take_along_axis(weights, ids.reshape(layers, -1), axis=1).reshape(layers * nodes, -1)
    items, counts = replicate(local, ep * num_slots // nodes, most=ep // nodes)
    return to_layers(ids, pack_apart(per_item(local, counts, items), items, local.shape[1], ep // nodes), ep)


def part(weights: Grid, slots: Ints, node: Ints) -> Ints:
    """A copy of `slots` in which a replica beside another of its expert is replaced by the lightest new replica."""
    slots = slots.copy()
    size = slots.shape[2]
    again = (slots[..., None] == slots[..., None, :]) & np.tri(size, k=-1, dtype=np.bool_)
    for layer, rank, slot in np.argwhere(again.any(axis=3)):
        counts = np.bincount(slots[layer].ravel(), minlength=weights.shape[1])
        new = weights[layer] / (counts + 1)
        new[slots[layer, rank]] = np.inf
        new[np.bincount(slots[layer, node == node[rank]].ravel(), minlength=len(new)) == 0] = np.inf
        slots[layer, rank, slot] = new.argmin()
    return slots


def _even_nodes(weights: Grid, ids: Ints, num_groups: int) -> Ints:
    """Swap groups between the heaviest node and others while that helps."""
    layers, nodes, _ = ids.shape
    size = weights.shape[1] // num_groups
    of_groups = weights.reshape(1, layers, num_groups, size).sum(axis=3)
    groups = ids.reshape(layers, nodes, -1, size)[..., 0] // size
    groups = Search(of_groups / of_groups.mean(), groups, node=np.zeros(nodes, dtype=np.int64)).run(MAX_STEPS)
    even: Ints = (groups[..., None] * size + np.arange(size)).reshape(layers, nodes, -1)
    return even


def views_of(loads: Grid, base: Ints) -> Grid:
    """[V, L, E]: the sum of all windows, then each layer's windows in which `base` is least even; mean rank load 1."""
    total = _scaled(loads.sum(axis=0, keepdims=True), base.shape[1])
    if len(loads) == 1:
        return total
    scaled = _scaled(loads, base.shape[1])
    worst = np.argsort(-loads_of(scaled, base).max(axis=2), axis=0, kind="stable")[:_WORST_WINDOWS]
    return np.concatenate([total, np.take_along_axis(scaled, worst[..., None], axis=0)])


def _scaled(loads: Grid, ep: int) -> Grid:
    mean = loads.sum(axis=2, keepdims=True) / ep
    scaled: Grid = loads / np.where(mean > 0, mean, 1.0)
    return scaled


def over_nodes(total: Grid, slots: Ints, *, nodes: int) -> Ints:
    """`slots [L, D, S]` with ranks renamed: dealt to nodes from the heaviest to the lightest, forth and back. Nodes get
    even shares of `total [L, E]`, and copies of one expert are on several."""
    turn, place = np.divmod(np.arange(slots.shape[1]), nodes)
    rank = np.where(turn % 2, nodes - 1 - place, place) * (slots.shape[1] // nodes) + turn
    dealt = np.empty_like(slots)
    order = np.argsort(-loads_of(total[None], slots)[0], axis=1, kind="stable")
    dealt[:, rank] = np.take_along_axis(slots, order[..., None], axis=1)
    return dealt


def measures(loads: Grid, slots: Ints) -> Grid:
    """[3, L], the busiest rank over the mean rank, 1 is best: of the whole load; over time; in the worst window.

    "Over time" is the sum over windows of the busiest rank's load over that of the mean: what waiting for the slowest
    rank costs. With one window all three are equal.
    """
    per_rank = loads_of(loads, slots)
    mean, busiest = per_rank.mean(axis=2), per_rank.max(axis=2)
    whole = per_rank.sum(axis=0).max(axis=1) / mean.sum(axis=0)
    over_time = busiest.sum(axis=0) / mean.sum(axis=0)
    worst = np.where(mean > 0, busiest / np.where(mean > 0, mean, 1.0), 1.0).max(axis=0)
    return np.stack([whole, over_time, worst])


def objective(measured: Grid) -> Grid:
    """What `best` minimises, of `[3, …]`: half the cost over time, half the worst window."""
    score: Grid = 0.5 * (measured[1] + measured[2])
    return score


def best_of(loads: Grid, plans: list[Ints]) -> Ints:
    """Of each layer the plan with the least objective among those that are `no_worse` than the first."""
    chosen, limit = plans[0].copy(), measures(loads, plans[0])
    least = objective(limit)
    for plan in plans[1:]:
        measured = measures(loads, plan)
        score = objective(measured)
        better = no_worse(measured, limit) & (score <= least)
        chosen[better], least[better] = plan[better], score[better]
    return chosen


def no_worse(measured: Grid, limit: Grid) -> Bools:
    """`[3, …]` each -> […]: over time and in the worst window (with one window: the whole load too)."""
    return np.asarray((measured[1:] <= limit[1:] + _ROUNDING).all(axis=0))
