"""Routes sent again through the placement of their step: the rows that ranks have counted, with each replica choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime import LLM
from moe_runtime.balance.replay import replay
from moe_runtime.balance.trace import Trace, read_trace, routed_loads
from moe_runtime.errors import TraceError
from moe_runtime.launch import recording as launch_recording
from moe_runtime.parallel.placement import ExpertPlacement
from tests.api.tiny import NUM_EXPERTS, NUM_MOE_LAYERS, TOP_K, greedy, write_tiny
from tests.engine.conftest import shuffled  # noqa: F401 - a fixture: all experts move every few steps

PROMPTS = [[5, 6, 7], [9], [8, 10], [11, 12, 13, 14, 15]]
LENGTHS = [14, 9, 3, 12]
WORDS = ["num_threads=1", "engine.page_size=4", "engine.max_model_len=32", "engine.kv_cache_bytes=1MiB"]
WORDS += ["ranks_per_node=2", "balance.record=per_token", "balance.window_steps=3"]
MOVING = ["balance.rebalance=on", "balance.interval_steps=2", "balance.bytes_per_step=1MiB"]
TWO_BATCHES = ["engine.two_batch_overlap=on", "engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2"]
COPIES = "placement.num_redundant_experts=7"
CHOICES = ["static", "nearest", "round_robin", "waterfill"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False, max_position_embeddings=64)


def record(folder: Path, trace: Path, *words: str) -> Trace:
    with LLM(str(folder), overrides=[*WORDS, f"balance.trace={trace}", *words]) as llm:
        llm.generate(PROMPTS, [greedy(length) for length in LENGTHS])
    found = read_trace(trace)
    assert torch.equal(routed_loads(found), found.loads)
    return found


@pytest.mark.usefixtures("shuffled")
@pytest.mark.parametrize("choice", CHOICES)
def test_rows_of_a_run_that_moves_experts(folder: Path, tmp_path: Path, choice: str) -> None:
    """Every window and layer; with two tp ranks and micro-batches, each of which is a dispatch of its own."""
    words = ["ep=4", "tp=2", *TWO_BATCHES, *MOVING, COPIES, f"placement.replica_choice={choice}"]
    trace = record(folder, tmp_path / "t", *words)
    assert trace.header.replica_choice == choice and set(trace.micro_batch.tolist()) == {0, 1}
    assert len(trace.change_step) >= NUM_MOE_LAYERS and set(trace.change_layer.tolist()) == set(range(NUM_MOE_LAYERS))
    found = replay(trace)
    assert torch.equal(found.rank_loads, trace.rank_loads) and found.equals(trace)
    assert int(found.copies.sum()) == int(trace.loads.sum())
    assert not replay(trace, trace.header.placement()).equals(trace), "the first placement alone does not give them"
    if choice in ("round_robin", "waterfill"):
        whole_steps = replace(trace, micro_batch=torch.zeros_like(trace.micro_batch))
        assert not replay(whole_steps).equals(trace), "a step of two micro-batches is two dispatches"


@pytest.mark.usefixtures("shuffled")
def test_windows_replay_through_the_placement_of_their_steps(folder: Path, tmp_path: Path) -> None:
    """`placement_at`, step by step, by hand: a token's expert is on the rank that holds it then."""
    trace = record(folder, tmp_path / "t", "ep=4", *MOVING)
    rows = torch.zeros_like(trace.rank_loads)
    for token, step in enumerate(trace.step.tolist()):
        placement = trace.placement_at(step)
        assert placement is not None
        for layer, experts in enumerate(trace.routes[token].tolist()):
            for expert in experts:
                rank = int(placement.log2phy[layer, expert, 0]) // placement.num_local
                rows[trace.window[token], layer, rank] += 1
    assert torch.equal(rows, trace.rank_loads)
    assert replay(trace).equals(trace)


@pytest.mark.usefixtures("shuffled")
def test_what_moves_in_a_trace_whose_first_parts_are_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_recording, "_NAMES_BYTES", 0)
    words = ["ep=4", "engine.max_num_batched_tokens=4", "engine.max_num_seqs=4", "balance.window_steps=1"]
    trace = record(folder, tmp_path / "t", *words, *MOVING, "balance.trace_bytes=8KiB")
    assert trace.header.dropped_windows > 0 and len(trace.change_step) > 0
    assert int(trace.change_step[0]) >= int(trace.first_step[0]), "those before are in the header's placement"
    assert replay(trace).equals(trace)


@pytest.mark.parametrize("choice", CHOICES)
def test_rows_of_a_run_whose_experts_rest(folder: Path, tmp_path: Path, choice: str) -> None:
    """And of the plan under which the same prompts are run again: what it brings each rank is known before."""
    words = ["ep=4", COPIES, f"placement.replica_choice={choice}", "engine.batch_invariant=true"]
    trace = record(folder, tmp_path / "t", *words)
    assert replay(trace).equals(trace) and not len(trace.change_step)
    plan = ExpertPlacement.uniform(NUM_MOE_LAYERS, NUM_EXPERTS, ep=4, num_redundant=3)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    words[1] = f"placement.file={file}"
    assert replay(trace, plan).equals(record(folder, tmp_path / "planned", *words))


def test_copies_by_hand(folder: Path, tmp_path: Path) -> None:
    """Rows between ranks; once per rank and once per node that a token needs."""
    trace = record(folder, tmp_path / "t", "ep=4")
    found = replay(trace)
    copies, ranks, nodes = torch.zeros(4, 4).long(), torch.zeros(4, 4).long(), torch.zeros(4, 2).long()
    for home, layers in zip(trace.home.tolist(), trace.routes.tolist(), strict=True):
        for experts in layers:
            owners = [expert * 4 // NUM_EXPERTS for expert in experts]
            for owner in owners:
                copies[home, owner] += 1
            for owner in set(owners):
                ranks[home, owner] += 1
            for node in {owner // 2 for owner in owners}:
                nodes[home, node] += 1
    assert torch.equal(found.copies, copies) and int(copies.sum()) == len(trace.routes) * NUM_MOE_LAYERS * TOP_K
    assert torch.equal(found.rank_copies, ranks) and torch.equal(found.node_copies, nodes)


def test_what_cannot_be_sent_is_told(folder: Path, tmp_path: Path) -> None:
    trace = record(folder, tmp_path / "t", "ep=2")
    wrong: list[tuple[dict[str, Any], ExpertPlacement | None, str]] = [
        ({"routes": trace.routes[:0]}, None, r"no routes of single tokens to send. Record with balance.record=per_tok"),
        ({"header": replace(trace.header, phy2log=None)}, None, "does not say where its experts were. Give a placem"),
        ({}, ExpertPlacement.uniform(NUM_MOE_LAYERS, NUM_EXPERTS, ep=4), r"=\[4, \d+, \d+\], and the trace has \[2, "),
    ]
    for change, placement, message in wrong:
        with pytest.raises(TraceError, match=message):
            replay(replace(trace, **change), placement)
