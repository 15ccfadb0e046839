"""What a trace says: loads per expert and rank, balancedness, the hottest, and what other placements would have done.

W windows, L MoE layers, E' logical experts, ep ranks. Balancedness is mean over ranks / max over ranks: 1 is best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moe_runtime.balance.measures import balancedness, rank_loads
from moe_runtime.balance.replay import BY_TOKEN_ALONE, Replayed, num_calls, replay
from moe_runtime.balance.trace import Trace, TraceHeader
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_tools.expert_load.traffic import Traffic

MOST_CALLS: Final = 500_000
"""Of the replica choice, in one replay: half a minute of `round_robin`, some minutes of `waterfill`."""

Floats = NDArray[np.float64]
Kind = Literal["measured", "predicted", "counterfactual"]
OURS: Final = "moe_runtime"
"""`header.source` of recordings of this runtime"""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One placement and the rows that each rank receives under it."""

    key: str
    name: str
    kind: Kind
    placement: ExpertPlacement | None
    rank_loads: Floats
    """[W, L, ep]"""
    traffic: Traffic

    @property
    def total(self) -> Floats:
        """[L, ep]: of all windows."""
        return np.asarray(self.rank_loads.sum(axis=0))

    @property
    def balance(self) -> Floats:
        """[L]: of the totals."""
        return balance_of(self.total)

    @property
    def ep(self) -> int:
        return int(self.rank_loads.shape[2])

    @property
    def used(self) -> float:
        return time_used(self.rank_loads)

    @property
    def slowest(self) -> float:
        """Rows of the busiest rank over the mean: 1/used."""
        return 1 / self.used if self.used else float("nan")


@dataclass(frozen=True, slots=True)
class HotExpert:
    layer: int
    expert: int
    tokens: int
    times: float
    """Over the mean of its layer's experts, shared ones apart"""
    ranks: tuple[int, ...]
    """That hold it"""


def time_used(rank_loads: Floats) -> float:
    """Share of the ranks' time that their experts compute, where all wait for the slowest in each window and layer.

    `rank_loads [W, L, ep]`. Σ mean / Σ max over windows and layers: the balancedness that a step feels. NaN where
    nothing was received.
    """
    return float(share(rank_loads.mean(axis=2).sum(), rank_loads.max(axis=2).sum()))


def balance_of(rank_load: Floats) -> Floats:
    """`balancedness` of `[…, ep]` rows: `[…]`."""
    return np.asarray(balancedness(torch.from_numpy(rank_load)).numpy())


def predicted_rank_loads(
    trace: Trace, plan: ExpertPlacement, choice: ReplicaChoice | None = None
) -> tuple[Floats, bool]:
    """Rows [W, L, ep] that the trace's tokens would bring each rank under `plan`, and whether that is exact.

    `choice` None: as recorded. Exact where each token's route is sent through the plan by the runtime's own choice of
    replicas. Where routes are missing, live on other ranks than the plan's, do not give the rows that were counted, or
    would take more than MOST_CALLS, experts' tokens are taken to spread evenly over their replicas.
    """
    rows, sent = _predicted(trace, plan, choice, trusted=_trusted(trace, choice, _again(trace)))
    return rows, sent.exact


def candidates(trace: Trace, plan: ExpertPlacement | None, choice: ReplicaChoice | None = None) -> list[Candidate]:
    """No balancing, as recorded, and `plan` where there is one.

    Where the plan is for other ranks, so is "no balancing", and names say on how many each stands: shares of time on
    different numbers of ranks cannot be compared. `choice` None: as recorded. ConfigError where the plan is for another
    model.
    """
    header, measured = trace.header, trace.rank_loads.double().numpy()
    if plan is not None:
        check_fits(plan, trace.header)
    again = _again(trace)
    if again is None or not again.equals(trace):
        sent = Traffic.even(measured.sum(axis=(0, 1)), header.ranks_per_node)
    else:
        sent = Traffic.replayed(again, header.ranks_per_node)
    trusted = _trusted(trace, choice, again)
    ep = header.ep if plan is None else plan.ep
    plain = ExpertPlacement.uniform(header.num_layers, header.num_logical, ep=ep)
    found = [
        Candidate("none", "No balancing", "counterfactual", plain, *_predicted(trace, plain, choice, trusted=trusted)),
        Candidate("recorded", *_of_source(header.source), header.placement(), measured, sent),
    ]
    if plan is not None:
        rows, sent = _predicted(trace, plan, choice, trusted=trusted)
        found.append(Candidate("plan", "Planned", "predicted", plan, rows, sent))
    return found if ep == header.ep else [replace(own, name=f"{own.name}, {_ranks(own.ep)}") for own in found]


def _ranks(ep: int) -> str:
    return "1 rank" if ep == 1 else f"{ep} ranks"


def _predicted(
    trace: Trace, placement: ExpertPlacement, choice: ReplicaChoice | None, *, trusted: bool
) -> tuple[Floats, Traffic]:
    """Rows [W, L, ep], and between ranks."""
    nodes = trace.header.ranks_per_node
    if trusted and placement.ep == trace.header.ep and _can_send(trace, placement, choice):
        found = replay(trace, placement, choice=choice)
        return found.rank_loads.double().numpy(), Traffic.replayed(found, nodes)
    rows: Floats = rank_loads(trace.loads, placement).numpy()
    return rows, Traffic.even(rows.sum(axis=(0, 1)), nodes)


def _can_send(trace: Trace, placement: ExpertPlacement, choice: ReplicaChoice | None) -> bool:
    """Whether the route of every counted assignment is there, and sending them ends in time."""
    known = len(trace.routes) > 0 and int((trace.routes >= 0).sum()) == int(trace.loads.sum())
    known = known and trace.header.source == OURS  # others do not say where tokens enter
    return known and num_calls(trace, placement, choice=choice) <= MOST_CALLS


def _of_source(source: str) -> tuple[str, Kind]:
    """What the rows of a trace are: other programs do not record them, they follow from a placement that was named."""
    return ("As recorded", "measured") if source == OURS else ("As placed (assumed)", "predicted")


def _again(trace: Trace) -> Replayed | None:
    """The recording replayed; None where it cannot be, or not in time."""
    placement = trace.header.placement()
    return None if placement is None or not _can_send(trace, placement, None) else replay(trace)


def _trusted(trace: Trace, choice: ReplicaChoice | None, again: Replayed | None) -> bool:
    """Whether a replay tells what a run would do: that of the recording (`again`) gives the rows that its ranks have
    counted. Where the recording cannot be replayed: a token's replica depends on the token alone."""
    if again is not None:
        return again.equals(trace)
    return ReplicaChoice(choice or trace.header.replica_choice or ReplicaChoice.STATIC) in BY_TOKEN_ALONE


def check_fits(plan: ExpertPlacement, header: TraceHeader, *, name: str = "plan") -> None:
    """ConfigError where `plan` is for another number of layers or experts than the trace; `name`: which plan."""
    seen, wanted = (plan.num_layers, plan.num_logical), (header.num_layers, header.num_logical)
    if seen != wanted:
        raise ConfigError(
            f"{name}: is for {seen[0]} layers of {seen[1]} logical experts, {header.model or 'the trace'} has "
            f"{wanted[0]} of {wanted[1]}. Make one from a trace of this model: plan trace=… output=plan.json"
        )


def hot_experts(trace: Trace, placement: ExpertPlacement | None, most: int) -> list[HotExpert]:
    """The routed experts with most tokens, relative to their layer's mean. Dispatched shared ones see every token."""
    load = trace.total_loads.numpy()[:, : trace.header.num_routed]
    mean = load.mean(axis=1, keepdims=True)
    times = np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)
    order = np.argsort(-times, axis=None, kind="stable")[:most]
    found = []
    for layer, expert in zip(*np.unravel_index(order, times.shape), strict=True):
        ranks = () if placement is None else ranks_of(placement, int(layer), int(expert))
        found.append(HotExpert(int(layer), int(expert), int(load[layer, expert]), float(times[layer, expert]), ranks))
    return [hot for hot in found if hot.tokens]


def ranks_of(placement: ExpertPlacement, layer: int, expert: int) -> tuple[int, ...]:
    """The ep ranks that hold `expert`, in order."""
    slots = placement.log2phy[layer, expert, : int(placement.logcnt[layer, expert])]
    return tuple(sorted({int(slot) // placement.num_local for slot in slots}))


def spans(num_windows: int, most: int) -> list[tuple[int, int]]:
    """(first, end) of at most `most` runs of neighbouring windows, about equally long."""
    edges = np.unique(np.linspace(0, num_windows, min(most, num_windows) + 1).round().astype(int)).tolist()
    return list(pairwise(edges))


def share(part: Floats | np.float64, whole: Floats | np.float64) -> Floats:
    """part / whole; NaN where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    quotient: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return quotient
