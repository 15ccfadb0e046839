"""The clock of overlap: times by hand, rules that mutants break, logs that no lockstep makes, the picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.dispatch import timeline as clock
from moe_runtime.dispatch.overlap import Stage, Stages, interleave
from moe_runtime.dispatch.timeline import Costs, Lane, Span, Timeline, TimelineError, Turn, simulate, summarize
from moe_runtime.dispatch.timeline_check import check
from moe_runtime.dispatch.timeline_text import render

D, C = Stage.DISPATCH, Stage.COMBINE
COSTS = Costs(
    first_us=5, attention_us=10, send_us=1, shared_us=3, experts_us=9, sum_us=1, last_us=2, dispatch_us=8, combine_us=12
)  # fmt: skip
SLOW = replace(COSTS, attention_us=12, experts_us=14, dispatch_us=10)


def stages(dispatches: int) -> Stages[None]:
    for _ in range(dispatches):
        yield D
        yield C


def turns(micro_batches: int, dispatches: int) -> list[Turn]:
    log: list[Turn] = []
    interleave([stages(dispatches) for _ in range(micro_batches)], lambda *turn: log.append(turn))
    return log


def one_after_the_other(log: list[Turn]) -> list[Turn]:
    """Micro-batch 0 to its end first."""
    return sorted(log, key=lambda turn: turn[0])


def uneven() -> Timeline:
    """Three ranks, one slow; two micro-batches, the second one empty on a rank; two layers of two chunks."""
    costs = [[COSTS, COSTS], [SLOW, COSTS], [COSTS, Costs(dispatch_us=1, combine_us=1)]]
    return simulate([turns(2, 4)] * 3, costs, num_chunks=2)


def times(timeline: Timeline, rank: int, lane: Lane) -> list[tuple[float, float]]:
    return [(span.start_us, span.end_us) for span in timeline.lane(rank, lane)]


def test_one_micro_batch_by_hand() -> None:
    found = simulate([turns(1, 1)], [[COSTS]])
    assert times(found, 0, Lane.COMPUTE) == [(0, 16), (16, 19), (24, 33), (45, 48)]
    assert times(found, 0, Lane.WIRE) == [(16, 24), (33, 45)]
    assert [span.beside for span in found.lane(0, Lane.COMPUTE)] == [False, True, False, False]
    check(found)
    summary = summarize(found)
    assert (summary.step_us, summary.serial_us) == (48, 51)  # the shared expert's 3 µs are hidden
    assert (summary.busy_us, summary.wire_us, summary.exposed_us, summary.waiting_us) == ((31,), 20, (17,), (0,))


def test_two_micro_batches_by_hand() -> None:
    """The second's attention fills the first's dispatch; its dispatch waits for the wire's turn."""
    found = simulate([turns(2, 1)], [[replace(COSTS, dispatch_us=20)] * 2])
    assert times(found, 0, Lane.COMPUTE) == [
        (0, 16), (16, 19), (19, 35), (35, 38), (38, 47), (56, 65), (68, 71), (80, 83),
    ]  # fmt: skip
    assert times(found, 0, Lane.WIRE) == [(16, 36), (36, 56), (56, 68), (68, 80)]
    check(found)


def test_a_slow_rank_shows() -> None:
    found = simulate([turns(1, 1)] * 2, [[COSTS], [SLOW]])
    assert times(found, 0, Lane.WIRE) == times(found, 1, Lane.WIRE) == [(18, 28), (42, 54)]
    check(found)
    summary = summarize(found)
    assert list(summary.waiting_us) == [5, 0]  # after 9 µs of experts for the others' 14
    assert list(summary.exposed_us) == [21, 19]  # of 22: the shared expert hides 1 of the dispatch, and all its 3


def test_chunks_and_uneven_ranks() -> None:
    found = uneven()
    check(found)
    places = [(s.layer, s.chunk, s.stage) for s in found.lane(1, Lane.COMPUTE) if s.micro_batch == 1 and not s.beside]
    assert places == [(layer, chunk, stage) for layer in (0, 1) for chunk in (0, 1) for stage in (D, C)] + [
        (2, 0, None)
    ]
    besides = [span for span in found.lane(2, Lane.COMPUTE) if span.beside]
    assert [(span.micro_batch, span.layer) for span in besides] == [(0, 0), (0, 1)], "none where there are no tokens"


def test_turns_one_after_the_other_gain_nothing() -> None:
    costs = [[replace(COSTS, shared_us=0)] * 2] * 2
    log = turns(2, 5)
    good, bad = (simulate([each] * 2, costs) for each in (log, one_after_the_other(log)))
    check(bad)
    assert summarize(bad).step_us == summarize(bad).serial_us == summarize(good).serial_us
    assert good.step_us < 0.7 * bad.step_us


def swapped(log: list[Turn]) -> list[Turn]:
    return [(1 - micro_batch, stage) for micro_batch, stage in log]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (swapped, "rank 2, turn 0: micro-batch 1 begins dispatch, but rank 0 micro-batch 0 begins dispatch"),
        (lambda log: [*log[:4], log[5], log[4], *log[6:]], "rank 2, turn 4: "),
        (lambda log: log[:-1], "rank 2, turn 9: 9 turns in all, but rank 0 has 10"),
        (
            lambda log: [*log[:-1], (1, D)],
            "rank 2, turn 9: micro-batch 1 begins dispatch, but rank 0 micro-batch 1 ends",
        ),
    ],
)
def test_a_rank_of_its_own(change: Callable[[list[Turn]], list[Turn]], where: str) -> None:
    log = turns(2, 2)
    with pytest.raises(TimelineError, match=where):
        simulate([log, log, change(log), log], [[COSTS] * 2] * 4)


@pytest.mark.parametrize(
    ("log", "chunks", "fault"),
    [
        ([(0, C)], 1, "turn 0: micro-batch 0 begins combine, but what is due is dispatch of layer 0"),
        ([(0, D), (0, D)], 1, "turn 1: micro-batch 0 begins dispatch, but what is due is combine"),
        ([(0, D), (0, C), (0, None)], 2, "turn 2: micro-batch 0 ends, but what is due is dispatch of layer 0"),
        ([(0, None), (0, D)], 1, "turn 1: .* nothing after its end"),
        ([(0, D), (1, None), (0, C)], 1, r"micro-batches \[0\] have not ended"),
        ([], 1, "no turns"),
    ],
)
def test_logs_of_no_layers(log: list[Turn], chunks: int, fault: str) -> None:
    with pytest.raises(TimelineError, match=fault):
        simulate([log], [[COSTS] * 2], num_chunks=chunks)
    with pytest.raises(TimelineError, match="1 ranks' costs for 2 ranks' logs"):
        simulate([turns(1, 1)] * 2, [[COSTS]])


us = st.sampled_from([0.0, 0.1, 1.0, 3.7, 20.0])
costs_of_ranks = st.integers(1, 3).flatmap(
    lambda micro_batches: st.lists(
        st.lists(
            st.builds(
                Costs, first_us=us, attention_us=us, send_us=us, shared_us=us, experts_us=us, sum_us=us, last_us=us,
                dispatch_us=us, combine_us=us,
            ),
            min_size=micro_batches, max_size=micro_batches,
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=150)
@given(costs=costs_of_ranks, layers=st.integers(0, 3), chunks=st.integers(1, 3))
def test_any_costs(costs: list[list[Costs]], layers: int, chunks: int) -> None:
    found = simulate([turns(len(costs[0]), layers * chunks)] * len(costs), costs, num_chunks=chunks)
    check(found)
    summary = summarize(found)
    assert max(*summary.busy_us, summary.wire_us) - 1e-6 <= summary.step_us <= summary.serial_us + 1e-6
    assert all(value >= -1e-6 for values in (summary.exposed_us, summary.waiting_us) for value in values)


# Mutants: of the clock's source


def mutated(old: str, new: str) -> Timeline:
    """`uneven()` by the clock with a piece of its source exchanged."""
    source = "\n".join(inspect.getsource(part) for part in (clock._Place, clock._places, clock.simulate))
    assert source.count(old) >= 1, old
    names = dict(vars(clock))
    exec(source.replace(old, new), names)  # noqa: S102
    logs, timeline = [list(uneven().log)] * 3, uneven()
    made = names["simulate"](logs, timeline.costs, num_chunks=2)
    assert isinstance(made, Timeline)
    return made


SOURCE_MUTANTS = [
    ("start = max(*computes_until, wire_until)", "start = max(computes_until)", "it starts during"),
    ("start = max(*computes_until, wire_until)", "start = max(computes_until[0], wire_until)", "the last rank begins"),
    ("start = max(*computes_until, wire_until)", "start = max(*computes_until, wire_until) + 1", "it could start at"),
    ("max(computes_until[rank], arrived.get(place.micro_batch, 0.0))", "computes_until[rank]", "waits for arrives"),
    ("max(computes_until[rank], arrived.get", "max(0.0, arrived.get", "it starts during|what is due there"),
    ("arrived.get(place.micro_batch, 0.0)", "arrived.get(0, 0.0)", "waits for arrives|it could start"),
    ("arrived.get(place.micro_batch, 0.0)", "wire_until", "it could start"),
    ("start = computes_until[rank] if beside", "start = wire_until if beside", "it could start"),
    ("wire_until = start + max(", "wire_until = start + min(", "it takes"),
    ("if beside and not us[rank]:", "if beside:", "what is due there"),
    ("each.shared_us for each in own", "0.5 * each.shared_us for each in own", "it takes"),
    ("return costs.dispatch_us if", "return costs.combine_us if", "it takes"),
    ("self.stage is Stage.COMBINE:\n            return costs.experts_us", "0:\n            ...", "it takes"),
    ("return us + costs.last_us", "return us", "its micro-batch computes for"),
    ("costs.first_us if self.is_first", "costs.first_us if self.layer == 0", "its micro-batch computes for"),
    ("costs.attention_us if self.opens_layer else 0.0", "costs.attention_us", "its micro-batch computes for"),
    ("yield _Place(micro_batch, stage, layer, within // 2)", "yield _Place(micro_batch, stage, 0, within // 2)", "due"),
    ("yield _Place(micro_batch, stage, layer, within // 2)", "yield _Place(micro_batch, stage, layer, 0)", "due"),
    ("range(len(logs))", "range(len(logs) - 1)", "spans are due"),
]


@pytest.mark.parametrize(
    ("old", "new", "fault"), SOURCE_MUTANTS, ids=[f"{old[:30]} -> {new[:40]}" for old, new, _ in SOURCE_MUTANTS]
)
def test_a_wrong_clock_is_noticed(old: str, new: str, fault: str) -> None:
    with pytest.raises(TimelineError, match=fault) as caught:
        check(mutated(old, new))
    assert "rank" in str(caught.value)


def test_the_right_clock_is_not() -> None:
    check(mutated("wire_until", "wire_until"))


# Mutants: of the spans


def moved(span: Span) -> list[Span]:
    return [replace(span, start_us=span.start_us + 0.5, end_us=span.end_us + 0.5)]


SPAN_MUTANTS: dict[str, Callable[[Span], list[Span]]] = {
    "later": moved,
    "earlier": lambda s: [replace(s, start_us=s.start_us - 0.5, end_us=s.end_us - 0.5)],
    "longer": lambda s: [replace(s, end_us=s.end_us + 0.5)],
    "shorter": lambda s: [replace(s, end_us=s.end_us - 0.5)],
    "gone": lambda s: [],
    "twice": lambda s: [s, s],
    "of the other micro-batch": lambda s: [replace(s, micro_batch=1 - s.micro_batch)],
    "of another layer": lambda s: [replace(s, layer=s.layer + 1)],
    "of another chunk": lambda s: [replace(s, chunk=1 - s.chunk)],
    "of another rank": lambda s: [replace(s, rank=(s.rank + 1) % 3)],
    "of no rank": lambda s: [replace(s, rank=3)],
    "of another stage": lambda s: [replace(s, stage=C if s.stage is D else D)],
    "on the other lane": lambda s: [replace(s, lane=Lane.WIRE if s.lane is Lane.COMPUTE else Lane.COMPUTE)],
    "beside": lambda s: [replace(s, beside=not s.beside)],
}


@pytest.mark.parametrize("name", SPAN_MUTANTS)
def test_a_wrong_span_is_noticed(name: str) -> None:
    """Whichever span it is."""
    timeline = uneven()
    for at, span in enumerate(timeline.spans):
        spans = [*timeline.spans[:at], *SPAN_MUTANTS[name](span), *timeline.spans[at + 1 :]]
        with pytest.raises(TimelineError, match=r"rank \d"):
            check(replace(timeline, spans=tuple(spans)))


def test_all_transfers_later_are_noticed() -> None:
    """Everything from a transfer on moves by the same time on every rank: legal, but idle for no reason."""
    timeline = uneven()
    from_us = timeline.lane(0, Lane.WIRE)[4].start_us
    spans = [moved(span)[0] if span.start_us >= from_us else span for span in timeline.spans]
    with pytest.raises(TimelineError, match="it could start at"):
        check(replace(timeline, spans=tuple(spans)))


# The picture


def test_picture() -> None:
    found = simulate([turns(2, 3)], [[COSTS, COSTS]])
    assert render(found, layers=range(1, 2), width=72) == "\n".join(
        [
            "rank 0, 59.0..122.0 µs of 176.0, a column is 1.00",
            "layer    1",
            "compute |A0----------S0-A1----------S1-E0-------E1-------...A0----------",
            "wire    |C1==========D0======.......D1======....C0==========C1==========",
        ]
    )
    end = render(found, layers=range(2, 4), width=80)
    assert "Z0" in end and "Z1" in end and end == render(found, layers=range(2, 4), width=80)


@pytest.mark.parametrize("width", [40, 41, 77, 200])
def test_picture_keeps_its_width(width: int) -> None:
    found = uneven()
    for rank in range(3):
        text = render(found, layers=range(3), rank=rank, width=width).splitlines()
        assert max(len(line) for line in text) == width and len(text) == 4


@pytest.mark.parametrize(
    ("layers", "rank", "width", "fault"),
    [
        (range(1), 0, 39, "width=39: a picture takes at least 40"),
        (range(9), 0, 80, r"layers 0\.\.2"),
        (range(0), 0, 80, "layers"),
        (range(1), 3, 80, r"rank 3, .* ranks 0\.\.2"),
    ],
)
def test_no_picture(layers: range, rank: int, width: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        render(uneven(), layers=layers, rank=rank, width=width)
