"""The order in which real steps of a virtual cluster begin their stages, under the simulated clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from moe_models.deepseek_v3 import model as model_module
from moe_models.deepseek_v3.model import Block, DeepseekModel
from torch import Tensor

from moe_runtime.comm.base import Groups
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import DispatchStep
from moe_runtime.dispatch.overlap import OnStage, Stage, Stages, interleave
from moe_runtime.dispatch.timeline import Costs, Timeline, TimelineError, Turn, simulate, summarize
from moe_runtime.dispatch.timeline_check import check
from moe_runtime.dispatch.timeline_text import render
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.lockstep import AgreedStep, LockstepLimits, Wish, agree, cut_rows
from moe_runtime.engine.plan import ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.runner import GroupStep
from moe_runtime.launch.build import ProcessParts, build_engine
from moe_runtime.launch.compose import compose
from moe_runtime.layers.moe import MoELayer, MoEStep
from moe_runtime.parallel.mesh import ProcessMesh
from tests.api.tiny import write_tiny

DENSE, MOE = 2, 2


@dataclass(frozen=True)
class Run:
    """A step of prompts of `tokens[group]` tokens (0: the group is idle), cut into two micro-batches or not."""

    tokens: tuple[int, ...]
    two: bool = True
    tp: int = 1
    max_tokens: int | None = None
    dispatch: str = "all_to_all"
    shared: bool = True
    """The shared expert runs beside the dispatch, not as one that tokens are sent to."""

    @property
    def ep(self) -> int:
        return len(self.tokens) * self.tp

    @property
    def agreed(self) -> AgreedStep:
        least = 2 if self.two else None
        limits = LockstepLimits(tp=self.tp, max_tokens=self.max_tokens, two_batch_tokens=least)
        return agree([Wish(0, count, 0) for count in self.tokens], limits=limits)


RUNS = {
    "one micro-batch": Run((5, 3), two=False),
    "one micro-batch, chunks": Run((5, 3, 0, 1), two=False, max_tokens=2),
    "two": Run((6, 6, 6, 6)),
    "two, the second empty on some": Run((5, 1, 0, 2)),
    "two, chunks": Run((7, 1), max_tokens=2),
    "two, tp": Run((8, 3), tp=2, dispatch="all_gather"),
    "two, no expert beside": Run((4, 4), shared=False),
}


@dataclass
class Told:
    """What one rank did, in order: its turns, and with `Watched` its calls too."""

    rank: int
    turns: list[Turn] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __call__(self, micro_batch: int, stage: Stage | None) -> None:
        self.turns.append((micro_batch, stage))
        self.calls.append(f"turn {micro_batch}")


@dataclass(frozen=True)
class Watched:
    """A part of a layer whose calls, and whose pending values, are written down."""

    part: Any
    name: str
    calls: list[str]

    def __call__(self, *args: Any) -> Any:
        self.calls.append(self.name)
        return self.part(*args)

    def dispatch_begin(self, *args: Any) -> Watched:
        step: DispatchStep = args[2]
        self.calls.append(f"dispatch {step.micro_batch} begins")
        return replace(self, part=self.part.dispatch_begin(*args), name="dispatch")

    def combine_begin(self, *args: Any) -> Watched:
        self.calls.append("combine begins")
        return replace(self, part=self.part.combine_begin(*args), name="combine")

    def wait(self) -> Any:
        value = self.part.wait()
        self.calls.append(f"{self.name} has ended")
        return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_hidden_layers": DENSE + MOE, "first_k_dense_replace": DENSE}
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False, **changes)


def watched(model: DeepseekModel, told: Told) -> DeepseekModel:
    """`model` with everything that costs time written down."""

    def block(each: Block) -> Block:
        ffn: Any = Watched(each.ffn, "dense", told.calls)
        if isinstance(each.ffn, MoELayer):
            shared: Any = None if each.ffn.shared is None else Watched(each.ffn.shared, "shared", told.calls)
            dispatcher: Any = Watched(each.ffn.dispatcher, "", told.calls)
            experts: Any = Watched(each.ffn.experts, "experts", told.calls)
            ffn = replace(each.ffn, shared=shared, dispatcher=dispatcher, experts=experts)
        attention: Any = Watched(each.attention, "attention", told.calls)
        return replace(each, attention=attention, ffn=ffn)

    return replace(model, blocks=tuple([block(each) for each in model.blocks]), on_stage=told)


def prompt(tokens: int) -> StepPlan:
    chunk = SequenceChunk(0, 0, tuple(range(3, 3 + tokens)), (1, 2), ChunkKind.PREFILL, True, tokens - 1)
    return StepPlan((chunk,) if tokens else ())


def rank_step(engine: RankEngine, groups: Groups, run: Run) -> tuple[Told, Tensor]:
    told = Told(groups.world.rank)
    assert isinstance(engine.runner.model, DeepseekModel)
    runner = replace(engine.runner, model=watched(engine.runner.model, told))
    agreed, group = run.agreed, groups.dp.rank
    step = GroupStep(
        agreed.phase, agreed.padded_tokens[group], agreed.capacity, agreed.num_chunks, agreed.chunk_tokens,
        num_micro_batches=agreed.num_micro_batches,
    )  # fmt: skip
    return told, runner.run(prompt(run.tokens[group]), step)


def took(folder: Path, run: Run) -> list[Told]:
    """One step of every rank."""
    sharing = "replicated" if run.shared else "dispatched"
    words = [f"model={folder}", f"ep={run.ep}", f"tp={run.tp}", f"dispatch={run.dispatch}", f"shared_experts={sharing}"]
    parts = ProcessParts.open(compose([*words, "engine.page_size=4"]), ranks_in_process=run.ep)
    dp = len(run.tokens)
    with VirtualCluster(run.ep, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=dp, tp=run.tp)
        meshes = ProcessMesh.enumerate(dp=dp, tp=run.tp)
        engines = cluster.call(
            lambda: [build_engine(parts, mesh, own, owner=None) for mesh, own in zip(meshes, groups, strict=True)]
        )
        return [told for told, _ in cluster.run(lambda rank: rank_step(engines[rank], groups[rank], run))]


def costs_of(run: Run) -> list[list[Costs]]:
    """Per rank and micro-batch, by its rows: a rank without any has only the wire's share."""
    agreed = run.agreed
    found = []
    for padded in agreed.padded_tokens:
        rows = [count / run.tp for count in cut_rows(padded, agreed.num_micro_batches, tp=run.tp)]
        row = [
            Costs(
                first_us=2 * n, attention_us=3 * n, send_us=n / 4, shared_us=n * run.shared, experts_us=2 * n,
                sum_us=n / 8, last_us=n / 2, dispatch_us=1 + n, combine_us=1 + 2 * n,
            )
            for n in rows
        ]  # fmt: skip
        found += [row] * run.tp
    return found


def timeline_of(logs: Sequence[Sequence[Turn]], run: Run) -> Timeline:
    return simulate(logs, costs_of(run), num_chunks=run.agreed.num_chunks)


def presumed(run: Run, turns: Sequence[Turn]) -> list[str]:
    """The calls that the clock takes for granted in every turn."""
    chunks, begun, calls = run.agreed.num_chunks, dict.fromkeys((0, 1), 0), []
    for micro_batch, stage in turns:
        count = begun[micro_batch]
        begun[micro_batch] += 1
        opens = count % (2 * chunks) == 0
        if stage is Stage.COMBINE:
            calls += ["dispatch has ended", "experts", "combine begins"]
        else:
            calls += ["combine has ended"] if count else ["attention", "dense"] * DENSE
        if stage is Stage.DISPATCH:
            calls += ["attention"] * opens + [f"dispatch {micro_batch} begins"] + ["shared"] * (opens and run.shared)
        calls.append(f"turn {micro_batch}")
    return calls


@pytest.mark.parametrize("name", RUNS)
def test_real_steps(folder: Path, name: str) -> None:
    run = RUNS[name]
    told = took(folder, run)
    agreed = run.agreed
    assert (agreed.num_micro_batches == 2) is run.two and (agreed.num_chunks > 1) is ("chunks" in name)
    for rank in told:
        assert rank.turns == told[0].turns, f"rank {rank.rank}"
        assert rank.calls == presumed(run, rank.turns), f"rank {rank.rank}"
    assert len(told[0].turns) == agreed.num_micro_batches * (2 * MOE * agreed.num_chunks + 1)
    timeline = timeline_of([rank.turns for rank in told], run)
    check(timeline)
    summary = summarize(timeline)
    assert (summary.step_us < summary.serial_us) is (run.two or run.shared)
    assert "A1" in render(timeline, layers=range(MOE), width=400) or not run.two


def to_the_end(programs: Sequence[Stages[Any]], on_stage: OnStage | None = None) -> list[Any]:
    """A wrong schedule: no turns."""

    def alone(number: int) -> Any:
        return interleave([programs[number]], lambda _, stage: on_stage(number, stage) if on_stage else None)[0]

    return [alone(number) for number in range(len(programs))]


def second_first_on(rank: int) -> Callable[..., list[Any]]:
    """A wrong schedule: one rank begins with micro-batch 1."""

    def wrong(programs: Sequence[Stages[Any]], on_stage: Told) -> list[Any]:
        if on_stage.rank != rank:
            return interleave(programs, on_stage)
        return interleave(programs[::-1], lambda number, stage: on_stage(1 - number, stage))[::-1]

    return wrong


def test_no_turns_no_gain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUNS["two, no expert beside"]
    good = timeline_of([rank.turns for rank in took(folder, run)], run)
    monkeypatch.setattr(model_module, "interleave", to_the_end)
    bad = timeline_of([rank.turns for rank in took(folder, run)], run)
    check(bad)
    assert bad.step_us == summarize(bad).serial_us == summarize(good).serial_us > 1.2 * good.step_us


def test_a_rank_that_swaps_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUNS["two"]
    monkeypatch.setattr(model_module, "interleave", second_first_on(2))
    logs = [rank.turns for rank in took(folder, run)]
    with pytest.raises(TimelineError, match="rank 2, turn 0: micro-batch 1 begins dispatch, but rank 0 micro-batch 0"):
        timeline_of(logs, run)


def test_an_expert_beside_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls tell where the shared expert runs: here after the last combine."""

    def late(layer: MoELayer[Any], x: Tensor, step: MoEStep) -> Stages[Tensor]:
        assert layer.shared is not None
        routed = yield from stages(replace(layer, shared=None), x, step)
        return routed + layer.shared(x)

    stages = MoELayer.stages
    monkeypatch.setattr(MoELayer, "stages", late)
    run = RUNS["two"]
    told = took(folder, run)[0]
    assert told.calls != presumed(run, told.turns)
    assert [name for name in told.calls if name != "shared"] == presumed(replace(run, shared=False), told.turns)
