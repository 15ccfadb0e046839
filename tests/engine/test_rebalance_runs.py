"""Whole engines whose experts move every few steps: the bits of the run in which they stay, nothing captured anew."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import threading
import time
from collections.abc import Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from moe_kernels import backends
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime import LLM
from moe_runtime.balance.decision import Decision, Terms, Verdict, decide
from moe_runtime.balance.moves import keep_slots
from moe_runtime.balance.routes import RouteBuffer
from moe_runtime.balance.schedule import LayerChange
from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.doctor import doctor
from moe_runtime.engine import migration
from moe_runtime.engine.graphs import RankGraphs
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Activity, RebalanceState, Rules, Stage
from moe_runtime.engine.sampler import Sampled, Sampler
from moe_runtime.engine.sequence import SampleRow
from moe_runtime.engine.snapshot import EngineSnapshot
from moe_runtime.errors import CommunicationError, ConfigError, EngineClosedError
from moe_runtime.launch import graphs as launch_graphs
from moe_runtime.launch import planning, rebalancing
from moe_runtime.launch import recording as launch_recording
from moe_runtime.launch.compose import compose
from moe_runtime.launch.placing import num_local_slots
from moe_runtime.launch.planning import PlanRule
from moe_runtime.launch.process_size import process_bytes, staging_bytes
from moe_runtime.launch.recording import route_bytes
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaSelector
from tests.api.tiny import NUM_EXPERTS, NUM_MOE_LAYERS, greedy, tokens, wait_until_idle, write_tiny
from tests.doubles.cuda_graph import RecordedGraphs
from tests.doubles.installed import install_symm_mem
from tests.engine.moving_world import inline

PROMPTS = [[5, 6, 7], [9], [8, 10], [11, 12, 13, 14, 15]]
LENGTHS = [14, 9, 3, 12]
COMMON = ["num_threads=1", "engine.page_size=4", "engine.max_model_len=32", "engine.kv_cache_bytes=1MiB"]
MOVING = ["balance.rebalance=on", "balance.interval_steps=2", "balance.bytes_per_step=8KiB"]
INVARIANT = "engine.batch_invariant=true"
COPIES = ["placement.num_redundant_experts=7", "placement.replica_choice=round_robin"]

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

Bits = dict[tuple[int, int], Tensor]
"""Logits by request and position."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False, max_position_embeddings=64)


def by_chance(before: list[ExpertPlacement], *, swaps: int | None = None) -> Any:
    """In place of `decide`: move every layer's experts to where chance puts them, or exchange so many pairs of slots.
    The placements are added to `before`."""
    draw = random.Random(7)

    def row(now: ExpertPlacement, old: list[int]) -> list[int]:
        if swaps is None:
            extra = draw.choices(range(now.num_logical), k=now.num_physical - now.num_logical)
            return draw.sample([*range(now.num_logical), *extra], now.num_physical)
        new = list(old)
        for _ in range(swaps):
            mine, other = draw.randrange(now.num_local), draw.randrange(now.num_local, now.num_physical)
            new[mine], new[other] = new[other], new[mine]
        return new

    def decide(loads: Tensor, steps: int, *, now: ExpertPlacement, **others: Any) -> Decision:
        before.append(now)
        rows = [(old, row(now, old)) for old in now.phy2log.tolist()]
        changes = [
            LayerChange(layer, keep_slots(old, new, num_local=now.num_local), 1, 0, 1.0)
            for layer, (old, new) in enumerate(rows)
        ]
        return Decision(
            verdict=Verdict.MOVE,
            steps=steps,
            num_tokens=int(loads.sum()),
            utilisation=0.5,
            without=0.5,
            planned=0.9,
            predicted=0.9,
            changes=tuple(changes),
        )

    return decide


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> list[ExpertPlacement]:
    """Each decision moves all experts; the placements before each."""
    before: list[ExpertPlacement] = []
    monkeypatch.setattr(rebalancing, "decide_apart", by_chance(before))
    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline))
    return before


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> Bits:
    found: Bits = {}
    choose = Sampler.sample

    def sample(self: Sampler, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for row, values in zip(rows, logits, strict=True):
            found[row.request_id, len(row.tokens)] = values.clone()
        return choose(self, logits, rows)

    monkeypatch.setattr(Sampler, "sample", sample)
    return found


def run(folder: Path, *words: str) -> tuple[list[tuple[int, ...]], EngineSnapshot]:
    with LLM(str(folder), overrides=[*COMMON, *words]) as llm:
        found = tokens(llm.generate(PROMPTS, [greedy(length) for length in LENGTHS]))
        wait_until_idle(llm)
        return found, at_rest_again(llm)


def at_rest_again(llm: LLM) -> EngineSnapshot:
    """The snapshot in which no layer is on its way."""
    until = time.monotonic() + 30.0
    while (snapshot := llm.snapshot()).rebalance.activity is Activity.MOVING:
        assert time.monotonic() < until, snapshot.rebalance
        time.sleep(0.02)
    return snapshot


def assert_same_bits(found: Bits, wanted: Bits) -> None:
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        differ = found[key].view(torch.int32) != values.view(torch.int32)
        assert not differ.any(), f"request {key[0]}, position {key[1]}: {int(differ.sum())} of {values.numel()} differ"


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


# Files


def test_a_saved_placement_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes before it has its name, then the name."""
    file, synced = tmp_path / "live.json", list[tuple[bool, bool]]()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    placement = ExpertPlacement(torch.tensor([[1, 0, 2, 3]] * NUM_MOE_LAYERS), 4, 2)
    rebalancing._save(str(file), placement)
    assert synced == [(False, False), (True, True)]
    found = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=4, ep=2)
    assert torch.equal(found.phy2log, placement.phy2log)


def test_a_disk_that_fails_changes_no_bit(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], tmp_path: Path
) -> None:
    at_rest, _ = run(folder, INVARIANT, "ep=4", "tp=1")
    wanted = bits.copy()
    bits.clear()
    (tmp_path / "gone").mkdir()
    words = [INVARIANT, "ep=4", "tp=1", *MOVING, f"balance.save_placement={tmp_path / 'gone' / 'live.json'}"]
    with LLM(str(folder), overrides=[*COMMON, *words]) as llm:
        (tmp_path / "gone").rmdir()
        moved = tokens(llm.generate(PROMPTS, [greedy(length) for length in LENGTHS]))
        wait_until_idle(llm)
        state = at_rest_again(llm).rebalance
    assert moved == at_rest
    assert_same_bits(bits, wanted)
    assert state.num_migrations > 1 and state.num_layers_abandoned == 0
    assert state.last_failure is not None and state.last_failure.stage is Stage.SAVE
    assert "FileNotFoundError" in str(state.last_failure)


def test_a_run_that_fails_saves_what_it_has(
    folder: Path, shuffled: list[ExpertPlacement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its first migration: one layer has committed."""

    def fail(stage: Stage, rank: int, layer: int | None) -> None:
        if (stage, layer) == (Stage.COMMIT, 1):
            raise CommunicationError("the run ends here")

    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline, on_stage=fail))
    file = tmp_path / "live.json"
    with (
        LLM(str(folder), overrides=[*COMMON, "ep=4", "tp=1", *MOVING, f"balance.save_placement={file}"]) as llm,
        pytest.raises(EngineClosedError, match="the run ends here"),
    ):
        llm.generate(PROMPTS, [greedy(length) for length in LENGTHS])
    found = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    first = shuffled[0].phy2log
    assert not torch.equal(found.phy2log[0], first[0]) and torch.equal(found.phy2log[1:], first[1:])


def test_the_placement_is_saved_and_serves_again(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], tmp_path: Path
) -> None:
    file = tmp_path / "live.json"
    words = [INVARIANT, "ep=4", "tp=1"]
    moved, snapshot = run(folder, *words, *MOVING, f"balance.save_placement={file}", *COPIES)
    assert snapshot.rebalance.num_migrations > 1
    found = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    assert not torch.equal(found.phy2log, shuffled[0].phy2log)
    assert [path.name for path in tmp_path.iterdir()] == ["live.json"], "nothing half written stays"
    shuffled.clear()
    again, _ = run(folder, *words, f"placement.file={file}", *MOVING)
    assert again == moved
    assert torch.equal(shuffled[0].phy2log, found.phy2log), "it goes on from there"


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


# By itself


def decide_here(
    loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement, rule: PlanRule, terms: Terms, **_: Any
) -> Decision:
    return decide(loads, steps, now=now, first=first, plan=rule, terms=terms)


@pytest.mark.parametrize("interval", [10, 40], ids=["in this process", "in a process of its own"])
def test_loads_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    """Nothing forced: all tokens go to two experts of one rank, the planner parts them, and serving ends up so."""
    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline))
    if interval == 10:
        monkeypatch.setattr(rebalancing, "decide_apart", decide_here)
    else:
        monkeypatch.delattr(planning, "decide")  # what would be called here
    folder, file = write_tiny(tmp_path / "skewed", text=False, max_position_embeddings=64), tmp_path / "live.json"
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[:2] += 5.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["ep=4", "tp=1", "balance.rebalance=on", f"balance.interval_steps={interval}", "balance.threshold=1.0"]
    words += [f"balance.window_steps={interval // 2}"]
    with LLM(str(folder), overrides=[*COMMON, *words, f"balance.save_placement={file}"]) as llm:
        for _ in range(6):
            llm.generate(PROMPTS, [greedy(14)] * 4)
        state = llm.snapshot().rebalance
        assert state.num_decisions >= 2 and state.decision is not None
        assert (state.decision.without, state.decision.utilisation) == (0.25, 0.5), "one rank of four, then two"
        assert state.num_layers_committed >= 2 and state.promised == 0.5 and state.decision.num_windows >= 2
    assert state.last_failure is None
    live = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    for layer in range(2):
        ranks = {live.owner(int(live.log2phy[layer, expert, 0]))[0] for expert in (0, 1)}
        assert len(ranks) == 2, f"layer {layer}: both on one rank"


def test_a_budget_in_which_no_expert_can_move(folder: Path) -> None:
    """An expert of 6 KiB is two rows of 4 KiB; it must be there before the next decision."""
    words = [f"model={folder}", "ep=4", "balance.rebalance=on"]
    with pytest.raises(ConfigError) as caught:
        compose([*words, "balance.bytes_per_step=4KiB", "balance.interval_steps=2"])
    assert str(caught.value) == (
        "balance.bytes_per_step=4096, balance.interval_steps=2: an expert of 6 KiB takes 2 steps, and must be there "
        "before the next decision. Nearest: balance.bytes_per_step=8192, or balance.interval_steps=3."
    )
    compose([*words, "balance.bytes_per_step=4KiB", "balance.interval_steps=3"])
    compose([*words, "balance.bytes_per_step=8KiB", "balance.interval_steps=2"])
    out = StringIO()
    assert doctor([*words, "balance.interval_steps=1", "job=doctor"], console=PlainConsole(out)) == 1
    assert "balance.bytes_per_step=8192 with balance.interval_steps=2, or balance.interval_steps=2" in out.getvalue()


def test_what_it_takes_is_told(folder: Path) -> None:
    """The staging set is a layer's share of the slots."""
    out = StringIO()
    words = [f"model={folder}", "job=doctor", "ep=4", "balance.rebalance=on"]
    assert doctor(words, console=PlainConsole(out)) == 0
    line = next(line for line in out.getvalue().splitlines() if "moving experts" in line)
    slot = 3 * 16 * 32 * 4 / 1024
    assert f"{NUM_EXPERTS // 4 * slot:g} KiB for one layer's slots, {slot:g} KiB for one more, " in line
    assert f"{NUM_EXPERTS // 4 * 8} KiB each way between two steps" in line, "rows of 4 KiB, as many as a layer has"


@pytest.mark.parametrize("words", [["balance.bytes_per_step=8KiB"], ["balance.bytes_per_step=64MiB", *COPIES]])
def test_what_is_told_is_what_is_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    movers, routes = list[Mover](), list[RouteBuffer]()

    def mover(*args: Any, **others: Any) -> Mover:
        movers.append(Mover(*args, **others))
        return movers[-1]

    def buffer(*args: Any, **others: Any) -> RouteBuffer:
        routes.append(RouteBuffer(*args, **others))
        return routes[-1]

    buffer.num_bytes = RouteBuffer.num_bytes  # type: ignore[attr-defined]
    monkeypatch.setattr(rebalancing, "Mover", mover)
    monkeypatch.setattr(launch_recording, "RouteBuffer", buffer)
    moving = [*COMMON, f"model={folder}", "ep=4", "balance.rebalance=on", "balance.record=per_token", *words]
    composed = compose([*moving, f"balance.trace={tmp_path / 'trace'}"])
    config, model = composed.config, composed.model
    slots = num_local_slots(config, model)
    with LLM.from_composed(composed):
        told = staging_bytes(config, model, num_local_slots=slots)
        assert told is not None and {held.num_bytes for held in movers} == {told.total} and len(movers) == 4
        assert {held._ids.nbytes for held in routes} == {route_bytes(config, model)}
    still = compose([*COMMON, f"model={folder}", "ep=4", *words[1:]])
    both = [process_bytes(run.config, run.model, num_local_slots=slots) for run in (composed, still)]
    assert both[0] - both[1] == 4 * (told.total + route_bytes(config, model))


# Bad input


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["balance.rebalance=on"], "balance.rebalance=on: ep=1 has no other rank"),
        (["ep=2", "balance.rebalance=on", "balance.record=off"], "moves follow from recorded loads. Set balance.rec"),
        (["balance.save_placement=x.json"], "no placement changes with balance.rebalance=off"),
        (["ep=2", "balance.rebalance=on", "balance.save_placement=no/x.json"], "there is no folder"),
        (["balance.rebalance=maybe"], "one of off, on"),
        (["balance.policy=greedy"], "one of best, eplb"),
        (["balance.threshold=1.5"], "Nearest: balance.threshold=1"),
        (["ep=4", "balance.rebalance=on", "balance.threshold=0"], "nothing would ever move. Nearest: balance."),
        (["ep=4", "balance.rebalance=on", "balance.threshold=0.25"], "Nearest: balance.threshold=0.26"),
        (["balance.interval_steps=0"], "Nearest: balance.interval_steps=1"),
        (["balance.bytes_per_step=1KiB"], "Nearest: balance.bytes_per_step=4096"),
        (["balance.deadline_s=0.5"], "Nearest: balance.deadline_s=10"),
        (["ep=2", "balance.rebalance=on", INVARIANT, "dispatch=all_gather"], "sums by rank"),
        (["balance.threshold=0.8"], "balance.threshold=0.8: has no effect with balance.rebalance=off. Set balance.reb"),
        (["balance.interval_steps=7"], "balance.interval_steps=7: has no effect with balance.rebalance=off"),
        (["balance.bytes_per_step=1MiB"], "balance.bytes_per_step=1048576: has no effect with balance.rebalance=off"),
        (["balance.deadline_s=70"], "balance.deadline_s=70.0: has no effect with balance.rebalance=off"),
        (["balance.trace_bytes=1MiB"], "balance.trace_bytes=1048576: has no effect without balance.trace"),
        (["balance.window_steps=7"], "balance.window_steps=7: has no effect where loads are neither traced, shown nor"),
        (["balance.window_steps=7", "balance.record=off", "snapshot_file=x.json"], "balance.window_steps=7: has no"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert text in str(caught.value)
