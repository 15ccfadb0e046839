"""Replica tables that are rewritten in place: they say what fresh ones say, from where the old ones were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector
from moe_runtime.types import LogicalRouting
from tests.doubles.cuda_graph import RecordedGraphs


@st.composite
def placements(draw: st.DrawFn) -> tuple[ExpertPlacement, ExpertPlacement]:
    """Two of the same slots, layers and experts."""
    ep, num_local, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, ep * num_local))
    spare = st.lists(st.integers(0, experts - 1), min_size=ep * num_local - experts, max_size=ep * num_local - experts)

    def one() -> ExpertPlacement:
        rows = [draw(st.permutations([*range(experts), *draw(spare)])) for _ in range(layers)]
        return ExpertPlacement(torch.tensor(rows), experts, ep)

    return one(), one()


def routing(selector: ReplicaSelector, layer: int, num_logical: int) -> list[list[int]]:
    """Where tokens go; the last one is padding."""
    ids = torch.cat([torch.arange(num_logical).view(-1, 1), torch.tensor([[0]]), torch.tensor([[-1]])])
    return selector.to_physical(layer, LogicalRouting(ids, torch.ones(ids.shape))).expert_ids.tolist()


@pytest.mark.parametrize("choice", list(ReplicaChoice))
@given(pair=placements(), rank=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_rewritten_tables_are_fresh_ones(
    choice: ReplicaChoice, pair: tuple[ExpertPlacement, ExpertPlacement], rank: int
) -> None:
    old, new = pair
    rank %= old.ep
    selector = old.selector(rank, choice=choice, ranks_per_node=2, rewritable=True)
    before, addresses = old.selector(rank, choice=choice, ranks_per_node=2), list(selector.addresses)
    after = new.selector(rank, choice=choice, ranks_per_node=2)
    for layer in range(old.num_layers):
        assert routing(selector, layer, old.num_logical) == routing(before, layer, old.num_logical)
        one = ExpertPlacement(new.phy2log[layer : layer + 1], new.num_logical, new.ep)
        selector.write_(layer, selector.tables(one))
        for other in range(old.num_layers):
            fresh = after if other <= layer else before
            assert routing(selector, other, old.num_logical) == routing(fresh, other, old.num_logical)
    assert list(selector.addresses) == addresses


def test_tables_that_are_not_made_for_it() -> None:
    placement = ExpertPlacement.uniform(1, 4, ep=2)
    selector = placement.selector(0)
    with pytest.raises(AssertionError, match="not made to be rewritten"):
        selector.tables(placement)
    rewritable = placement.selector(0, rewritable=True)
    with pytest.raises(AssertionError, match="not made to be rewritten"):
        selector.write_(0, rewritable.tables(placement))


@pytest.mark.parametrize("choice", list(ReplicaChoice))
def test_captured_placing_reads_rewritten_tables(choice: ReplicaChoice) -> None:
    old = ExpertPlacement(torch.tensor([[0, 1, 2, 3, 0, 1]]), 4, 3)
    new = ExpertPlacement(torch.tensor([[3, 2, 2, 2, 1, 0]]), 4, 3)
    selector = old.selector(1, choice=choice, ranks_per_node=2, rewritable=True)
    ids = torch.tensor([[0, 2], [2, 1], [3, 2], [2, 0], [-1, -1]])
    given = LogicalRouting(ids, torch.ones(ids.shape))
    graphs = RecordedGraphs()
    selector.to_physical(0, given)
    graphs.begin()
    try:
        placed = selector.to_physical(0, given).expert_ids
        graph = graphs.end()
    finally:
        graphs.abandon()
    for placement in (old, new, old):
        selector.write_(0, selector.tables(placement))
        graph.replay()
        fresh = placement.selector(1, choice=choice, ranks_per_node=2)
        assert torch.equal(placed, fresh.to_physical(0, given).expert_ids)
