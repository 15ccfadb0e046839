"""Whole engines whose experts move every few steps: the bits of the run in which they stay, nothing captured anew."""

from __future__ import annotations

import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from moe_kernels import backends

from moe_runtime import LLM
from moe_runtime.engine import migration
from moe_runtime.engine.graphs import RankGraphs
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Activity, RebalanceState, Rules, Stage
from moe_runtime.engine.snapshot import EngineSnapshot
from moe_runtime.launch import graphs as launch_graphs
from moe_runtime.launch import rebalancing
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaSelector
from tests.api.tiny import NUM_MOE_LAYERS, greedy, tokens, write_tiny
from tests.doubles.cuda_graph import RecordedGraphs
from tests.doubles.installed import install_symm_mem
from tests.engine.moving_runs import (
    COMMON,
    COPIES,
    INVARIANT,
    MOVING,
    PROMPTS,
    Bits,
    assert_same_bits,
    by_chance,
    run,
)
from tests.engine.moving_world import inline

RUNS: Final = {
    "ep4": ["ep=4", "tp=1"],
    "tp2, two batches": [
        *("ep=4", "tp=2", "engine.two_batch_overlap=on"),
        *("engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2"),
    ],
    "two batches, copies in turn": [
        *("ep=4", "tp=2", "engine.two_batch_overlap=on", *COPIES),
        *("engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2"),
    ],
    "copies in turn, shared experts dispatched": ["ep=4", "tp=2", "shared_experts=dispatched", *COPIES],
    "copies by count": ["ep=4", "tp=1", "placement.num_redundant_experts=7", "placement.replica_choice=waterfill"],
    "a slot each": ["ep=8", "tp=1", "shared_experts=dispatched", "placement.replica_choice=nearest"],
}


# Bits


@pytest.mark.parametrize("words", RUNS)
def test_moves_change_no_bit(folder: Path, bits: Bits, shuffled: list[ExpertPlacement], words: str) -> None:
    at_rest, snapshot = run(folder, INVARIANT, *RUNS[words])
    assert snapshot.rebalance == RebalanceState() and snapshot.rebalance.activity is Activity.OFF
    wanted = bits.copy()
    bits.clear()
    moved, snapshot = run(folder, INVARIANT, *RUNS[words], *MOVING)
    assert moved == at_rest
    assert_same_bits(bits, wanted)
    state = snapshot.rebalance
    assert state.num_layers_committed >= NUM_MOE_LAYERS and state.num_layers_abandoned == 0
    assert state.last_failure is None and state.num_slots_moved > 0 and len(shuffled) == state.num_decisions


def test_moves_change_no_bit_over_symmetric_memory(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_symm_mem(monkeypatch)
    words = [INVARIANT, "ep=4", "tp=1", "dispatch=symm_mem"]
    at_rest, _ = run(folder, *words)
    wanted = bits.copy()
    bits.clear()
    moved, snapshot = run(folder, *words, *MOVING)
    assert moved == at_rest
    assert_same_bits(bits, wanted)
    assert snapshot.rebalance.num_layers_committed >= NUM_MOE_LAYERS


def test_faults_change_no_bit(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fault at each stage, of a plan or of a migration's first layer, one migration after the other."""
    faults = [Stage.PLAN, Stage.SEND, Stage.CHECKSUM, Stage.CANARY, Stage.COMMIT]

    def fail(stage: Stage, rank: int, layer: int | None) -> None:
        if faults and stage is faults[0] and rank == 0 and not layer:
            raise OSError(f"a fault of the test at {faults.pop(0)}")

    at_rest, _ = run(folder, INVARIANT, "ep=4", "tp=1")
    wanted = bits.copy()
    bits.clear()
    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline, on_stage=fail))
    moved, snapshot = run(folder, INVARIANT, "ep=4", "tp=1", *MOVING, "balance.bytes_per_step=1MiB")
    assert moved == at_rest
    assert_same_bits(bits, wanted)
    state = snapshot.rebalance
    assert not faults, f"{faults} not reached"
    assert state.num_layers_abandoned == 4 and state.num_layers_committed >= 4
    assert "a fault of the test" in str(state.last_failure)


@pytest.mark.parametrize("wrong", ["maps stay", "weights stay", "one rank's maps stay"])
def test_a_wrong_commit_shows(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Slots and maps are looked at where they are, on every rank, before a layer commits."""
    run(folder, INVARIANT, "ep=4", "tp=1")
    wanted = bits.copy()
    bits.clear()
    write = ReplicaSelector.write_
    if wrong == "maps stay":
        monkeypatch.setattr(ReplicaSelector, "write_", lambda self, layer, tables: None)
    elif wrong == "one rank's maps stay":
        monkeypatch.setattr(
            ReplicaSelector, "write_", lambda self, *args: None if self.ep_rank == 0 else write(self, *args)
        )
    else:
        monkeypatch.setattr(Mover, "swap", lambda self, change, swapped: None)
    _, snapshot = run(folder, INVARIANT, "ep=4", "tp=1", *MOVING)
    assert_same_bits(bits, wanted)
    told = "was written with other bits" if wrong == "weights stay" else "MismatchError: replica maps: "
    assert snapshot.rebalance.num_layers_committed == 0 and told in str(snapshot.rebalance.last_failure)


def test_the_comparison_of_bits_sees_wrong_maps(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is worth: one rank's maps stay as they were, and nobody looks at them."""
    run(folder, INVARIANT, "ep=4", "tp=1")
    wanted = bits.copy()
    bits.clear()
    write = ReplicaSelector.write_
    monkeypatch.setattr(migration, "wrong_tables", lambda *args: None)
    monkeypatch.setattr(
        ReplicaSelector, "write_", lambda self, *args: None if self.ep_rank == 0 else write(self, *args)
    )
    run(folder, INVARIANT, "ep=4", "tp=1", *MOVING)
    with pytest.raises(AssertionError):
        assert_same_bits(bits, wanted)


def test_processes(folder: Path, bits: Bits, shuffled: list[ExpertPlacement]) -> None:
    """Over gloo; rank 0, which decides, is this process."""
    at_rest, _ = run(folder, INVARIANT, "ep=2", "tp=1")
    wanted = bits.copy()
    bits.clear()
    moved, snapshot = run(folder, INVARIANT, "ep=2", "tp=1", "launcher=process", *MOVING)
    assert moved == at_rest
    assert bits, "of the sequences that this process leads"
    assert_same_bits(bits, {key: wanted[key] for key in bits})
    assert snapshot.rebalance.num_layers_committed >= NUM_MOE_LAYERS
    assert snapshot.rebalance.num_layers_abandoned == 0


FAULTS_OF_RANK_1: Final = """
from moe_runtime.engine.migration import Migration

begin, stages = Migration.__init__, ["send", "commit"]

def fail(stage, rank, layer):
    if stages and stage == stages[0]:
        raise OSError(f"a fault of the test at {stages.pop(0)}")

Migration.__init__ = lambda self, *args, **others: begin(self, *args, **{**others, "on_stage": fail})
"""


def test_faults_in_another_process(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 1, a process of its own, fails at sending, then at writing; rank 0 hears why."""
    at_rest, _ = run(folder, INVARIANT, "ep=2", "tp=1")
    wanted = bits.copy()
    bits.clear()
    (tmp_path / "sitecustomize.py").write_text(FAULTS_OF_RANK_1)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["ep=2", "tp=1", "launcher=process", *MOVING, "balance.bytes_per_step=1MiB"]
    moved, snapshot = run(folder, INVARIANT, *words)
    assert moved == at_rest
    assert_same_bits(bits, {key: wanted[key] for key in bits})
    state = snapshot.rebalance
    assert state.num_layers_abandoned == 2 and state.num_layers_committed >= NUM_MOE_LAYERS
    assert state.last_failure is not None and state.last_failure.stage is Stage.COMMIT
    assert state.last_failure.reasons == ("rank 1: OSError: a fault of the test at commit",)


def test_no_time_changes_no_bit(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer misses its deadline: nothing moves, and decisions become rare."""
    at_rest, _ = run(folder, INVARIANT, "ep=4", "tp=1")
    wanted = bits.copy()
    bits.clear()
    monkeypatch.setattr(rebalancing, "Rules", lambda steps, deadline_s, *others: Rules(steps, 0.001, *others))
    moved, snapshot = run(folder, INVARIANT, "ep=4", "tp=1", *MOVING)
    assert moved == at_rest
    assert_same_bits(bits, wanted)
    state = snapshot.rebalance
    assert state.num_layers_committed == 0 and state.num_layers_abandoned == state.num_migrations >= 2
    assert state.num_layers_dropped == state.num_migrations * (NUM_MOE_LAYERS - 1)
    assert state.intervals == min(2**state.num_migrations, 8)
    assert state.last_failure is not None and state.last_failure.stage is Stage.DEADLINE


def test_nothing_is_left_of_a_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed while one is being made: no process and no thread is left."""
    processes, popen = list[subprocess.Popen[bytes]](), subprocess.Popen

    def begun(*words: Any, **others: Any) -> subprocess.Popen[bytes]:
        processes.append(popen(*words, **others))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", begun)
    before = set(threading.enumerate())
    with LLM(str(folder), overrides=[*COMMON, "ep=4", "tp=1", *MOVING]) as llm:
        llm.generate(PROMPTS[:1], [greedy(8)])
        assert llm.snapshot().rebalance.activity is Activity.PLANNING
        assert len(processes) == 1 and processes[0].poll() is None
    assert processes[0].returncode is not None
    until = time.monotonic() + 5.0
    while set(threading.enumerate()) - before:
        assert time.monotonic() < until, threading.enumerate()


# Captured steps


@pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("choice", ["round_robin", pytest.param("waterfill", marks=pytest.mark.slow)])
def test_captured_steps_read_what_was_moved(
    tmp_path: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    """Replays before and after commits have the bits of the same steps run eagerly, and nothing is captured anew."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 16}
    folder = write_tiny(tmp_path, text=False, max_position_embeddings=64, **sizes)
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    monkeypatch.setattr(launch_graphs, "graph_api", lambda device: RecordedGraphs())
    monkeypatch.setattr(rebalancing, "decide_apart", by_chance(shuffled, swaps=1))
    words = ["dispatch=all_gather", "ep=2", "engine.cuda_graph_sizes=[1]", "engine.max_num_seqs=1", *MOVING]
    words += ["balance.interval_steps=2", "balance.bytes_per_step=1MiB"]
    words += [
        "placement.num_redundant_experts=2",
        f"placement.replica_choice={choice}",
        "engine.prefix_caching=false",
    ]

    def short() -> tuple[list[tuple[int, ...]], EngineSnapshot]:
        with LLM(str(folder), overrides=[*COMMON, *words]) as llm:
            found = tokens(llm.generate(PROMPTS[:1], [greedy(5)]))
            return found, llm.snapshot()

    replayed, snapshot = short()
    assert snapshot.graphs.captures == 1 and snapshot.graphs.replays >= 3 and not snapshot.num_eager_decode_steps
    assert snapshot.rebalance.num_layers_committed >= 2 and not snapshot.rebalance.num_layers_abandoned
    first = bits.copy()
    bits.clear()
    monkeypatch.setattr(RankGraphs, "_replay", RankGraphs._forward)
    monkeypatch.setattr(rebalancing, "decide_apart", by_chance(shuffled, swaps=1))
    assert short()[0] == replayed
    assert_same_bits(bits, first)
