"""The planner's counting beside a run: a recording's tokens sent again under the placement that it ran with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moe_runtime.balance.replay import num_calls, replay
from moe_runtime.balance.trace import Trace

MOST_CALLS: Final = 100_000
"""Of the replica choice in one such replay: half a minute of `waterfill`."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where one rank's rows are not those that it has counted."""

    window: int
    layer: int
    rank: int
    replayed: int
    measured: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """Rows of every rank: replayed, against those that the run measured. `differ`: of windows x layers x ranks."""

    windows: int
    layers: int
    ranks: int
    rows: int
    differ: int
    first: Difference | None

    def __str__(self) -> str:
        whole = f"{self.windows} windows x {self.layers} layers x {self.ranks} ranks"
        start = "rows per rank, replayed under the recording's placement against those measured: "
        if self.first is None:
            return f"{start}equal in all {whole} ({self.rows} rows)"
        own = self.first
        return (
            f"{start}{self.differ} of {whole} differ, first window {own.window}, layer {own.layer}, rank {own.rank}: "
            f"{own.replayed} replayed, {own.measured} measured"
        )


def repeated(trace: Trace) -> Repeat | None:
    """None where the trace does not say where its experts were, or where the replay would take minutes."""
    placement = trace.header.placement()
    if placement is None or not len(trace.routes) or num_calls(trace, placement) > MOST_CALLS:
        return None
    rows = replay(trace).rank_loads
    places = (rows != trace.rank_loads).nonzero()
    first = None
    if len(places):
        window, layer, rank = places[0].tolist()
        first = Difference(
            window, layer, rank, int(rows[window, layer, rank]), int(trace.rank_loads[window, layer, rank])
        )
    windows, layers, ranks = rows.shape
    return Repeat(windows, layers, ranks, int(rows.sum()), len(places), first)
