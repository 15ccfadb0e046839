"""What a trace says: loads per expert and rank, balancedness, the hottest, and what other placements would have done.

W windows, L MoE layers, E' logical experts, ep ranks. Balancedness is mean over ranks / max over ranks: 1 is best.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_runtime.balance.trace import Trace
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_tools.expert_load.routes import replay

Floats = NDArray[np.float64]
Kind = Literal["measured", "predicted", "counterfactual"]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One placement and the rows that each rank receives under it."""

    key: str
    name: str
    kind: Kind
    placement: ExpertPlacement | None
    rank_loads: Floats
    """[W, L, ep]"""

    @property
    def total(self) -> Floats:
        """[L, ep]: of all windows."""
        return np.asarray(self.rank_loads.sum(axis=0))

    @property
    def balance(self) -> Floats:
        """[L]: of the totals; NaN where nothing was received."""
        return balancedness(self.total)

    @property
    def over_time(self) -> Floats:
        """[W]: Σ mean / Σ max over the layers of each window; NaN where nothing was received."""
        return share(self.rank_loads.mean(axis=2).sum(axis=1), self.rank_loads.max(axis=2).sum(axis=1))

    @property
    def used(self) -> float:
        """Share of the ranks' time that their experts compute, where all wait for the slowest in each window and layer.

        Σ mean / Σ max over windows and layers: the balancedness that a step feels.
        """
        return float(share(self.rank_loads.mean(axis=2).sum(), self.rank_loads.max(axis=2).sum()))

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


def balancedness(rank_load: Floats) -> Floats:
    """Mean over max along the last axis; NaN where all are 0."""
    return share(rank_load.mean(axis=-1), rank_load.max(axis=-1))


def expected_rank_loads(loads: Floats, placement: ExpertPlacement) -> Floats:
    """`loads [W, L, E']` → [W, L, ep]: every expert's tokens spread evenly over its replicas."""
    counts = placement.logcnt.numpy()
    phy2log = placement.phy2log.numpy()
    layers, slots = phy2log.shape
    share = np.zeros((layers, placement.num_logical, placement.ep))
    layer = np.arange(layers)[:, None]
    rank = np.arange(slots)[None, :] // placement.num_local
    np.add.at(share, (layer, phy2log, rank), 1 / counts[layer, phy2log])
    return np.asarray(np.einsum("wle,ler->wlr", loads, share, optimize=True))


def predicted_rank_loads(trace: Trace, plan: ExpertPlacement, choice: ReplicaChoice) -> tuple[Floats, bool]:
    """Rows [W, L, ep] that the trace's tokens would bring each rank under `plan`, and whether that is exact.

    Exact where `predicts_exactly`; else experts' tokens are taken to spread evenly over their replicas.
    """
    if predicts_exactly(trace, plan, choice):
        return replay(trace, plan, choice=choice)[0].astype(np.float64), True
    return expected_rank_loads(trace.loads.double().numpy(), plan), False


def predicts_exactly(trace: Trace, plan: ExpertPlacement, choice: ReplicaChoice) -> bool:
    """Whether every counted assignment's route is known, tokens live on the plan's ranks, and a token's replicas do not
    depend on which tokens share its step."""
    alone = choice in (ReplicaChoice.STATIC, ReplicaChoice.NEAREST)
    known = len(trace.routes) > 0 and int((trace.routes >= 0).sum()) == int(trace.loads.sum())
    return alone and known and plan.ep == trace.header.ep


def candidates(
    trace: Trace, plan: ExpertPlacement | None, choice: ReplicaChoice = ReplicaChoice.STATIC
) -> list[Candidate]:
    """No balancing, as recorded, and `plan` where there is one; each on the ranks that it is made for."""
    header, loads = trace.header, trace.loads.double().numpy()
    plain = ExpertPlacement.uniform(header.num_layers, header.num_logical, ep=header.ep)
    found = [Candidate("none", "No balancing", "counterfactual", plain, expected_rank_loads(loads, plain))]
    measured = trace.rank_loads.double().numpy()
    found.append(Candidate("recorded", "As recorded", "measured", header.placement(), measured))
    if plan is not None:
        check_fits(plan, trace)
        rows, _ = predicted_rank_loads(trace, plan, choice)
        found.append(Candidate("plan", "Planned", "predicted", plan, rows))
    return found


def check_fits(plan: ExpertPlacement, trace: Trace) -> None:
    """ConfigError where `plan` is for another number of layers or experts than the trace."""
    seen = (plan.num_layers, plan.num_logical)
    wanted = (trace.header.num_layers, trace.header.num_logical)
    if seen != wanted:
        raise ConfigError(
            f"plan: is for {seen[0]} layers of {seen[1]} logical experts, the trace ({trace.header.model}) has "
            f"{wanted[0]} of {wanted[1]}. Make a plan from this trace: plan trace=… output=plan.json."
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
