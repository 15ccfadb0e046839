"""The clock of overlap: what computes and what travels at each moment of a step, from what the parts cost.

Nothing here is measured and nothing runs: times follow from costs and from the order in which a real run began its
stages (`overlap.OnStage`). A rank computes in the order of its program, one thing at a time. Transfers take turns on
the wire in the order in which they were begun; one starts when the last rank has begun it, takes as long as the slowest
rank's, and ends on all ranks at once. A micro-batch goes on when its transfer has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe_runtime.dispatch.overlap import Stage
from moe_runtime.errors import MoeRuntimeError

Turn = tuple[int, Stage | None]
"""A micro-batch and the stage that it has begun, None at its end: what `overlap.OnStage` is told."""


class TimelineError(MoeRuntimeError, ValueError):
    """Logs that no lockstep makes, or spans that break a rule of the clock."""


class Lane(StrEnum):
    """What a rank has one of."""

    COMPUTE = "compute"
    WIRE = "wire"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Microseconds that the parts of one micro-batch take on one rank."""

    first_us: float = 0.0
    """Once: the embedding, and all dense layers."""
    attention_us: float = 0.0
    """Per MoE layer: its attention and gate."""
    send_us: float = 0.0
    """Per chunk, before its dispatch: what makes tokens ready to travel."""
    shared_us: float = 0.0
    """Per MoE layer, after its first dispatch was begun: the shared expert."""
    experts_us: float = 0.0
    """Per chunk, between dispatch and combine."""
    sum_us: float = 0.0
    """Per chunk, after its combine: the sum of what came home."""
    last_us: float = 0.0
    """Once, at the end."""
    dispatch_us: float = 0.0
    """Per chunk, on the wire."""
    combine_us: float = 0.0
    """Per chunk, on the wire."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that takes a rank's lane from `start_us` to `end_us`.

    On COMPUTE: what runs before `stage` is begun (None: the micro-batch's end), or, where `beside`, right after it. On
    WIRE: the stage's transfer. `layer` counts MoE layers; the end has the number of them.
    """

    rank: int
    lane: Lane
    micro_batch: int
    layer: int
    chunk: int
    stage: Stage | None
    start_us: float
    end_us: float
    beside: bool = False

    def __str__(self) -> str:
        where = "beside" if self.beside else "before" if self.lane is Lane.COMPUTE else "of"
        return (
            f"rank {self.rank}'s {self.lane} {where} {self.stage or 'the end'} (micro-batch {self.micro_batch}, layer "
            f"{self.layer}, chunk {self.chunk}) at {self.start_us:.3f}..{self.end_us:.3f} µs"
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step. `costs[rank][micro_batch]`; `log`: the turns, the same on all ranks."""

    log: tuple[Turn, ...]
    costs: tuple[tuple[Costs, ...], ...]
    num_chunks: int
    """Dispatches of each MoE layer in a micro-batch."""
    spans: tuple[Span, ...]

    def lane(self, rank: int, lane: Lane) -> list[Span]:
        """What is on one lane, in order of time."""
        found = [span for span in self.spans if span.rank == rank and span.lane is lane]
        return sorted(found, key=lambda span: (span.start_us, span.end_us))

    @property
    def step_us(self) -> float:
        """When the last rank has finished."""
        return max(span.end_us for span in self.spans)


@dataclass(frozen=True, slots=True)
class Summary:
    """Microseconds of a step; of each rank where plural."""

    step_us: float
    serial_us: float
    """The same parts if every rank stood still while anything travels."""
    busy_us: tuple[float, ...]
    wire_us: float
    exposed_us: tuple[float, ...]
    """Transfers during which a rank does not compute."""
    waiting_us: tuple[float, ...]
    """Neither computing nor with a transfer under way: others have not begun it yet, or are not through."""


def simulate(logs: Sequence[Sequence[Turn]], costs: Sequence[Sequence[Costs]], *, num_chunks: int = 1) -> Timeline:
    """The step that `logs[rank]` and `costs[rank][micro_batch]` make.

    TimelineError where a rank's log differs from rank 0's, or is not one of whole layers of `num_chunks` dispatches.
    """
    log = _one_log(logs)
    if len(costs) != len(logs):
        raise TimelineError(f"{len(costs)} ranks' costs for {len(logs)} ranks' logs: give one row per rank")
    ranks = range(len(logs))
    computes_until = [0.0 for _ in ranks]
    wire_until = 0.0
    arrived: dict[int, float] = {}
    spans: list[Span] = []

    def compute(place: _Place, us: Sequence[float], *, beside: bool = False) -> None:
        for rank in ranks:
            if beside and not us[rank]:
                continue
            start = computes_until[rank] if beside else max(computes_until[rank], arrived.get(place.micro_batch, 0.0))
            computes_until[rank] = start + us[rank]
            spans.append(place.span(rank, Lane.COMPUTE, start, computes_until[rank], beside=beside))

    for place in _places(log, num_chunks):
        own = [costs[rank][place.micro_batch] for rank in ranks]
        compute(place, [place.compute_us(each) for each in own])
        if place.stage is None:
            continue
        start = max(*computes_until, wire_until)
        wire_until = start + max(place.wire_us(each) for each in own)
        arrived[place.micro_batch] = wire_until
        spans += [place.span(rank, Lane.WIRE, start, wire_until) for rank in ranks]
        if place.opens_layer:
            compute(place, [each.shared_us for each in own], beside=True)
    return Timeline(log, tuple([tuple(row) for row in costs]), num_chunks, tuple(spans))


def summarize(timeline: Timeline) -> Summary:
    """Where the time of a step goes."""
    step, ranks = timeline.step_us, range(len(timeline.costs))
    wires = timeline.lane(0, Lane.WIRE)
    wire = sum(span.end_us - span.start_us for span in wires)
    busy, exposed = [], []
    for rank in ranks:
        computes = timeline.lane(rank, Lane.COMPUTE)
        busy.append(sum(span.end_us - span.start_us for span in computes))
        exposed.append(wire - _both_us(computes, wires))
    waiting = [step - ours - seen for ours, seen in zip(busy, exposed, strict=True)]
    return Summary(step, _serial_us(timeline), tuple(busy), wire, tuple(exposed), tuple(waiting))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the model a turn is."""

    micro_batch: int
    stage: Stage | None
    layer: int
    chunk: int

    @property
    def opens_layer(self) -> bool:
        """It begins a layer's first dispatch."""
        return self.stage is Stage.DISPATCH and self.chunk == 0

    @property
    def is_first(self) -> bool:
        """Nothing has come home yet."""
        return self.layer == 0 and (self.opens_layer or self.stage is None)

    def compute_us(self, costs: Costs) -> float:
        """What runs before the stage is begun."""
        if self.stage is Stage.COMBINE:
            return costs.experts_us
        us = costs.first_us if self.is_first else costs.sum_us
        if self.stage is None:
            return us + costs.last_us
        return us + costs.send_us + (costs.attention_us if self.opens_layer else 0.0)

    def wire_us(self, costs: Costs) -> float:
        """What the stage takes on the wire."""
        return costs.dispatch_us if self.stage is Stage.DISPATCH else costs.combine_us

    def span(self, rank: int, lane: Lane, start_us: float, end_us: float, *, beside: bool = False) -> Span:
        return Span(rank, lane, self.micro_batch, self.layer, self.chunk, self.stage, start_us, end_us, beside)


def _one_log(logs: Sequence[Sequence[Turn]]) -> tuple[Turn, ...]:
    """The log of all ranks."""
    if not logs or not logs[0]:
        raise TimelineError("no turns: give the log of each rank's step")
    first = tuple(logs[0])
    for rank, log in enumerate(logs):
        for position, (turn, other) in enumerate(zip(first, log, strict=False)):
            if turn != other:
                raise TimelineError(f"rank {rank}, turn {position}: {_told(other)}, but rank 0 {_told(turn)}")
        if len(log) != len(first):
            raise TimelineError(
                f"rank {rank}, turn {min(len(log), len(first))}: {len(log)} turns in all, but rank 0 has {len(first)}"
            )
    return first


def _told(turn: Turn) -> str:
    return f"micro-batch {turn[0]} ends" if turn[1] is None else f"micro-batch {turn[0]} begins {turn[1]}"


def _places(log: Sequence[Turn], num_chunks: int) -> Iterator[_Place]:
    """Layer and chunk of every turn, counted per micro-batch."""
    begun: dict[int, int] = {}
    ended: set[int] = set()
    for position, (micro_batch, stage) in enumerate(log):
        count = begun.get(micro_batch, 0)
        layer, within = divmod(count, 2 * num_chunks)
        wanted = Stage.COMBINE if within % 2 else Stage.DISPATCH
        if micro_batch in ended or (stage is None and within) or (stage is not None and stage is not wanted):
            due = "nothing after its end" if micro_batch in ended else f"{wanted} of layer {layer}, {num_chunks=}"
            raise TimelineError(f"turn {position}: {_told((micro_batch, stage))}, but what is due is {due}")
        if stage is None:
            ended.add(micro_batch)
        begun[micro_batch] = count + 1
        yield _Place(micro_batch, stage, layer, within // 2)
    if missing := begun.keys() - ended:
        raise TimelineError(f"after turn {len(log) - 1}: micro-batches {sorted(missing)} have not ended")


def _both_us(computes: Sequence[Span], wires: Sequence[Span]) -> float:
    """How long both lanes are taken; each list is in order and without overlaps."""
    total, i, k = 0.0, 0, 0
    while i < len(computes) and k < len(wires):
        total += max(0.0, min(computes[i].end_us, wires[k].end_us) - max(computes[i].start_us, wires[k].start_us))
        if computes[i].end_us <= wires[k].end_us:
            i += 1
        else:
            k += 1
    return total


def _serial_us(timeline: Timeline) -> float:
    """All transfers, and between two of them the slowest rank's compute."""
    places = list(_places(timeline.log, timeline.num_chunks))
    total = 0.0
    waiting = [0.0 for _ in timeline.costs]
    for place in places:
        own = [row[place.micro_batch] for row in timeline.costs]
        waiting = [us + place.compute_us(each) for us, each in zip(waiting, own, strict=True)]
        if place.stage is None:
            continue
        if place.opens_layer:
            waiting = [us + each.shared_us for us, each in zip(waiting, own, strict=True)]
        total += max(waiting) + max(place.wire_us(each) for each in own)
        waiting = [0.0 for _ in waiting]
    return total + max(waiting)
