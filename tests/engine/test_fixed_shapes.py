"""A decode step of fixed shapes: padding that leaves no trace, and a host that never waits.

The Triton kernels run under the interpreter on CPU tensors; what would make the host wait for a GPU is refused by name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_kernels.mla import ScaledLatent, plan_absorbed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_runtime.comm.base import Groups
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.plan import ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.errors import CommunicationError
from moe_runtime.launch.build import ProcessParts, build_engine
from moe_runtime.launch.compose import compose
from moe_runtime.layers.moe import MoEStep
from moe_runtime.layers.step import AbsorbedTokens, StepInputs
from moe_runtime.parallel.mesh import ProcessMesh
from tests.api.tiny import write_tiny

ROWS = 4
"""N: rows of the fixed step, of each DP group."""

WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")
"""aten operations whose result, or its shape, comes from the device."""


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype is torch.bool for x in (args[1] if isinstance(args[1], list) else ())
        )
        assert name not in WAITS and not masked, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def no_waits() -> AbstractContextManager[object]:
    return NoWaits()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Deployment:
    words: tuple[str, ...]
    ep: int = 1
    tp: int = 1
    padding_row: int = -1
    """Cache row of padding."""


DEPLOYMENTS = {
    "one rank": Deployment(("dispatch=local",)),
    "four ranks": Deployment(
        (
            "dispatch=all_gather",
            "shared_experts=dispatched",
            "placement.num_redundant_experts=3",
            "placement.replica_choice=round_robin",
        ),
        ep=4,
        tp=2,
    ),
    "waterfill": Deployment(
        (
            "dispatch=all_gather",
            "shared_experts=dispatched",
            "placement.num_redundant_experts=3",
            "placement.replica_choice=waterfill",
        ),
        ep=2,
    ),
    "equal blocks": Deployment(("dispatch=all_to_all",), ep=2),
    "batch-invariant": Deployment(("dispatch=local", "engine.batch_invariant=true")),
    "batch-invariant, fp8 cache": Deployment(
        ("dispatch=local", "engine.batch_invariant=true", "engine.kv_cache_dtype=fp8")
    ),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False, num_hidden_layers=2)


def prompts(group: int) -> StepPlan:
    """Two sequences in the first group, 3 tokens and 1 long, one of 2 in the others."""
    lengths = (3, 1) if group == 0 else (2,)
    return StepPlan(
        tuple(
            SequenceChunk(i, 0, tuple(range(3 + i, 3 + i + n)), (2 * i + 1,), ChunkKind.PREFILL, True, n - 1)
            for i, n in enumerate(lengths)
        )
    )


def next_tokens(plan: StepPlan) -> StepPlan:
    return StepPlan(
        tuple(
            SequenceChunk(c.request_id, len(c.token_ids), (9 + c.request_id,), c.pages, ChunkKind.DECODE, True, 0)
            for c in plan.chunks
        )
    )


def fixed(runner: Runner, plan: StepPlan, padding_row: int) -> StepInputs:
    """The same step in ROWS rows: what a captured graph reads."""
    n, size, width = len(plan.chunks), runner.cache.page_size, 3
    token_ids, positions, lens = (torch.zeros(ROWS, dtype=torch.int64) for _ in range(3))
    cache_rows, pages = torch.full((ROWS,), padding_row), torch.zeros(ROWS, width, dtype=torch.int64)
    for row, chunk in enumerate(plan.chunks):
        token_ids[row], positions[row], lens[row] = chunk.token_ids[0], chunk.start, chunk.start + 1
        pages[row, : len(chunk.pages)] = torch.tensor(chunk.pages)
        cache_rows[row] = chunk.pages[chunk.start // size] * size + chunk.start % size
    local = ROWS // runner.tp
    real = torch.tensor([min(max(n - runner.tp_rank * local, 0), local)])
    with no_waits():
        cos, sin = runner.model.rotary(positions)
        work = plan_absorbed(pages, lens, page_size=size, batch_invariant=runner.one_form, num_heads=runner.num_heads)
    return StepInputs(
        token_ids,
        ROWS,
        cos,
        sin,
        cache_rows,
        AbsorbedTokens(ROWS, pages, lens, work),
        (),
        torch.arange(ROWS),
        MoEStep(real, local, local, 1, Phase.DECODE),
    )


@dataclass(frozen=True)
class Outcome:
    """`logits [n, V]`, the caches after the step, what the recorder counted in it."""

    logits: Tensor
    caches: tuple[Tensor, ...]
    counts: Tensor


def stored(engine: RankEngine) -> tuple[Tensor, ...]:
    """The tensors of the caches; fp8 as its bytes."""
    found: list[Tensor] = []
    for cache in engine.runner.cache.layers:
        if isinstance(cache, ScaledLatent):
            found += [cache.data.view(torch.uint8), cache.scale, cache.rope]
        else:
            found.append(cache)
    return tuple(found)


def program(engine: RankEngine, groups: Groups, padding_row: int) -> tuple[Outcome, Outcome]:
    """The same decode step as the runner makes it and in fixed shapes."""
    runner, plan, recorder = engine.runner, prompts(groups.dp.rank), engine.recorder
    assert recorder is not None
    local = ROWS // runner.tp
    runner.run(plan, GroupStep(Phase.MIXED, ROWS, local, 1, local))
    before, kept = recorder.counts(), [cache.clone() for cache in stored(engine)]
    plan = next_tokens(plan)
    eager = runner.run(plan, GroupStep(Phase.DECODE, ROWS, local, 1, local))
    after = recorder.counts()
    first = Outcome(eager, tuple(cache.clone() for cache in stored(engine)), after - before)
    for cache, was in zip(stored(engine), kept, strict=True):
        cache.copy_(was)
    step = fixed(runner, plan, padding_row)
    # The mode is the thread's, so all its ranks run under it: one enters, and leaves when all are through.
    groups.ep.barrier()
    with no_waits() if groups.ep.rank == 0 else nullcontext():
        groups.ep.barrier()
        logits = runner.model([step], runner.cache.layers)
        groups.ep.barrier()
    groups.ep.barrier()
    assert bool(logits.isfinite().all()), "padding rows too"
    counts = recorder.counts() - after
    return first, Outcome(logits[: len(plan.chunks)], tuple(cache.clone() for cache in stored(engine)), counts)


def outcomes(folder: Path, deployment: Deployment) -> list[tuple[Outcome, Outcome]]:
    ep, tp = deployment.ep, deployment.tp
    words = [f"model={folder}", f"ep={ep}", f"tp={tp}", "engine.max_num_seqs=4", "engine.cuda_graphs=off"]
    parts = ProcessParts.open(compose([*words, *deployment.words]), ranks_in_process=ep)
    with VirtualCluster(ep, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=ep // tp, tp=tp)
        meshes = ProcessMesh.enumerate(dp=ep // tp, tp=tp)
        engines = cluster.call(
            lambda: [build_engine(parts, mesh, own, owner=None) for mesh, own in zip(meshes, groups, strict=True)]
        )
        return cluster.run(lambda rank: program(engines[rank], groups[rank], deployment.padding_row))


def check(folder: Path, deployment: Deployment, tolerance: float) -> None:
    for rank, (eager, captured) in enumerate(outcomes(folder, deployment)):
        torch.testing.assert_close(captured.logits, eager.logits, rtol=0, atol=tolerance, msg=f"rank {rank}")
        for ours, theirs in zip(captured.caches, eager.caches, strict=True):
            assert torch.equal(ours == 0, theirs == 0), f"rank {rank}: padding was written"
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        assert torch.equal(eager.counts, captured.counts), f"rank {rank}"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_equals_the_eager_step_without_a_wait(folder: Path, name: str) -> None:
    """To the bit in the invariant mode; else torch's products over 2 and over 4 rows differ by rounding."""
    check(folder, DEPLOYMENTS[name], 0.0 if name.startswith("batch-invariant") else 2e-5)


def test_written_padding_is_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="padding was written"):
        check(folder, Deployment(("dispatch=local",), padding_row=0), 2e-5)


def test_a_wait_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowLayout, "stays_on", lambda rows, device: False)
    with pytest.raises(CommunicationError, match="waits for the device"):
        outcomes(folder, Deployment(("dispatch=all_to_all",)))
