"""Whether to move experts, which, and why: threshold, plan, gain minus cost. Pure, and made by one rank for all.

L layers, E logical experts, P slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from moe_runtime.balance.measures import rank_loads
from moe_runtime.balance.moves import busiest_bytes, keep_slots, layer_moves
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement

MakePlan = Callable[[Tensor, ExpertPlacement, int | None], ExpertPlacement]
"""(loads [L, E], placement now, most slots that may change) -> a placement of the same layers, slots, experts, ep."""

_PARTS: Final = (2, 4, 8, 16)


class Verdict(StrEnum):
    """What follows from a window's loads."""

    NO_LOAD = "no load"
    BALANCED = "balanced"
    """The utilisation is not below the threshold; nothing was planned."""
    NO_GAIN = "no gain"
    """No layer saves more until the next decision than its move costs."""
    MOVE = "move"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a decision weighs, equal on all ranks.

    `threshold`: a utilisation from which on nothing is planned. `horizon_steps`: steps for which a gain is counted.
    `row_bytes`: what a token's row costs the rank that serves it, there and back. `slot_bytes`: of one expert.
    `bytes_per_step`: most that one rank sends or receives for moves in one step.
    """

    threshold: float
    horizon_steps: int
    row_bytes: int
    slot_bytes: int
    bytes_per_step: int
    ranks_per_node: int


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A layer whose move pays. `row`: the expert of each slot afterwards; bytes are those of the busiest rank."""

    layer: int
    row: tuple[int, ...]
    num_moves: int
    moved_bytes: int
    saved_bytes_per_step: float

    def net_bytes(self, terms: Terms) -> float:
        """Saved until the next decision, less what the move costs."""
        return self.saved_bytes_per_step * terms.horizon_steps - self.moved_bytes


@dataclass(frozen=True, slots=True)
class Decision:
    """Verdict and numbers. Utilisation: mean over the busiest rank's tokens, both summed over layers; 1 is best.

    `steps`, `num_tokens`: of the window; a token counts once per layer and expert. `without`: the utilisation under the
    placement that the run began with. `planned`: under the largest plan. `predicted`: after all of `changes`, what
    pays. `payback_steps`: until the bytes moved are saved, infinite where nothing is.
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

    @property
    def payback_steps(self) -> float:
        return self.moved_bytes / self.saved_bytes_per_step if self.saved_bytes_per_step > 0 else float("inf")

    def __str__(self) -> str:
        text = (
            f"{self.verdict}: utilisation {self.utilisation:.3f} over {self.steps} steps "
            f"({self.without:.3f} under the first placement)"
        )
        if self.verdict is Verdict.MOVE:
            text += (
                f", predicted {self.predicted:.3f} with {self.num_moves} slots of {self.num_layers} layers moved: "
                f"{self.moved_bytes} bytes at the busiest rank, saved again after {self.payback_steps:.0f} steps"
            )
        elif self.verdict is Verdict.NO_GAIN:
            text += f"; a plan reaches {self.planned:.3f}, but saves less until the next decision than it moves"
        return text


def utilisation(loads: Tensor, placement: ExpertPlacement) -> float:
    """Mean over maximum, both summed over layers: the share of the busiest ranks' time that an average rank works."""
    ranks = rank_loads(loads, placement)
    busiest = float(ranks.amax(1).sum())
    return float(ranks.mean(1).sum()) / busiest if busiest else 1.0


def decide(
    loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement, plan: MakePlan, terms: Terms
) -> Decision:
    """From `loads [L, E]`, tokens of `steps` steps.

    A move costs bytes between ranks, and so does every row that the busiest rank of a layer receives and sends back:
    the two are compared as they are, for `horizon_steps`. That understates the gain, as the rows' products count
    nothing. Layers are judged one by one, each by the best of several plans, and those that pay most come first.
    """
    num_tokens = int(loads.sum())
    seen = utilisation(loads, now)
    without = utilisation(loads, first)
    if not num_tokens or seen >= terms.threshold:
        verdict = Verdict.BALANCED if num_tokens else Verdict.NO_LOAD
        return Decision(verdict, steps, num_tokens, seen, without, seen, seen)
    plans = _plans(loads, now, plan, terms)
    best: dict[int, LayerChange] = {}
    for planned in plans:
        for change in _changes(loads, steps, now, planned, terms):
            rival = best.get(change.layer)
            if change.net_bytes(terms) > (0.0 if rival is None else rival.net_bytes(terms)):
                best[change.layer] = change
    found = sorted(best.values(), key=lambda change: -change.net_bytes(terms))
    table = now.phy2log.clone()
    for change in found:
        table[change.layer] = torch.tensor(change.row)
    return Decision(
        Verdict.MOVE if found else Verdict.NO_GAIN,
        steps,
        num_tokens,
        seen,
        without,
        utilisation(loads, plans[0]),
        utilisation(loads, ExpertPlacement(table, now.num_logical, now.ep)),
        len(found),
        sum(change.num_moves for change in found),
        sum(change.moved_bytes for change in found),
        sum(change.saved_bytes_per_step for change in found),
        tuple(found),
    )


def _plans(loads: Tensor, now: ExpertPlacement, plan: MakePlan, terms: Terms) -> list[ExpertPlacement]:
    """The plan with as many moves as there is time for, and those with half of its moves, a quarter, …: often few moves
    bring most of the gain. One only where the planner heeds no budget."""
    plans = [_fitting(plan(loads, now, _move_budget(now, terms)), now)]
    changed = whole = _num_changed(now, plans[0])
    for part in _PARTS:
        if whole // part < 1:
            break
        smaller = _fitting(plan(loads, now, whole // part), now)
        if _num_changed(now, smaller) >= changed:
            break
        changed = _num_changed(now, smaller)
        plans.append(smaller)
    return plans


def _changes(
    loads: Tensor, steps: int, now: ExpertPlacement, planned: ExpertPlacement, terms: Terms
) -> Iterator[LayerChange]:
    """Of each layer that the plan changes."""
    saved = rank_loads(loads, now).amax(1) - rank_loads(loads, planned).amax(1)
    for layer, (old, new) in enumerate(zip(now.phy2log.tolist(), planned.phy2log.tolist(), strict=True)):
        row = keep_slots(old, new, num_local=now.num_local)
        moves = layer_moves(layer, old, row, num_local=now.num_local, ranks_per_node=terms.ranks_per_node)
        if moves:
            cost = busiest_bytes(moves, slot_bytes=terms.slot_bytes, num_local=now.num_local)
            yield LayerChange(layer, row, len(moves), cost, float(saved[layer]) / steps * terms.row_bytes)


def _num_changed(now: ExpertPlacement, planned: ExpertPlacement) -> int:
    return int((now.phy2log != planned.phy2log).sum())


def _move_budget(now: ExpertPlacement, terms: Terms) -> int | None:
    """Slots that all ranks can move until the next decision; None where that is all of them."""
    each = terms.bytes_per_step * terms.horizon_steps // terms.slot_bytes
    slots = now.num_layers * now.num_physical
    return None if each * now.ep >= slots else each * now.ep


def _fitting(planned: ExpertPlacement, now: ExpertPlacement) -> ExpertPlacement:
    shapes = [(tuple(one.phy2log.shape), one.num_logical, one.ep) for one in (planned, now)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"planned [L, P], experts, ep = {shapes[0]}; the run has {shapes[1]}, which do not change.")
    return planned
