"""The capacity planner's parts: words, hardware entries, curves, wire, and a replay that a hand can check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from moe_models.base import ModelConfig
from moe_models.registry import load_config
from moe_tools.plan.curves import Curves
from moe_tools.plan.hardware import MEASURED, Machine, hardware_names, load_machine
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import Routes, drawn, even
from moe_tools.plan.settings import PlanConfig, help_text, parse_words
from moe_tools.plan.wire import LL_ROW_BYTES, Way, Wire, slower_link

from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.launch.data import model_path
from moe_runtime.parallel.placement import ExpertPlacement


@pytest.fixture(scope="module")
def v3() -> ModelConfig:
    return load_config(model_path("deepseek_v3"))


@pytest.fixture(scope="module")
def h200() -> Machine:
    return load_machine(MEASURED)


# Words


def test_words_become_a_question() -> None:
    plan = parse_words(["ep=8,32", "tp=[1]", "dispatch=deep_ep", "tpot_ms=null", "html=a,b=c.html", "prompt_tokens=7"])
    assert (plan.ep, plan.tp, plan.dispatch, plan.tpot_ms) == ((8, 32), (1,), ("deep_ep",), None)
    assert (plan.html, plan.prompt_tokens) == ("a,b=c.html", 7)
    assert parse_words([]) == PlanConfig()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("tpot=50", "tpot_ms"),
        ("--ep", "Write ep=VALUE"),
        ("ep=0", "Nearest: ep=1"),
        ("ep=[]", "at least one value"),
        ("ep=many", "list of whole numbers"),
        ("dispatch=deepep", "Did you mean 'deep_ep'"),
        ("policy=worst", "one of best, eplb, uniform"),
        ("skew=-1", "Nearest: skew=0"),
        ("skew=nan", "between 0 and 3"),
        ("redundant=-32", "Nearest: redundant=0"),
        ("tpot_ms=0", "Nearest: tpot_ms=0.01"),
        ("placement=here.json", "Give trace=DIR"),
        ("ep=8 ep=16", "ep is set twice"),
        ("validate=true ep=8", "ep=: says nothing of published runs"),
    ],
)
def test_wrong_words_get_an_answer(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_words(word.split())


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ("", (1365, 682)),
        ("prompt_tokens=16", (16, 1024)),
        ("prompt_tokens=2000", (2000, 48)),
        ("output_tokens=2000", (48, 2000)),
        ("prompt_tokens=5000 output_tokens=1024", (5000, 1024)),
    ],
)
def test_lengths_that_nobody_gave_are_cut_to_what_the_model_holds(words: str, lengths: tuple[int, int]) -> None:
    """The demo model's 2048."""
    plan = parse_words(["model=demo", *words.split()])
    assert (plan.prompt_tokens, plan.output_tokens) == lengths


def test_a_trace_has_its_own_skew() -> None:
    with pytest.raises(ConfigError, match="its own skew"):
        parse_words(["trace=here", "skew=1"])


def test_help_shows_words_that_can_be_given() -> None:
    """Each key with its default, as it is written: all together ask the question of no words."""
    shown = [line.split()[0] for line in help_text().splitlines() if line.startswith("  ")]
    assert parse_words([word for word in shown if not word.endswith("=null") or word == "tpot_ms=null"]) == PlanConfig()
    assert {word.partition("=")[0] for word in shown} == set(PlanConfig.__dataclass_fields__)
    assert all(name in help_text() for name in ("b200", "gb200", "h100", "h200", "h800"))


# Hardware


def test_the_numbers_that_every_entry_has_are_told_with_their_source() -> None:
    for name in hardware_names():
        named = dict(load_machine(name).sources)
        assert {"memory_bytes", "memory_bytes_per_s", "fp8_flops", "nvlink_bytes_per_s"} <= named.keys()


def test_unknown_hardware_and_a_number_without_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'h200'"):
        load_machine("h20o")
    entry = {"name": "mine", "memory_bytes_per_s": {"value": 1e12}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(entry), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"memory_bytes_per_s=.*source"):
        load_machine(str(file))
    file.write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_machine(str(file))


# Curves


def test_curves_meet_the_tables_they_come_from(v3: ModelConfig, h200: Machine) -> None:
    curves, tables = Curves.of(h200, v3, fp8=True), h200.kernels
    masked = tables["masked"]
    for slots, row in zip(masked["slots"], masked["us"], strict=True):
        for rows, us in zip(masked["rows"], row, strict=True):
            assert curves.experts_padded(np.array([float(slots)]), np.array([float(rows)]))[0] == pytest.approx(us)
    for seqs, us in zip(tables["mla_decode"]["seqs"], tables["mla_decode"]["us"], strict=True):
        assert curves.attention(seqs, 4096, 128, fp8_cache=False) == pytest.approx(us)
    for tokens, us in zip(tables["mla_prefill"]["tokens"], tables["mla_prefill"]["us"], strict=True):
        assert curves.prompt_attention(tokens, 128) == pytest.approx(us, rel=1e-3)
    for rows, us in zip(tables["shared"]["rows"], tables["shared"]["us"], strict=True):
        assert curves.shared(rows) == pytest.approx(us)
    for weights, row in zip(tables["linear_fp8"]["weights"], tables["linear_fp8"]["us"], strict=True):
        for rows, us in zip(tables["linear_fp8"]["rows"], row, strict=True):
            assert curves.linear(rows, weights) == pytest.approx(us)


def test_curves_leave_the_table_without_a_jump(v3: ModelConfig, h200: Machine) -> None:
    curves = Curves.of(h200, v3, fp8=True)
    for slots in (1.0, 2.0, 4.0, 8.0, 32.0):
        inside, beyond = curves.experts_padded(np.array([slots, slots]), np.array([1024.0, 1025.0]))
        assert beyond == pytest.approx(inside, rel=0.05)
    more = curves.experts_padded(np.full(4, 8.0), np.array([2048.0, 4096, 8192, 16384]))
    assert (np.diff(more) > 0).all()


def test_slower_memory_is_slower_where_bytes_count(v3: ModelConfig, h200: Machine) -> None:
    """H100 and H200 differ in memory alone."""
    here, there = Curves.of(load_machine("h100"), v3, fp8=True), Curves.of(h200, v3, fp8=True)
    few, many = (np.array([8.0]), np.array([64.0])), (np.array([1.0]), np.array([1024.0]))
    assert here.experts_padded(*few)[0] > 1.3 * there.experts_padded(*few)[0]
    assert here.experts_padded(*many)[0] == pytest.approx(there.experts_padded(*many)[0])


# Wire


@pytest.mark.parametrize("name", ["h200", "h800"])
def test_even_routing_takes_what_the_table_says(name: str, v3: ModelConfig) -> None:
    machine = load_machine(name)
    table = machine.wire["low_latency"]
    routes = even(v3)
    for index, ep in enumerate(table["ep"][:4]):
        replay = _replay(ExpertPlacement.uniform(1, 256, ep=ep))
        counts = replay.count_even(0, routes.step(0, 128 * ep, in_order=True))
        assert counts.imbalance == pytest.approx(1.0, abs=0.03)
        for way in ("dispatch", "combine"):
            got = _wire(machine, ep, "deep_ep").transfer(counts, _way(way), decode=True, capacity=128)
            assert got.us == pytest.approx(table[f"{way}_us"][index], rel=0.04)


def test_backends_send_what_their_form_sends(v3: ModelConfig, h200: Machine) -> None:
    routes, ep, tokens = even(v3), 16, 32
    counts = _replay(ExpertPlacement.uniform(1, 256, ep=ep)).count_even(0, routes.step(0, tokens * ep, in_order=True))

    def network(backend: str, *, decode: bool = True) -> float:
        return _wire(h200, ep, backend).transfer(counts, "dispatch", decode=decode, capacity=tokens).mean_network_bytes

    copy = LL_ROW_BYTES["dispatch"]
    assert network("deep_ep") == pytest.approx(tokens * 8 / 2 * copy, rel=0.02), "half of 8 copies leave the node"
    assert network("deep_ep", decode=False) <= tokens * copy, "one copy for the other node"
    assert network("all_to_all") == tokens * 8 * 8 * copy, "room for all 8 rows to each of 8 ranks"
    assert network("all_gather") == ep * tokens * 14336 / 2 / 8, "8 links share the other node's tokens"
    assert network("local") == 0


def test_one_rack_has_no_network(v3: ModelConfig) -> None:
    machine = load_machine("gb200")
    counts = _replay(ExpertPlacement.uniform(1, 256, ep=64)).count_even(0, even(v3).step(0, 640, in_order=True))
    got = _wire(machine, 64, "deep_ep").transfer(counts, "combine", decode=True, capacity=10)
    assert (got.network_bytes, slower_link([got])) == (0.0, "nvlink")


# Replay


def test_a_replay_that_a_hand_can_check() -> None:
    """Experts 0..3 on 2 ranks with 3 slots each: [0 1 2] and [3 2 0]; nodes of one rank."""
    placement = ExpertPlacement(torch.tensor([[0, 1, 2, 3, 2, 0]]), 4, 2)
    replay = Replay.of(placement, choice="nearest", ranks_per_node=1)
    counts = replay.count(0, [torch.tensor([[0, 1], [2, 3], [-1, -1]]), torch.tensor([[0, 1]])])
    assert counts.slot_rows.tolist() == [[1, 2, 1], [1, 0, 1]]
    assert counts.copies.tolist() == [[3, 1], [1, 1]]
    assert counts.rank_copies.tolist() == [[2, 1], [1, 1]]
    assert counts.node_copies.tolist() == [[2, 1], [1, 1]]
    assert (counts.rows.tolist(), counts.active.tolist()) == ([4, 2], [3, 2])
    assert counts.imbalance == pytest.approx(4 / 3)


def test_counts_conserve_the_assignments() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(50, 16, generator=generator).argsort(dim=1)[:, :4]
    placement = ExpertPlacement.uniform(1, 16, ep=4, num_redundant=8)
    for choice in ("static", "round_robin", "nearest", "waterfill"):
        counts = Replay.of(placement, choice=choice, ranks_per_node=2).count_even(0, ids)
        assert counts.rows.sum() == counts.copies.sum() == 200
        assert (counts.rank_copies <= counts.copies).all()
        assert (counts.node_copies.sum(1) <= counts.rank_copies.sum(1)).all()


def test_drawn_routes_are_skewed_as_asked(v3: ModelConfig) -> None:
    flat, steep = (drawn(v3, skew=skew, num_layers=1, seed=0) for skew in (0.0, 0.7))
    busiest = [_replay(ExpertPlacement.uniform(1, 256, ep=32)).count_even(0, own.ids[0]) for own in (flat, steep)]
    assert busiest[0].imbalance < 1.15
    assert 1.8 < busiest[1].imbalance < 3.2, "TensorRT-LLM measured 2.6 on R1"
    assert steep.ids.sort(dim=2).values.diff(dim=2).min() > 0, "a token's experts are distinct"
    groups = (steep.ids[0] // 32).sort(dim=1).values
    assert int((groups.diff(dim=1) > 0).sum(1).max()) < 4, "at most 4 of the 8 groups"


def test_steps_take_routes_in_order_or_mixed() -> None:
    ids = torch.arange(10).view(1, 5, 2)
    routes = Routes(ids, torch.ones(1, 1, 10), (0,), "by hand")
    assert routes.step(0, 7, in_order=True)[:, 0].tolist() == [0, 2, 4, 6, 8, 0, 2]
    mixed = routes.step(0, 5, in_order=False)
    assert sorted(mixed[:, 0].tolist()) == [0, 2, 4, 6, 8]


def _replay(placement: ExpertPlacement) -> Replay:
    return Replay.of(placement, choice="static", ranks_per_node=8)


def _wire(machine: Machine, ep: int, backend: str) -> Wire:
    rows = RowLayout(256 // ep, quantize=True)
    spec = DispatchSpec(ep=ep, rows=rows, hidden=7168, dtype=torch.bfloat16, top_k=8)
    return Wire.of(machine, spec, backend)


def _way(name: str) -> Way:
    ways: Mapping[str, Way] = MappingProxyType({"dispatch": "dispatch", "combine": "combine"})
    return ways[name]
