"""The expert-load tool's numbers: against hand-made routes, brute force, and one another."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_tools.expert_load import analysis, pictures
from moe_tools.expert_load.analysis import balance_of, candidates, hot_experts, predicted_rank_loads, spans
from moe_tools.expert_load.document import make_document
from moe_tools.expert_load.facts import Facts, facts_of, find_model
from moe_tools.expert_load.pairs import pairs
from moe_tools.expert_load.planning import compare, make_plan
from moe_tools.expert_load.summary import show_comparison, show_summary
from moe_tools.expert_load.traffic import Traffic, by_node

from moe_runtime.balance.planner import rank_loads
from moe_runtime.balance.replay import replay
from moe_runtime.cli.console import PlainConsole
from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from tests.tools.expert_load_traces import (
    EP,
    EXPERTS,
    LAYERS,
    TOKENS,
    TOP_K,
    WINDOWS,
    homes,
    random_routes,
    without_placement,
    write_trace,
)

SPARE = ExpertPlacement.uniform(
    LAYERS, EXPERTS, ep=EP, num_redundant=EP, expected_load=[1 / (n + 1) for n in range(EXPERTS)]
)


def test_balancedness_by_hand() -> None:
    assert balance_of(np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]])).tolist() == [1.0, 2 / 3, 1.0]


def test_replay_gives_what_was_counted(tmp_path: Path) -> None:
    """Also under replicas: the trace's rows were counted token by token, by another route."""
    trace = write_trace(tmp_path, placement=SPARE)
    found = replay(trace, SPARE)
    sent = Traffic.replayed(found, 2)
    assert found.rank_loads.tolist() == trace.rank_loads.tolist()
    assert sent.ranks.sum() == trace.total_loads.sum() == WINDOWS * TOKENS * LAYERS * TOP_K
    assert sent.ranks.sum(axis=0).tolist() == trace.rank_loads.sum((0, 1)).tolist()
    assert sent.ranks.sum(axis=1).tolist() == (homes().bincount() * WINDOWS * LAYERS * TOP_K).tolist()


def test_traffic_by_brute_force(tmp_path: Path) -> None:
    """One row per assignment, once per rank, once per node; the sender's own rank and node left out."""
    trace = write_trace(tmp_path)
    sent = Traffic.replayed(replay(trace, ExpertPlacement.uniform(LAYERS, EXPERTS, ep=EP)), 2)
    off = per_rank = per_node = 0
    for home, route in zip(trace.home.tolist(), trace.routes.tolist(), strict=True):
        for experts in route:
            owners = [expert * EP // EXPERTS for expert in experts]
            off += sum(owner != home for owner in owners)
            per_rank += len(set(owners) - {home})
            per_node += len({owner // 2 for owner in owners} - {home // 2})
    assert (sent.off_rank, sent.to_ranks, sent.to_nodes) == (off, per_rank, per_node)
    assert per_node < per_rank < off


def test_between_nodes() -> None:
    matrix = np.arange(9).reshape(3, 3)
    assert by_node(matrix, 2).tolist() == [[0 + 1 + 3 + 4, 2 + 5], [6 + 7, 8]]


def test_prediction_is_exact_with_all_routes_only(tmp_path: Path) -> None:
    trace, bare = write_trace(tmp_path / "a"), write_trace(tmp_path / "b", with_routes=False)
    assert predicted_rank_loads(trace, SPARE, ReplicaChoice.STATIC)[1] is True
    rows, exact = predicted_rank_loads(bare, SPARE, ReplicaChoice.STATIC)
    assert not exact
    assert np.array_equal(rows, rank_loads(trace.loads, SPARE).numpy())


def test_plain_placement_is_its_own_counterfactual(tmp_path: Path) -> None:
    none, recorded = candidates(write_trace(tmp_path), None)
    assert none.rank_loads.tolist() == recorded.rank_loads.tolist()
    assert 0 < recorded.used < 1
    assert recorded.slowest == pytest.approx(1 / recorded.used)


def test_hot_experts(tmp_path: Path) -> None:
    trace = write_trace(tmp_path)
    first, *rest = hot_experts(trace, trace.header.placement(), 5)
    load = trace.total_loads
    assert load[first.layer, first.expert] == first.tokens
    assert first.times == pytest.approx(float((load.double() / load.double().mean(1, keepdim=True)).max()))
    assert all(a.times >= b.times for a, b in pairwise([first, *rest]))
    assert first.ranks == (first.expert * EP // EXPERTS,)


def test_pairs_find_what_belongs_together() -> None:
    routes = random_routes().flatten(0, 1).numpy()
    found = pairs(routes, 0, EXPERTS, shown=4, top=3)
    assert found.top[0][:2] == (0, 1)
    both = int(((routes[:, 0] == 0).any(1) & (routes[:, 0] == 1).any(1)).sum())
    assert found.top[0][2] == both
    place = [found.experts.index(expert) for expert in (0, 1)]
    assert found.together[place[0], place[1]] == both


@pytest.mark.parametrize("seed", range(3))
def test_independent_choices_are_no_pairs(seed: int) -> None:
    routes = np.random.default_rng(seed).random((3000, 1, 256)).argsort(axis=-1)[..., :8].astype(np.int16)
    assert pairs(routes, 0, 256, shown=4, top=12).top == ()
    routes[:40, 0, :2] = [3, 4]
    assert [pair[:2] for pair in pairs(routes, 0, 256, shown=4, top=12).top] == [(3, 4)]


def test_pairs_ignore_what_goes_nowhere() -> None:
    routes = np.full((20, 1, 2), -1, dtype=np.int16)
    routes[:, 0, 0] = 3
    found = pairs(routes, 0, 8, shown=2, top=3)
    assert found.top == ()
    assert found.experts[0] == 3
    assert found.together[0, 0] == 20


@pytest.mark.parametrize(("count", "most"), [(1, 5), (7, 3), (5, 5), (200, 120)])
def test_spans_cover_all(count: int, most: int) -> None:
    found = spans(count, most)
    assert len(found) == min(count, most)
    assert [found[0][0], found[-1][1]] == [0, count]
    assert all(a[1] == b[0] for a, b in pairwise(found))


def test_document_adds_up(tmp_path: Path) -> None:
    trace = write_trace(tmp_path)
    document = make_document(trace, plan=make_plan(trace), plan_name="A plan", facts=Facts(256, 1000))
    data = document.data
    assignments = int(trace.loads.sum())
    assert sum(map(sum, data["expert_load"])) == assignments
    assert data["tokens"] == WINDOWS * TOKENS
    for own in document.candidates:
        sent = data["traffic"][own.key]
        assert sent["exact"] and sent["total"] == assignments * 256
        received = (own.rank_loads.sum(axis=(0, 1)) * 256).tolist()
        assert np.sum(sent["ranks"], axis=0).tolist() == received, "what is sent to a rank is what it receives"
        assert sent["busiest"] == max(rows - sent["ranks"][rank][rank] for rank, rows in enumerate(received))
    assert data["traffic"]["plan"]["busiest"] < data["traffic"]["recorded"]["busiest"]
    assert [own["key"] for own in data["placements"]] == ["none", "recorded", "plan"]
    for own in data["placements"]:
        assert sum(map(sum, own["rank_load"])) == pytest.approx(assignments)
    assert data["plan"]["rank_bytes"] == data["plan"]["slots"] * LAYERS * 1000
    assert document.plan is not None
    assert document.plan.used > document.recorded.used


def test_document_without_routes_or_placement_or_model(tmp_path: Path) -> None:
    trace = without_placement(write_trace(tmp_path, with_routes=False))
    data = make_document(trace, plan=None, plan_name="", facts=None).data
    assert data["pairs"]["missing"]
    assert not data["traffic"]["recorded"]["exact"]
    assert data["traffic"]["recorded"]["once_per_rank"] is None
    assert data["traffic"]["unit"] == "rows"
    assert data["plan"] is None


def test_bytes_of_the_demo_model() -> None:
    """Hidden 128 and width 32 in fp32 on a CPU: 512 bytes a row, three matrices an expert."""
    config = RuntimeConfig(model="demo")
    model = find_model(config)
    assert model is not None and facts_of(config, model) == Facts(512, 3 * 128 * 32 * 4)
    assert find_model(RuntimeConfig(model="not here")) is None


def test_plan_for_the_recorded_slots_moves_within_its_budget(tmp_path: Path) -> None:
    trace = write_trace(tmp_path)
    before = trace.header.placement()
    assert before is not None
    plan = make_plan(trace, num_redundant=0, move_budget=4)
    assert 0 < int((before.phy2log != plan.phy2log).sum()) <= 4
    assert make_plan(trace).num_physical == EXPERTS + EP
    assert make_plan(trace, ep=8, num_redundant=0).ep == 8
    with pytest.raises(ConfigError, match="nothing to move from"):
        make_plan(trace, num_redundant=4, move_budget=4)


def test_a_plan_for_other_ranks_stands_beside_no_balancing_on_as_many(tmp_path: Path) -> None:
    """What 3 ranks use of their time says nothing about 4."""
    trace = write_trace(tmp_path)
    plan = make_plan(trace, ep=3)
    document = make_document(trace, plan=plan, plan_name="A plan", facts=Facts(256, 1000))
    none = document.candidates[0]
    assert [own.ep for own in document.candidates] == [3, EP, 3]
    assert [own.name for own in document.candidates] == [
        "No balancing, 3 ranks",
        "As recorded, 4 ranks",
        "Planned, 3 ranks",
    ]
    plain = ExpertPlacement.uniform(LAYERS, EXPERTS, ep=3)
    assert np.array_equal(none.rank_loads, rank_loads(trace.loads, plain).numpy())
    assert [own.traffic.exact for own in document.candidates] == [False, True, False]
    assert document.data["placements"][0]["rank_bytes"] == plain.num_local * LAYERS * 1000
    assert [own.name for own in candidates(trace, make_plan(trace))] == ["No balancing", "As recorded", "Planned"]
    text = StringIO()
    show_summary(PlainConsole(text), document)
    assert "the plan is for 3: compare it with no balancing on 3" in text.getvalue()
    scales = pictures._scales(document.data)
    assert scales["none"] == scales["plan"] != scales["recorded"]


def test_compare(tmp_path: Path) -> None:
    before = write_trace(tmp_path / "a")
    after = write_trace(tmp_path / "b", placement=SPARE)
    found = compare(before, SPARE, after, choice=ReplicaChoice.STATIC)
    assert found.exact
    assert found.same_routing
    assert found.off_by() == 0
    planned = candidates(before, SPARE)[-1]
    assert found.used() == (planned.used, planned.used), "what plan promises, and not that of the sums"
    text = StringIO()
    show_comparison(PlainConsole(text), found)
    used = f"{100 * planned.used:.0f} %"
    assert f"{used} used as predicted, {used} as measured" in text.getvalue()
    other = write_trace(tmp_path / "c", placement=SPARE, routes=random_routes(seed=1))
    found = compare(before, SPARE, other, choice=ReplicaChoice.STATIC)
    assert not found.same_routing
    assert found.off_by() > 0
    with pytest.raises(ConfigError, match="another placement"):
        compare(before, SPARE, before, choice=ReplicaChoice.STATIC)


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path)
    wrong = ExpertPlacement(torch.arange(8).repeat(LAYERS, 1), 8, EP)
    with pytest.raises(ConfigError, match=r"2 layers of 8 logical experts.*2 of 16"):
        make_document(trace, plan=wrong, plan_name="", facts=None)


@pytest.mark.parametrize("choice", list(ReplicaChoice))
def test_exact_is_what_a_replay_has_shown(tmp_path: Path, choice: ReplicaChoice) -> None:
    """Equal to the rows that were counted: then the plan's are exact too, whatever the choice looks at."""
    trace = write_trace(tmp_path, placement=SPARE)
    counted = replay(trace, choice=choice)
    trace = replace(trace, rank_loads=counted.rank_loads, header=replace(trace.header, replica_choice=choice.value))
    found = candidates(trace, make_plan(trace))
    assert all(own.traffic.exact for own in found)
    assert found[1].traffic.ranks.tolist() == counted.copies.tolist()
    assert found[2].rank_loads.tolist() == replay(trace, found[2].placement, choice=choice).rank_loads.tolist()
    other = replace(trace, rank_loads=trace.rank_loads.roll(1, 2))
    assert [own.traffic.exact for own in candidates(other, make_plan(trace))] == [False] * 3
    assert not predicted_rank_loads(other, SPARE)[1]
    unplaced = without_placement(other)
    by_token = choice in (ReplicaChoice.STATIC, ReplicaChoice.NEAREST)
    assert predicted_rank_loads(unplaced, SPARE)[1] == by_token, "nothing to compare with"


def test_what_would_take_too_long_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = write_trace(tmp_path, placement=SPARE)
    trace = replace(trace, header=replace(trace.header, replica_choice="waterfill"))
    monkeypatch.setattr(analysis, "MOST_CALLS", 2 * WINDOWS * EP - 1)
    assert not predicted_rank_loads(trace, SPARE)[1]
    assert predicted_rank_loads(trace, SPARE, ReplicaChoice.STATIC)[1], "a call for all steps of a rank"
