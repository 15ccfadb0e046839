"""Whether to move experts, which, and why: threshold, plan, gain minus cost. Pure, and made by one rank for all.

W windows of time, L layers, E logical experts, P slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moe_runtime.balance.measures import rank_loads
from moe_runtime.balance.moves import (
    busiest_bytes,
    keep_slots,
    layer_moves,
    num_rounds,
    rows_of,
    rows_per_step,
    steps_of_slot,
)
from moe_runtime.balance.schedule import LayerChange, in_turn, payback_steps, total_net
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement

MakePlans = Callable[[Tensor, ExpertPlacement, int | None], Sequence[ExpertPlacement]]
"""(loads [W, L, E], placement now, most slots that may change) -> placements of the same layers, slots, experts, ep:
the best, then some with fewer and fewer moves."""


class Verdict(StrEnum):
    """What follows from a window's loads."""

    NO_LOAD = "no load"
    BALANCED = "balanced"
    """The utilisation is not below the threshold; nothing was planned."""
    NO_GAIN = "no gain"
    """No layer saves more until the next decision than its move costs."""
    NO_TIME = "no time"
    """Some layer would, but by then its move is not through, or too late."""
    MOVE = "move"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a decision weighs, equal on all ranks.

    `threshold`: a utilisation from which on nothing is planned. `horizon_steps`: steps until the next decision; what
    moves must be through by then, and its gain counts for what is left of them. `row_bytes`: what a token's row costs
    the rank that serves it, there and back. `slot_bytes`: of one expert. `bytes_per_step`: most that one rank sends, or
    receives, for moves in one step.
    """

    threshold: float
    horizon_steps: int
    row_bytes: int
    slot_bytes: int
    bytes_per_step: int
    ranks_per_node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Verdict and numbers. Utilisation: mean over the busiest rank's tokens, both summed over windows and layers, as a
    step waits for the busiest rank; 1 is best.

    `steps`, `num_tokens`: of all windows; a token counts once per layer and expert. `without`: the utilisation under
    the placement that the run began with. `planned`: under the largest plan. `predicted`: after all of `changes`, what
    pays and has time, in their order. `num_steps`: that they take one after the other. `payback_steps`: from the first
    move until the bytes moved are saved; 0 where nothing moves.
    """

    verdict: Verdict
    steps: int
    num_tokens: int
    utilisation: float
    without: float
    planned: float
    predicted: float
    num_layers: int = 0
    num_moves: int = 0
    moved_bytes: int = 0
    saved_bytes_per_step: float = 0.0
    changes: tuple[LayerChange, ...] = ()
    num_steps: int = 0
    payback_steps: float = 0.0
    num_windows: int = 1

    def __str__(self) -> str:
        windows = f" in {self.num_windows} windows" if self.num_windows > 1 else ""
        text = (
            f"{self.verdict}: utilisation {self.utilisation:.3f} over {self.steps} steps{windows} "
            f"({self.without:.3f} under the first placement)"
        )
        if self.verdict is Verdict.MOVE:
            text += (
                f", predicted {self.predicted:.3f} with {self.num_moves} slots of {self.num_layers} layers moved in "
                f"{self.num_steps} steps: {self.moved_bytes} bytes at the busiest rank, saved again after "
                f"{self.payback_steps:.0f} steps"
            )
        elif self.verdict is Verdict.NO_GAIN:
            text += f"; a plan reaches {self.planned:.3f}, but saves less until the next decision than it moves"
        elif self.verdict is Verdict.NO_TIME:
            text += (
                f"; a plan reaches {self.planned:.3f}, but its moves are through too late before the next decision. "
                f"Raise balance.bytes_per_step or balance.interval_steps"
            )
        return text


def utilisation(loads: Tensor, placement: ExpertPlacement) -> float:
    """Of `loads [L, E]` or `[W, L, E]`: mean over maximum, both summed over windows and layers. That is the share of
    the busiest ranks' time that an average rank works."""
    ranks = rank_loads(loads, placement)
    busiest = float(ranks.amax(-1).sum())
    return float(ranks.mean(-1).sum()) / busiest if busiest else 1.0


def decide(
    loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement, plan: MakePlans, terms: Terms
) -> Decision:
    """From `loads [W, L, E]` or `[L, E]`, tokens of `steps` steps, in windows one after the other.

    A move costs bytes between ranks, and so does every row that the busiest rank of a layer receives and sends back:
    the two are compared as they are. Layers are judged one by one, each by the best of several plans. They move one
    after the other, those first that net most per step, and a layer's gain counts from its commit to the next decision.
    """
    loads = loads if loads.ndim == 3 else loads[None]
    num_tokens = int(loads.sum())
    seen, without = utilisation(loads, now), utilisation(loads, first)
    if not num_tokens or seen >= terms.threshold:
        verdict = Verdict.BALANCED if num_tokens else Verdict.NO_LOAD
        return Decision(
            verdict=verdict,
            steps=steps,
            num_tokens=num_tokens,
            utilisation=seen,
            without=without,
            planned=seen,
            predicted=seen,
            num_windows=len(loads),
        )
    plans = [_fitting(planned, now) for planned in plan(loads, now, _move_budget(now, terms))]
    ways = [list(_changes(loads, steps, now, planned, terms)) for planned in plans]
    found = _most(ways, terms.horizon_steps)
    table = now.phy2log.clone()
    for change in found:
        table[change.layer] = torch.tensor(change.row)
    return Decision(
        verdict=_verdict(found, ways, terms.horizon_steps),
        steps=steps,
        num_tokens=num_tokens,
        utilisation=seen,
        without=without,
        planned=utilisation(loads, plans[0]),
        predicted=utilisation(loads, ExpertPlacement(table, now.num_logical, now.ep)),
        num_layers=len(found),
        num_moves=sum(change.num_moves for change in found),
        moved_bytes=sum(change.moved_bytes for change in found),
        saved_bytes_per_step=sum(change.saved_bytes_per_step for change in found),
        changes=found,
        num_steps=sum(change.num_steps for change in found),
        payback_steps=payback_steps(found),
        num_windows=len(loads),
    )


def _changes(
    loads: Tensor, steps: int, now: ExpertPlacement, planned: ExpertPlacement, terms: Terms
) -> Iterator[LayerChange]:
    """Of each layer that the plan changes."""
    num_local = now.num_local
    slot_bytes, budget = terms.slot_bytes, terms.bytes_per_step
    each = steps_of_slot(budget, slot_bytes=slot_bytes, num_local=num_local)
    saved = (rank_loads(loads, now).amax(-1) - rank_loads(loads, planned).amax(-1)).sum(0)
    for layer, (old, new) in enumerate(zip(now.phy2log.tolist(), planned.phy2log.tolist(), strict=True)):
        row = keep_slots(old, new, num_local=num_local)
        moves = layer_moves(layer, old, row, num_local=num_local, ranks_per_node=terms.ranks_per_node, slot_steps=each)
        if not moves:
            continue
        cost = busiest_bytes(moves, slot_bytes=slot_bytes, num_local=num_local)
        taken = num_rounds(moves, slot_bytes=slot_bytes, bytes_per_step=budget, num_local=num_local)
        # A layer that moves within ranks only commits in one step too.
        yield LayerChange(layer, row, len(moves), cost, float(saved[layer]) / steps * terms.row_bytes, max(1, taken))


def _most(ways: Sequence[Sequence[LayerChange]], horizon_steps: int) -> tuple[LayerChange, ...]:
    """The changes in turn that net most. Where time is short a layer's largest change may keep several smaller ones of
    others out: so without the largest plan too, without the two largest, …"""
    some = [[change for changes in ways[left_out:] for change in changes] for left_out in range(len(ways))]
    return max((in_turn(changes, horizon_steps) for changes in some), key=lambda found: total_net(found, horizon_steps))


def _verdict(found: Sequence[LayerChange], ways: Sequence[Sequence[LayerChange]], horizon_steps: int) -> Verdict:
    if found:
        return Verdict.MOVE
    all_ways = (change for changes in ways for change in changes)
    pays_at_once = any(change.saved_bytes_per_step * horizon_steps > change.moved_bytes for change in all_ways)
    return Verdict.NO_TIME if pays_at_once else Verdict.NO_GAIN


def _move_budget(now: ExpertPlacement, terms: Terms) -> int | None:
    """Slots that all ranks can move until the next decision, at least one each; None where that is all of them. Which
    of them really have time is seen layer by layer."""
    rows = rows_per_step(terms.bytes_per_step, slot_bytes=terms.slot_bytes, num_local=now.num_local)
    each = max(1, rows * terms.horizon_steps // rows_of(terms.slot_bytes))
    slots = now.num_layers * now.num_physical
    return None if each * now.ep >= slots else each * now.ep


def _fitting(planned: ExpertPlacement, now: ExpertPlacement) -> ExpertPlacement:
    shapes = [(tuple(one.phy2log.shape), one.num_logical, one.ep) for one in (planned, now)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"planned [L, P], experts, ep = {shapes[0]}; the run has {shapes[1]}, which do not change.")
    return planned
