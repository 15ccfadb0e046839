"""The rules of the clock, checked on a timeline's spans alone: nothing here shares code with what made them.

No span may break a rule, and none may start later than the rules allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from moe_runtime.dispatch.overlap import Stage
from moe_runtime.dispatch.timeline import Costs, Lane, Span, Timeline, TimelineError

_EPS_US = 1e-6
"""Sums of a step's times in fp64 differ by less."""

Key = tuple[int, int, int, Stage | None]
"""Micro-batch, layer, chunk, stage."""


def check(timeline: Timeline) -> None:
    """TimelineError that names the span, where one

    * is on a lane at the same time as another,
    * is missing, is there twice or stands in another order than the log's,
    * is a transfer that starts before every rank has begun it, or differs between ranks,
    * is compute that starts before the transfer that it waits for has ended,
    * starts later than all of that allows,
    * lasts longer or shorter than its cost.
    """
    ranks = range(len(timeline.costs))
    for span in timeline.spans:
        _require(span.rank in ranks, span, "there is no such rank")
        _require(0.0 <= span.start_us <= span.end_us < float("inf"), span, "it ends before it starts")
    expected = list(_expected(timeline))
    computes = {rank: timeline.lane(rank, Lane.COMPUTE) for rank in ranks}
    wires = {rank: timeline.lane(rank, Lane.WIRE) for rank in ranks}
    for rank in ranks:
        _one_at_a_time(computes[rank])
        _one_at_a_time(wires[rank])
        beside = [costs.shared_us > 0.0 for costs in timeline.costs[rank]]
        program = [each for key in expected for each in _compute_keys(key, beside)]
        _in_order(rank, Lane.COMPUTE, computes[rank], program)
        _in_order(rank, Lane.WIRE, wires[rank], [(key, False) for key in expected if key[3] is not None])
        _lasting(computes[rank], wires[rank], timeline.costs, timeline.num_chunks)
        for ours, other in zip(wires[rank], wires[0], strict=True):
            _require(_same(ours.start_us, other.start_us) and _same(ours.end_us, other.end_us), ours, f"not as {other}")
    _transfers_after_compute(computes, wires[0])
    for rank in ranks:
        _compute_after_transfers(computes[rank], wires[rank])


def _expected(timeline: Timeline) -> Iterator[Key]:
    """The turns of the log with their layers and chunks."""
    per_layer = [(chunk, stage) for chunk in range(timeline.num_chunks) for stage in (Stage.DISPATCH, Stage.COMBINE)]
    counts = dict.fromkeys([micro_batch for micro_batch, _ in timeline.log], 0)
    for micro_batch, stage in timeline.log:
        count = counts[micro_batch]
        counts[micro_batch] += 1
        chunk, due = per_layer[count % len(per_layer)]
        if stage is None:
            yield micro_batch, count // len(per_layer), 0, None
        elif stage is not due:
            raise TimelineError(f"micro-batch {micro_batch}: {stage} where {due} is due")
        else:
            yield micro_batch, count // len(per_layer), chunk, stage


def _compute_keys(key: Key, beside: Sequence[bool]) -> Iterator[tuple[Key, bool]]:
    yield key, False
    if key[2] == 0 and key[3] is Stage.DISPATCH and beside[key[0]]:
        yield key, True


def _one_at_a_time(lane: Sequence[Span]) -> None:
    for span, following in pairwise(lane):
        _require(following.start_us >= span.end_us - _EPS_US, following, f"it starts during {span}")


def _in_order(rank: int, lane: Lane, spans: Sequence[Span], expected: Sequence[tuple[Key, bool]]) -> None:
    for span, (key, beside) in zip(spans, expected, strict=False):
        wanted = f"micro-batch {key[0]}, layer {key[1]}, chunk {key[2]}, {key[3] or 'the end'}{', beside' * beside}"
        _require(_key(span) == key and span.beside == beside, span, f"what is due there is {wanted}")
    if len(spans) > len(expected):
        raise TimelineError(f"{spans[len(expected)]}: it is not in the log")
    if len(spans) < len(expected):
        raise TimelineError(f"rank {rank}'s {lane}: {len(expected)} spans are due, the last is {spans[-1:] or 'none'}")


def _transfers_after_compute(computes: dict[int, list[Span]], wires: Sequence[Span]) -> None:
    begun = [{_key(span): span.end_us for span in lane if not span.beside} for lane in computes.values()]
    free = 0.0
    for wire in wires:
        last = max([ends[_key(wire)] for ends in begun])
        _require(wire.start_us >= last - _EPS_US, wire, f"the last rank begins it at {last:.3f} µs")
        _require(_same(wire.start_us, max(last, free)), wire, f"it could start at {max(last, free):.3f} µs")
        free = wire.end_us


def _compute_after_transfers(computes: Sequence[Span], wires: Sequence[Span]) -> None:
    arrivals = {micro_batch: [0.0] for micro_batch in {span.micro_batch for span in computes}}
    for wire in wires:
        arrivals[wire.micro_batch].append(wire.end_us)
    waits = {micro_batch: iter(times) for micro_batch, times in arrivals.items()}
    free = 0.0
    for span in computes:
        arrived = 0.0 if span.beside else next(waits[span.micro_batch])
        _require(span.start_us >= arrived - _EPS_US, span, f"what it waits for arrives at {arrived:.3f} µs")
        _require(_same(span.start_us, max(arrived, free)), span, f"it could start at {max(arrived, free):.3f} µs")
        free = span.end_us


def _lasting(
    computes: Sequence[Span], wires: Sequence[Span], costs: Sequence[Sequence[Costs]], num_chunks: int
) -> None:
    """Each transfer as long as the slowest rank's; each rank's compute as long as a step's parts are."""
    for span in wires:
        each = [row[span.micro_batch] for row in costs]
        due = max([c.combine_us if span.stage is Stage.COMBINE else c.dispatch_us for c in each])
        _require(_same(_us(span), due), span, f"it takes {due:.3f} µs")
    for span in computes:
        own = costs[span.rank][span.micro_batch]
        if span.beside or span.stage is Stage.COMBINE:
            due = own.shared_us if span.beside else own.experts_us
            _require(_same(_us(span), due), span, f"it takes {due:.3f} µs")
        elif span.layer and span.chunk == 0 and span.stage is Stage.DISPATCH:
            due = own.sum_us + own.attention_us + own.send_us
            _require(_same(_us(span), due), span, f"it takes {due:.3f} µs")
    for end in [span for span in computes if span.stage is None]:
        own = costs[end.rank][end.micro_batch]
        chunk = own.send_us + own.experts_us + own.sum_us
        due = own.first_us + own.last_us + end.layer * (own.attention_us + own.shared_us + num_chunks * chunk)
        found = sum([_us(span) for span in computes if span.micro_batch == end.micro_batch])
        _require(_same(found, due), end, f"its micro-batch computes for {found:.3f} µs, but takes {due:.3f}")


def _key(span: Span) -> Key:
    return span.micro_batch, span.layer, span.chunk, span.stage


def _us(span: Span) -> float:
    return span.end_us - span.start_us


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= _EPS_US


def _require(rule: bool, span: Span, fault: str) -> None:
    if not rule:
        raise TimelineError(f"{span}: {fault}")
