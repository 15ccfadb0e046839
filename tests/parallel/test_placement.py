from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement, expected_load, num_physical_experts
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_runtime.types import NOWHERE, LogicalRouting


def of_rows(rows: list[list[int]], *, num_logical: int, ep: int) -> ExpertPlacement:
    return ExpertPlacement(torch.tensor(rows), num_logical, ep)


def routing(ids: list[list[int]]) -> LogicalRouting:
    tensor = torch.tensor(ids)
    return LogicalRouting(tensor, torch.full(tensor.shape, 0.5))


@pytest.mark.parametrize(
    ("logical", "ep", "redundant", "physical"),
    [(256, 320, 0, 320), (257, 320, 63, 320), (256, 32, 32, 288), (256, 144, 0, 288), (256, 8, 1, 264), (5, 1, 0, 5)],
)
def test_number_of_slots(logical: int, ep: int, redundant: int, physical: int) -> None:
    assert num_physical_experts(logical, ep=ep, num_redundant=redundant) == physical
    assert ExpertPlacement.uniform(1, logical, ep=ep, num_redundant=redundant).num_physical == physical


def test_hand_drawn_placement() -> None:
    # rank 0: experts 2, 0; rank 1: experts 1, 2
    placement = of_rows([[2, 0, 1, 2]], num_logical=3, ep=2)
    assert placement.log2phy.tolist() == [[[1, -1], [2, -1], [0, 3]]]
    assert placement.logcnt.tolist() == [[1, 1, 2]]
    assert [placement.owner(p) for p in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert placement.local_logical(0, 1) == (1, 2)
    on_1 = placement.to_physical(0, routing([[2, 0], [1, -1]]), ep_rank=1, choice=ReplicaChoice.NEAREST)
    assert on_1.expert_ids.tolist() == [[3, 1], [2, -1]]
    on_0 = placement.to_physical(0, routing([[2, 0], [1, -1]]), ep_rank=0, choice=ReplicaChoice.NEAREST)
    assert on_0.expert_ids.tolist() == [[0, 1], [2, -1]]


def test_prefill_unit_has_eight_home_experts_and_one_redundant_on_every_rank() -> None:
    placement = ExpertPlacement.uniform(1, 256, ep=32, num_redundant=32)
    for rank in range(32):
        local = placement.local_logical(0, rank)
        assert local[:8] == tuple(range(8 * rank, 8 * rank + 8))
        assert local[8] not in local[:8]


def test_dispatched_shared_expert_gets_replicas_by_its_load() -> None:
    placement = ExpertPlacement.uniform(2, 257, ep=320, expected_load=expected_load(256, 1, top_k=8))
    assert placement.logcnt[:, 256].tolist() == [32, 32]
    assert placement.logcnt[:, :256].sum(1).tolist() == [288, 288]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 14))
def test_uniform_is_valid_and_keeps_replicas_apart(logical: int, ep: int, redundant: int) -> None:
    placement = ExpertPlacement.uniform(1, logical, ep=ep, num_redundant=redundant)
    locals_ = [placement.local_logical(0, rank) for rank in range(ep)]
    counts = placement.logcnt[0].tolist()
    assert sum(counts) == placement.num_physical
    assert max(counts) - min(counts) <= 1
    # Slots per rank <= experts and replicas per expert <= ranks is all that distinctness needs once homes are apart.
    avoidable = placement.num_local <= logical and max(counts) <= ep
    clashes = sum(len(local) - len(set(local)) for local in locals_)
    if avoidable:
        assert clashes == 0, locals_


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_maps_agree_with_each_other(data: st.DataObject) -> None:
    ep, slots = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    logical = data.draw(st.integers(1, ep * slots))
    spare = ep * slots - logical
    extra = data.draw(st.lists(st.integers(0, logical - 1), min_size=spare, max_size=spare))
    row = data.draw(st.permutations(list(range(logical)) + extra))
    placement = of_rows([list(row)], num_logical=logical, ep=ep)
    for physical, expert in enumerate(row):
        replicas = placement.log2phy[0, expert, : placement.logcnt[0, expert]].tolist()
        assert physical in replicas
        assert replicas == sorted(replicas)
        assert (placement.log2phy[0, expert, placement.logcnt[0, expert] :] == -1).all()
    again = ExpertPlacement.from_json(placement.to_json())
    assert torch.equal(again.phy2log, placement.phy2log)
    assert (again.num_logical, again.ep) == (logical, ep)

    top_k = data.draw(st.integers(1, logical))
    tokens = data.draw(st.integers(0, 6))
    ids = [data.draw(st.permutations(range(logical)))[:top_k] for _ in range(tokens)]
    logical_ids = torch.tensor(ids, dtype=torch.int64).view(tokens, top_k)
    if tokens:
        logical_ids[-1] = NOWHERE
    weights = torch.rand(tokens, top_k)
    for choice in ReplicaChoice:
        rank = data.draw(st.integers(0, ep - 1))
        chosen = placement.selector(rank, choice=choice, ranks_per_node=2).to_physical(
            0, LogicalRouting(logical_ids, weights)
        )
        assert chosen.weights is weights
        back = torch.tensor([*row, NOWHERE])[chosen.expert_ids]
        assert torch.equal(back, logical_ids)
        for token in chosen.expert_ids[:-1].tolist():
            assert len(set(token)) == len(token)


def test_ids_pass_through_where_slots_are_experts() -> None:
    placement = ExpertPlacement.uniform(1, 8, ep=4)
    ids = routing([[3, 1], [7, -1]])
    assert placement.selector(2).to_physical(0, ids).expert_ids is ids.expert_ids


def test_round_robin_takes_turns_by_token_and_k() -> None:
    placement = of_rows([[0, 1, 0, 1, 0, 1]], num_logical=2, ep=3)
    selector = placement.selector(0, choice=ReplicaChoice.ROUND_ROBIN)
    chosen = selector.to_physical(0, routing([[0, 1]] * 4)).expert_ids
    assert chosen.tolist() == [[0, 3], [2, 5], [4, 1], [0, 3]]


def test_nearest_prefers_rank_then_node() -> None:
    # One slot per rank, two ranks per node: expert 0 on ranks 0, 3, 4; expert 1 on ranks 1, 2, 5.
    placement = of_rows([[0, 1, 1, 0, 0, 1]], num_logical=2, ep=6)
    chosen = [
        placement.selector(rank, choice=ReplicaChoice.NEAREST, ranks_per_node=2).fixed[0, :2].tolist()
        for rank in range(6)
    ]
    assert chosen == [[0, 1], [0, 1], [3, 2], [3, 2], [4, 5], [4, 5]]


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_static_spreads_ranks_over_replicas(stride: int, replicas: int) -> None:
    placement = of_rows([[0] * replicas + [1] * (320 - replicas)], num_logical=2, ep=320)
    ranks = range(0, 320, stride)
    chosen = [int(placement.selector(rank).fixed[0, 0]) for rank in ranks]
    counts = [chosen.count(slot) for slot in range(replicas)]
    assert max(counts) - min(counts) <= 4, counts


def test_file_round_trip_and_misfits(tmp_path: Path) -> None:
    placement = ExpertPlacement.uniform(3, 6, ep=4, num_redundant=2)
    path = tmp_path / "my placement,v=2.json"
    path.write_text(placement.to_json())
    loaded = ExpertPlacement.from_file(path, num_layers=3, num_logical=6, ep=4)
    assert torch.equal(loaded.phy2log, placement.phy2log)
    with pytest.raises(ConfigError, match=r"ep=4, but this run has ep=8.*Run with ep=4"):
        ExpertPlacement.from_file(path, num_layers=3, num_logical=6, ep=8)
    with pytest.raises(ConfigError, match="num_layers=3, but this run has num_layers=58"):
        ExpertPlacement.from_file(path, num_layers=58, num_logical=6, ep=4)
    with pytest.raises(ConfigError, match="cannot be read"):
        ExpertPlacement.from_file(tmp_path / "none.json", num_layers=3, num_logical=6, ep=4)


GOOD = {"version": 1, "num_layers": 1, "num_logical_experts": 2, "ep": 2, "phy2log": [[0, 1]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "exactly the keys"),
        (json.dumps({**GOOD, "extra": 1}), "exactly the keys"),
        ('{"version": 1, "version": 1}', "'version' appears twice"),
        (json.dumps({**GOOD, "version": 2}), "version=2; this program reads version 1"),
        (json.dumps({**GOOD, "ep": True}), "ep=True; must be an integer"),
        (json.dumps({**GOOD, "ep": 0}), "ep=0; must be an integer of at least 1"),
        (json.dumps({**GOOD, "phy2log": [[0, 1], [0, 1]]}), "phy2log has 2 layers"),
        (json.dumps({**GOOD, "phy2log": [[0, 1.0]]}), "list of integers"),
        (json.dumps({**GOOD, "phy2log": [[0, 2]]}), "slot 1 of layer 0 names expert 2; must lie in 0..1"),
        (json.dumps({**GOOD, "phy2log": [[0, -1]]}), "names expert -1"),
        (json.dumps({**GOOD, "phy2log": [[0, 2**80]]}), "no expert id"),
        (json.dumps({**GOOD, "phy2log": [[0, 0]]}), "logical expert 1 has no slot in layer 0"),
        ("[" * 100_000, "not a JSON object"),
        (json.dumps({**GOOD, "num_logical_experts": 10**12}), "2 slots for 1000000000000 logical experts"),
        (json.dumps({**GOOD, "phy2log": [[0, 1, 1]]}), r"3 slots do not divide among ep=2 ranks. Use 2 or 4"),
        (
            json.dumps({**GOOD, "num_layers": 2, "phy2log": [[0, 1], [0, 1, 0, 1]]}),
            "layer 1 has 4 slots and layer 0 has 2",
        ),
    ],
)
def test_bad_files_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertPlacement.from_json(text)
