"""Whole engines whose experts move every few steps: the bits of the run in which they stay, nothing captured anew."""

from __future__ import annotations

import random
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
from moe_runtime.balance.decision import Decision, LayerChange, Verdict
from moe_runtime.balance.moves import keep_slots
from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.doctor import doctor
from moe_runtime.engine import rebalance
from moe_runtime.engine.graphs import RankGraphs
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Activity, RebalanceState, Stage
from moe_runtime.engine.sampler import Sampled, Sampler
from moe_runtime.engine.sequence import SampleRow
from moe_runtime.engine.snapshot import EngineSnapshot
from moe_runtime.errors import ConfigError
from moe_runtime.launch import graphs as launch_graphs
from moe_runtime.launch import rebalancing
from moe_runtime.launch.compose import compose
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
        return Decision(Verdict.MOVE, steps, int(loads.sum()), 0.5, 0.5, 0.9, 0.9, changes=tuple(changes))

    return decide


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> list[ExpertPlacement]:
    """Each decision moves all experts; the placements before each."""
    before: list[ExpertPlacement] = []
    monkeypatch.setattr(rebalance, "decide", by_chance(before))
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
        return found, llm.snapshot()


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
    """What the comparison of bits is worth: each of these is seen by it, or before it by a checksum."""
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
    if wrong == "weights stay":
        assert_same_bits(bits, wanted)
        assert snapshot.rebalance.num_layers_committed == 0 and "was written with other bits" in str(
            snapshot.rebalance.last_failure
        )
    else:
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


# Files


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
def test_captured_steps_read_what_was_moved(
    tmp_path: Path, bits: Bits, shuffled: list[ExpertPlacement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays before and after commits have the bits of the same steps run eagerly, and nothing is captured anew."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 16}
    folder = write_tiny(tmp_path, text=False, max_position_embeddings=64, **sizes)
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    monkeypatch.setattr(launch_graphs, "graph_api", lambda device: RecordedGraphs())
    monkeypatch.setattr(rebalance, "decide", by_chance(shuffled, swaps=1))
    words = ["dispatch=all_gather", "ep=2", "engine.cuda_graph_sizes=[1]", "engine.max_num_seqs=1", *MOVING]
    words += ["balance.interval_steps=1", "balance.bytes_per_step=1MiB"]
    words += [
        "placement.num_redundant_experts=2",
        "placement.replica_choice=round_robin",
        "engine.prefix_caching=false",
    ]

    def short() -> tuple[list[tuple[int, ...]], EngineSnapshot]:
        with LLM(str(folder), overrides=[*COMMON, *words]) as llm:
            found = tokens(llm.generate(PROMPTS[:1], [greedy(4)]))
            return found, llm.snapshot()

    replayed, snapshot = short()
    assert snapshot.graphs.captures == 1 and snapshot.graphs.replays >= 3 and not snapshot.num_eager_decode_steps
    assert snapshot.rebalance.num_layers_committed >= 2 and not snapshot.rebalance.num_layers_abandoned
    first = bits.copy()
    bits.clear()
    monkeypatch.setattr(RankGraphs, "_replay", RankGraphs._forward)
    monkeypatch.setattr(rebalance, "decide", by_chance(shuffled, swaps=1))
    assert short()[0] == replayed
    assert_same_bits(bits, first)


# By itself


def test_loads_decide(tmp_path: Path) -> None:
    """Nothing forced: all tokens go to two experts of one rank, the planner parts them, and serving ends up so."""
    folder, file = write_tiny(tmp_path / "skewed", text=False, max_position_embeddings=64), tmp_path / "live.json"
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[:2] += 5.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["ep=4", "tp=1", "balance.rebalance=on", "balance.interval_steps=10", "balance.threshold=1.0"]
    with LLM(str(folder), overrides=[*COMMON, *words, f"balance.save_placement={file}"]) as llm:
        for _ in range(6):
            llm.generate(PROMPTS, [greedy(14)] * 4)
        state = llm.snapshot().rebalance
        assert state.num_decisions >= 2 and state.decision is not None
        assert (state.decision.without, state.decision.utilisation) == (0.25, 0.5), "one rank of four, then two"
        assert state.num_layers_committed >= 2 and state.promised == 0.5
    assert state.last_failure is None
    live = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    for layer in range(2):
        ranks = {live.owner(int(live.log2phy[layer, expert, 0]))[0] for expert in (0, 1)}
        assert len(ranks) == 2, f"layer {layer}: both on one rank"


def test_what_it_takes_is_told(folder: Path) -> None:
    """The staging set is a layer's share of the slots."""
    out = StringIO()
    words = [f"model={folder}", "job=doctor", "ep=4", "balance.rebalance=on"]
    assert doctor(words, console=PlainConsole(out)) == 0
    line = next(line for line in out.getvalue().splitlines() if "moving experts" in line)
    slot = 3 * 16 * 32 * 4
    assert f"{NUM_EXPERTS // 4 * slot / 1024:g} KiB for one layer's slots" in line


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
        (["balance.interval_steps=0"], "Nearest: balance.interval_steps=1"),
        (["balance.bytes_per_step=1KiB"], "Nearest: balance.bytes_per_step=4096"),
        (["balance.deadline_s=0"], "Nearest: balance.deadline_s=0.001"),
        (["ep=2", "balance.rebalance=on", INVARIANT, "dispatch=all_gather"], "sums by rank"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert text in str(caught.value)
