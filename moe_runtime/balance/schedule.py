"""Which layers move before a horizon, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What moving a layer in one way takes and brings: `num_steps` in which no other layer moves, `moved_bytes` at the
    busiest rank, and from then on `saved_bytes_per_step`. `row`: the expert of each of its slots afterwards."""

    layer: int
    row: tuple[int, ...]
    num_moves: int
    moved_bytes: int
    saved_bytes_per_step: float
    num_steps: int = 1

    def net_bytes(self, steps_left: int) -> float:
        """Saved in the steps that are left once it is through, less what it moves."""
        return self.saved_bytes_per_step * (steps_left - self.num_steps) - self.moved_bytes


def in_turn(changes: Sequence[LayerChange], horizon_steps: int) -> tuple[LayerChange, ...]:
    """The changes that pay, one after the other, all through before `horizon_steps` are over.

    Greedy: of each layer the change that nets most if it comes next, of these first the one that nets most per step it
    takes. That is not always the order that nets most of all.
    """
    if not changes:
        return ()
    layer = np.unique([change.layer for change in changes], return_inverse=True)[1]
    saved, cost, steps = (
        np.array([getattr(change, name) for change in changes], dtype=np.float64)
        for name in ("saved_bytes_per_step", "moved_bytes", "num_steps")
    )
    open_ = np.ones(len(changes), dtype=np.bool_)
    found: list[LayerChange] = []
    left = horizon_steps
    while True:
        net = np.where(open_ & (steps <= left), saved * (left - steps) - cost, 0.0)
        most = np.zeros(int(layer.max()) + 1)
        np.maximum.at(most, layer, net)
        rate = np.where((net > 0) & (net == most[layer]), net / steps, 0.0)
        best = int(rate.argmax())
        if rate[best] <= 0:
            return tuple(found)
        found.append(changes[best])
        open_ &= layer != layer[best]
        left -= changes[best].num_steps


def total_net(changes: Sequence[LayerChange], horizon_steps: int) -> float:
    """Bytes that `changes`, made in turn, save before the horizon, less what they move."""
    left, total = horizon_steps, 0.0
    for change in changes:
        total += change.net_bytes(left)
        left -= change.num_steps
    return total


def payback_steps(changes: Sequence[LayerChange]) -> float:
    """Steps from the first move until all bytes moved are saved again: 0 where none are moved, infinite where some are
    and nothing is saved."""
    rate = saved = 0.0
    at, moved = 0, float(sum(change.moved_bytes for change in changes))
    if not moved:
        return 0.0
    for change in changes:
        if saved + rate * change.num_steps >= moved:
            break
        saved += rate * change.num_steps
        at += change.num_steps
        rate += change.saved_bytes_per_step
    return at + max(0.0, moved - saved) / rate if rate > 0 else float("inf")
