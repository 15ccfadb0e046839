"""How good a placement can be: a proven lower bound for any size, and the optimum of small cases.

L layers, E experts, D ranks, S slots of a rank, P = D × S.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.arrays import Grid, Ints, Loads, numbers
from moe_runtime.balance.measures import check_shape, loads_of
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement

MOST_SLOTS: Final = 10
"""A search of about 10 ms; each slot more takes five times longer."""


def lower_bound(loads: Loads, *, ep: int, num_slots: int) -> Tensor:
    """No placement of `loads [L, E]` on `ep` ranks of `num_slots` has a busiest rank below this: `[L] float64`.

    The greater of two bounds. The mean: all loads over all ranks. The rank with the heaviest replica: giving every copy
    to the expert with most load per replica makes that replica as light as any counts can (lighter ones would need
    more copies), and the rank's other S - 1 slots hold replicas too, each at least as heavy as the lightest expert's
    with every spare copy. With S = 2 the copies that lighten the companion are counted as missing elsewhere.
    Raises ConfigError where the slots do not hold all experts.
    """
    values = _layers(loads)
    experts = values.shape[1]
    spare = ep * num_slots - experts
    if spare < 0:
        raise ConfigError(
            f"lower_bound: ep={ep} ranks of {num_slots} slots do not hold {experts} experts. "
            f"Use {-(-experts // ep)} slots or more."
        )
    heaviest = heaviest_replica(values, spare)
    if num_slots == 2:
        busiest = _with_one_companion(values, heaviest)
    else:
        busiest = heaviest[:, -1] + (num_slots - 1) * values.min(axis=1) / (spare + 1)
    return torch.from_numpy(np.maximum(values.sum(axis=1) / ep, busiest))


def heaviest_replica(loads: Grid, num_copies: int) -> Grid:
    """[B, Q+1]: load of the heaviest replica of `loads [B, E]` after 0, 1, … Q copies, each where it helps most."""
    rows = np.arange(len(loads))
    each, counts = loads.copy(), np.ones(loads.shape, dtype=np.int64)
    found = np.empty((len(loads), num_copies + 1))
    for i in range(num_copies + 1):
        expert = each.argmax(axis=1)
        found[:, i] = each[rows, expert]
        counts[rows, expert] += 1
        each[rows, expert] = loads[rows, expert] / counts[rows, expert]
    return found


def _with_one_companion(loads: Grid, heaviest: Grid) -> Grid:
    """[L]: least load of a rank of two slots that holds the heaviest replica, over all companions and their copies.

    A companion with q copies leaves Q - q for the others. Leaving it out changes nothing for the others' heaviest
    replica if its load is below that; the others, few, are tried one by one. A rank may hold the same expert twice.
    """
    divisor = np.arange(1, heaviest.shape[1] + 1)
    light = loads < heaviest[:, -1:]
    lightest = np.where(light, loads, np.inf).min(axis=1)
    least: Grid = np.minimum((heaviest[:, ::-1] + lightest[:, None] / divisor).min(axis=1), 2 * heaviest[:, -1])
    layers, companions = np.nonzero(~light)
    without = loads[layers]
    without[np.arange(len(layers)), companions] = 0.0
    others = heaviest_replica(without, heaviest.shape[1] - 1)
    loaded = (others[:, ::-1] + loads[layers, companions][:, None] / divisor).min(axis=1)
    np.minimum.at(least, layers, loaded)
    return least


def optimality_gap(loads: Loads, placement: ExpertPlacement) -> Tensor:
    """`loads [L, E']` -> `[L] float64`: load of the busiest rank over `lower_bound`, minus 1; 0 is proven optimal."""
    values = _layers(loads)
    check_shape(values, placement)
    slots = placement.phy2log.numpy().reshape(placement.num_layers, placement.ep, -1)
    busiest = torch.from_numpy(loads_of(values[None], slots)[0].max(axis=1))
    bound = lower_bound(values, ep=placement.ep, num_slots=placement.num_local)
    return torch.where(bound > 0, busiest / bound.clamp_min(1e-300) - 1, torch.zeros_like(bound)).clamp_min(0)


def _layers(loads: Loads) -> Grid:
    values = numbers(loads)
    if values.ndim != 2:
        raise ConfigError(f"loads: {list(values.shape)}; must be [layers, experts]. Sum over the windows first.")
    return values


def exact_plan(loads: Grid, *, ep: int, num_slots: int, apart: bool = True) -> tuple[float, Ints]:
    """The least load of the busiest rank for `loads [E]`, and experts `[D, S]` that reach it: by branch and bound.

    `apart`: no rank with two replicas of one expert. ConfigError beyond 10 slots, or where no such plan exists.
    """
    experts = len(loads)
    if ep * num_slots > MOST_SLOTS or ep * num_slots < experts or (apart and num_slots > experts):
        raise ConfigError(
            f"exact_plan: {experts} experts on {ep} ranks of {num_slots} slots; it takes at most {MOST_SLOTS} slots, "
            f"one or more for each expert, and no more on a rank than there are experts. Use plan_placement."
        )
    most = min(ep if apart else ep * num_slots, ep * num_slots - experts + 1)
    found = _Found(np.inf, np.zeros((ep, num_slots), dtype=np.int64))
    for counts in _counts(experts, ep * num_slots, most):
        each = [float(load) / count for load, count in zip(loads, counts, strict=True)]
        if max(each) < found.load:
            items = sorted(((each[e], e) for e, count in enumerate(counts) for _ in range(count)), reverse=True)
            _place(items, [[] for _ in range(ep)], [0.0] * ep, num_slots, apart, found)
    return found.load, found.slots


class _Found:
    def __init__(self, load: float, slots: Ints) -> None:
        self.load, self.slots = load, slots


def _counts(experts: int, items: int, most: int) -> Iterator[list[int]]:
    if experts == 1:
        if 1 <= items <= most:
            yield [items]
        return
    for first in range(1, min(most, items - experts + 1) + 1):
        for rest in _counts(experts - 1, items - first, most):
            yield [first, *rest]


def _place(
    items: list[tuple[float, int]], ranks: list[list[int]], totals: list[float], size: int, apart: bool, found: _Found
) -> None:
    """Place the heaviest of `items` on each rank that may hold it; ranks that look alike once."""
    if not items:
        found.load, found.slots = max(totals), np.array(ranks, dtype=np.int64)
        return
    (load, expert), rest = items[0], items[1:]
    seen: set[tuple[int, ...]] = set()
    for rank, held in enumerate(ranks):
        alike = tuple(sorted(held))
        if len(held) == size or (apart and expert in held) or alike in seen or totals[rank] + load >= found.load:
            continue
        seen.add(alike)
        held.append(expert)
        before = totals[rank]
        totals[rank] = before + load
        _place(rest, ranks, totals, size, apart, found)
        totals[rank] = before
        held.pop()
