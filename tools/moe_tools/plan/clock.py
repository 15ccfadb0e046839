"""A step's time on one rank, which a search asks for very often: `dispatch.timeline.simulate` without spans."""

from __future__ import annotations

from collections.abc import Sequence

from moe_runtime.dispatch.overlap import Stage
from moe_runtime.dispatch.timeline import Costs, Turn


def step_us(log: Sequence[Turn], costs: Sequence[Costs], *, num_chunks: int) -> float:
    """`simulate([log], [costs], num_chunks=num_chunks).step_us`, of a log that a lockstep makes; `costs`: of each
    micro-batch."""
    now = wire = 0.0
    begun, arrived = [0] * len(costs), [0.0] * len(costs)
    before = [_before(own) for own in costs]
    for micro_batch, stage in log:
        own, count = costs[micro_batch], begun[micro_batch]
        within = count % (2 * num_chunks)
        first, opens, chunk, last = before[micro_batch]
        now = max(now, arrived[micro_batch])
        if stage is None:
            now += last if count else own.first_us + own.last_us
            continue
        if stage is Stage.COMBINE:
            now += own.experts_us
            taken = own.combine_us
        else:
            now += chunk if within else opens if count else first
            taken = own.dispatch_us
        begun[micro_batch] = count + 1
        wire = arrived[micro_batch] = max(now, wire) + taken
        if not within:
            now += own.shared_us
    return now


def _before(costs: Costs) -> tuple[float, float, float, float]:
    """What runs before the step's first dispatch, a later layer's first, a later one of a layer, and the end."""
    whole = costs.send_us + costs.attention_us
    return costs.first_us + whole, costs.sum_us + whole, costs.sum_us + costs.send_us, costs.sum_us + costs.last_us
