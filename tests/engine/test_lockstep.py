"""agree: one pure function, the same step on every rank; and the spreading of requests over DP groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.lockstep import (
    AgreedStep,
    GroupBalancer,
    LockstepLimits,
    Padding,
    Wish,
    agree,
    choose_group,
    default_graph_sizes,
    graph_sizes,
)
from moe_runtime.errors import ConfigError


def tokens(*counts: int, decode: bool = False) -> list[Wish]:
    return [Wish(num_tokens=count, num_decode_tokens=count if decode else 0) for count in counts]


def test_padding_policies() -> None:
    mixed, decode = tokens(5, 0, 2), tokens(5, 0, 2, decode=True)
    own = LockstepLimits(tp=4, padding=Padding.OWN)
    most = LockstepLimits(tp=4, padding=Padding.MAX)
    assert agree(mixed, limits=own).padded_tokens == (8, 0, 4)
    assert agree(mixed, limits=most).padded_tokens == (8, 8, 8)
    assert agree(decode, limits=LockstepLimits(tp=4)).padded_tokens == (8, 0, 4)


def test_phases() -> None:
    limits = LockstepLimits()
    assert agree(tokens(0, 0), limits=limits).phase is Phase.IDLE
    assert agree(tokens(3, 0, decode=True), limits=limits).phase is Phase.DECODE
    assert agree([*tokens(3, decode=True), *tokens(1)], limits=limits).phase is Phase.MIXED


def test_chunks_are_even_and_under_the_cap() -> None:
    limits = LockstepLimits(tp=2, max_tokens=7, max_decode_tokens=3)
    step = agree(tokens(16, 3), limits=limits)
    assert (step.capacity, step.num_chunks, step.chunk_tokens) == (8, 2, 4)
    decode = agree(tokens(16, 3, decode=True), limits=limits)
    assert (decode.capacity, decode.num_chunks, decode.chunk_tokens) == (8, 3, 3)
    with pytest.raises(ConfigError, match=r"most tokens of a dispatch \(0, None\): all must be at least 1"):
        LockstepLimits(max_tokens=0)


def test_decode_steps_take_the_size_of_a_graph() -> None:
    limits = LockstepLimits(tp=2, graph_sizes=(2, 4, 8), max_decode_tokens=3)
    assert limits.captured_sizes == (2, 4), "8 rows take two turns"
    cut = LockstepLimits(tp=2, graph_sizes=(2, 4, 8), max_decode_tokens=3, two_batch_decode_tokens=8)
    assert cut.captured_sizes == (2, 4, 8), "as two micro-batches they fit"
    step = agree(tokens(3, 0, 1, decode=True), limits=limits)
    assert (step.padded_tokens, step.graph, step.capacity, step.num_chunks) == ((4, 4, 4), True, 2, 1)
    assert not agree(tokens(3, 0, 1), limits=limits).graph, "prompts"
    assert not agree(tokens(0, 0, decode=True), limits=limits).graph, "idle"
    larger = agree(tokens(5, 0, 1, decode=True), limits=limits)
    assert (larger.padded_tokens, larger.graph) == ((6, 0, 2), False)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    wanted=st.lists(st.integers(1, 600), min_size=1, max_size=30),
    most=st.integers(1, 600),
    tp=st.sampled_from([1, 2, 4, 8, 3]),
)
def test_graph_sizes(wanted: list[int], most: int, tp: int) -> None:
    sizes = graph_sizes(wanted, most=most, tp=tp)
    assert list(sizes) == sorted(set(sizes)) and sizes
    assert {-(-size // tp) * tp for size in wanted} >= set(sizes)
    assert all(size < most for size in sizes[:-1]), "a size that no step takes"
    assert sizes[-1] >= min(most, max(wanted))
    usual = default_graph_sizes(most)
    assert usual[-1] >= most and graph_sizes(usual, most=most, tp=1) == usual
    assert all(large - small <= 16 for small, large in pairwise(usual))


def test_usual_graph_sizes() -> None:
    assert default_graph_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert default_graph_sizes(3) == (1, 2, 4)
    assert default_graph_sizes(300)[-4:] == (256, 272, 288, 304)
    for wrong in ([], [0, 4], [-1]):
        with pytest.raises(ConfigError, match=r"engine.cuda_graph_sizes=.* at least 1.*cuda_graphs=off"):
            graph_sizes(wrong, most=8, tp=1)


def test_groups_at_different_steps_are_named() -> None:
    with pytest.raises(ValueError, match="group 1 at 6, the others at 7"):
        agree([Wish(step=7), Wish(step=6), Wish(step=7)], limits=LockstepLimits())


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Wish], LockstepLimits]:
    wishes: list[Wish] = []
    for _ in range(draw(st.integers(1, 9))):
        count = draw(st.integers(0, 40) | st.just(0))
        decode = draw(st.sampled_from([0, count]) | st.integers(0, count))
        wishes.append(Wish(3, count, decode, draw(st.integers(0, 99))))
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    sizes = tuple(tp * size for size in sorted(draw(st.sets(st.integers(1, 20), max_size=4))))
    limits = LockstepLimits(
        tp=tp,
        padding=draw(st.sampled_from(Padding)),
        graph_sizes=sizes,
        max_tokens=draw(st.none() | st.integers(1, 40)),
        max_decode_tokens=draw(st.none() | st.integers(1, 20)),
    )
    return wishes, limits


@settings(deadline=None, derandomize=True, max_examples=300)
@given(world=worlds())
def test_laws(world: tuple[list[Wish], LockstepLimits]) -> None:
    wishes, limits = world
    step = agree(wishes, limits=limits)
    assert agree([tuple(wish) for wish in wishes], limits=limits) == step, "as rows of the control plane"
    assert step.num_tokens == sum(wish.num_tokens for wish in wishes)
    assert step.idle == tuple(group for group, wish in enumerate(wishes) if wish.num_tokens == 0)
    assert step.outstanding == tuple(wish.outstanding for wish in wishes)
    for wish, padded in zip(wishes, step.padded_tokens, strict=True):
        assert padded >= wish.num_tokens
        assert padded % limits.tp == 0
        assert step.graph or padded < max(other.num_tokens for other in wishes) + limits.tp
    assert step.capacity * limits.tp == max(step.padded_tokens)
    check_chunks(step, limits)
    assert (step.phase is Phase.IDLE) == (step.num_tokens == 0) == (step.capacity == 0)

    check_graph(step, wishes, limits)


def check_graph(step: AgreedStep, wishes: list[Wish], limits: LockstepLimits) -> None:
    most = max(wish.num_tokens for wish in wishes)
    fitting = [size for size in limits.captured_sizes if size >= most]
    assert step.graph == bool(step.phase is Phase.DECODE and fitting)
    if step.graph:
        assert set(step.padded_tokens) == {min(fitting)}, "idle groups too"
        assert step.num_chunks == 1
        assert set(step.padded_tokens) <= set(limits.captured_sizes), "what nobody has captured is never replayed"


def check_chunks(step: AgreedStep, limits: LockstepLimits) -> None:
    assert step.chunk_tokens >= 1
    assert step.num_chunks * step.chunk_tokens >= step.capacity
    assert (step.num_chunks - 1) * step.chunk_tokens < max(step.capacity, 1), "no turn is empty"
    limit = limits.max_tokens if step.phase is Phase.MIXED else limits.max_decode_tokens
    assert limit is None or step.chunk_tokens <= limit


@settings(deadline=None, derandomize=True, max_examples=100)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
def test_who_is_where_does_not_matter(counts: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(counts))))
    limits = LockstepLimits(tp=2)
    step, other = agree(tokens(*counts), limits=limits), agree(tokens(*[counts[i] for i in order]), limits=limits)
    assert other.padded_tokens == tuple(step.padded_tokens[i] for i in order)
    assert (other.capacity, other.num_chunks, other.phase) == (step.capacity, step.num_chunks, step.phase)


def test_requests_go_where_least_is_outstanding() -> None:
    assert choose_group([3, 1, 1]) == 1
    balancer = GroupBalancer(3)
    assert [balancer.assign(10) for _ in range(3)] == [0, 1, 2]
    assert balancer.assign(1) == 0
    balancer.report([9, 5, 7], [0, 0, 0])
    assert [balancer.assign(4), balancer.assign(4)] == [1, 2]
    balancer.report([9, 5, 7], [0, 4, 4])
    assert [balancer.assign(1), balancer.assign(1)] == [0, 1], "what came too late for that step counts on"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), groups=st.integers(1, 8))
def test_balancer_stays_within_one_request(sizes: list[int], groups: int) -> None:
    balancer = GroupBalancer(groups)
    load = [0] * groups
    for size in sizes:
        load[balancer.assign(size)] += size
    assert max(load) - min(load) <= max(sizes)
