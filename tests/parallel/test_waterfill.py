"""Replicas by the step's counts: each assignment on a replica of its expert, ranks evener than by other choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector
from moe_runtime.parallel.waterfill import Waterfill
from moe_runtime.types import NOWHERE, LogicalRouting


def of_rows(row: list[int], *, num_logical: int, ep: int) -> ExpertPlacement:
    return ExpertPlacement(torch.tensor([row]), num_logical, ep)


def choose(placement: ExpertPlacement, ids: Tensor, *, rank: int = 0) -> Tensor:
    selector = placement.selector(rank, choice=ReplicaChoice.WATERFILL)
    return selector.to_physical(0, LogicalRouting(ids, torch.ones(ids.shape))).expert_ids


def of_ranks(slots: Tensor, placement: ExpertPlacement) -> list[int]:
    valid = slots[slots != NOWHERE] // placement.num_local
    return torch.bincount(valid, minlength=placement.ep).tolist()


def skewed(placement: ExpertPlacement, *, tokens: int, top_k: int, seed: int, shared: bool = False) -> list[Tensor]:
    """Each rank's `[T, K]`: the popularity of experts falls as 1/rank; with `shared` the last expert is in all rows."""
    generator = torch.Generator().manual_seed(seed)
    routed = placement.num_logical - shared
    popular = (1.0 / torch.arange(1, routed + 1))[torch.randperm(routed, generator=generator)]
    ids = []
    for _ in range(placement.ep):
        drawn = torch.multinomial(popular.expand(tokens, -1), top_k, generator=generator)
        ids.append(torch.cat([drawn, torch.full((tokens, int(shared)), routed)], dim=1))
    return ids


def test_hand_drawn() -> None:
    # Rank 0 has experts 0 and 1, rank 1 has 0 and 2. Twenty tokens for expert 1, none for 2, thirty for 0: five of
    # these to rank 0 make 25 and 25.
    placement = of_rows([0, 1, 0, 2], num_logical=3, ep=2)
    ids = torch.tensor([[1]] * 20 + [[0]] * 30)
    left, right = of_ranks(choose(placement, ids), placement)
    assert abs(left - right) <= 2, (left, right)
    assert of_ranks(placement.to_physical(0, LogicalRouting(ids, ids), ep_rank=0).expert_ids, placement) != [25, 25]


def test_nowhere_stays_and_no_tokens_are_legal() -> None:
    placement = of_rows([0, 1, 0, 2], num_logical=3, ep=2)
    slots = choose(placement, torch.tensor([[0, NOWHERE], [NOWHERE, NOWHERE], [2, 1]]))
    assert (slots == NOWHERE).tolist() == [[False, True], [True, True], [False, False]]
    assert slots[2].tolist() == [3, 1]
    assert choose(placement, torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)


def test_padding_moves_no_token() -> None:
    placement = ExpertPlacement.uniform(1, 16, ep=4, num_redundant=8)
    ids = skewed(placement, tokens=9, top_k=3, seed=1)[0]
    padded = torch.cat([ids, torch.full((5, 3), NOWHERE)])
    assert torch.equal(choose(placement, padded)[:9], choose(placement, ids))


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "with a shared expert"])
def test_ranks_are_evener_than_by_other_choices(shared: bool) -> None:
    """Busiest rank over all sources, a placement that knows nothing of the load, mean of eight draws."""
    loads = [1.0] * 32 + [8.0] * shared
    placement = ExpertPlacement.uniform(1, 32 + shared, ep=8, num_redundant=32 - shared, expected_load=loads)
    busiest = dict.fromkeys(ReplicaChoice, 0)
    for seed in range(8):
        for choice in ReplicaChoice:
            total = torch.zeros(8, dtype=torch.int64)
            for rank, ids in enumerate(skewed(placement, tokens=64, top_k=4, seed=seed, shared=shared)):
                routing = LogicalRouting(ids, torch.ones(ids.shape))
                slots = placement.selector(rank, choice=choice).to_physical(0, routing).expert_ids
                assert torch.equal(placement.phy2log[0][slots], ids)
                total += torch.tensor(of_ranks(slots, placement))
            busiest[choice] += int(total.max())
    others = [busiest[choice] for choice in ReplicaChoice if choice is not ReplicaChoice.WATERFILL]
    assert busiest[ReplicaChoice.WATERFILL] < 0.93 * min(others), busiest


def test_single_tokens_of_many_ranks_do_not_herd() -> None:
    """Each of 64 ranks has one token for an expert of 4 replicas: ranks begin at different ones."""
    placement = of_rows([0] * 4 + list(range(1, 61)), num_logical=61, ep=64)
    slots = [int(choose(placement, torch.tensor([[0]]), rank=rank)) for rank in range(64)]
    assert all(12 <= slots.count(slot) <= 20 for slot in range(4)), slots


def test_any_run_of_tokens_is_spread() -> None:
    """A dispatch may take the tokens in chunks: each is spread like the whole."""
    placement = of_rows([0, 1, 0, 2], num_logical=3, ep=2)
    slots = choose(placement, torch.zeros(64, 1, dtype=torch.int64))
    for start in range(0, 64, 8):
        assert 3 <= int((slots[start : start + 8] == 0).sum()) <= 5


def test_no_value_is_read_by_the_host() -> None:
    placement = ExpertPlacement.uniform(1, 16, ep=4, num_redundant=8)
    tables = Waterfill.build(placement, 1, device="meta")
    assert tables.choose(0, torch.empty(5, 3, dtype=torch.int64, device="meta")).shape == (5, 3)


def test_rewritten_tables_are_those_of_the_new_placement() -> None:
    old = ExpertPlacement.uniform(2, 16, ep=4, num_redundant=8)
    new = ExpertPlacement(old.phy2log[:1].roll(3, 1).contiguous(), 16, 4)
    selector = old.selector(1, choice=ReplicaChoice.WATERFILL, rewritable=True)
    before = selector.addresses
    selector.write_(1, selector.tables(new))
    ids = skewed(old, tokens=9, top_k=3, seed=3)[0]
    routing = LogicalRouting(ids, torch.ones(ids.shape))
    assert torch.equal(selector.to_physical(1, routing).expert_ids, choose(new, ids, rank=1))
    assert torch.equal(selector.to_physical(0, routing).expert_ids, choose(old, ids, rank=1))
    assert list(selector.addresses) == list(before)


def test_a_kernel_that_places_tokens_leaves_the_ids() -> None:
    placement = ExpertPlacement.uniform(1, 16, ep=4, num_redundant=8)
    selector: ReplicaSelector = placement.selector(0, choice=ReplicaChoice.WATERFILL)
    assert selector.by_counts and selector.replicas(0) is None
    assert not placement.selector(0).by_counts
    bare = ExpertPlacement.uniform(1, 16, ep=4)
    assert not bare.selector(0, choice=ReplicaChoice.WATERFILL).by_counts
