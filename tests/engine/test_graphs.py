"""Decode steps as captured graphs: their buffers, and ranks that capture and replay together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import backends
from moe_kernels.mla import LatentCache
from torch import Tensor

from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.comm.base import Communicator
from moe_runtime.comm.together import virtual_together
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.graphs import GraphCounts, ProcessGraphs, RankGraphs
from moe_runtime.engine.plan import ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.engine.step_buffers import StepBuffers
from moe_runtime.errors import CommunicationError
from moe_runtime.layers.step import StepInputs
from tests.doubles.cuda_graph import RecordedGraphs

interpreted = pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")

CPU = torch.device("cpu")
PAGE = 4


def decode(*tokens: tuple[int, int, tuple[int, ...]], first_id: int = 0, samples: bool = True) -> StepPlan:
    """A chunk per (token, position, pages)."""
    return StepPlan(
        tuple(
            SequenceChunk(first_id + i, start, (token,), pages, ChunkKind.DECODE, samples, 0 if samples else 1)
            for i, (token, start, pages) in enumerate(tokens)
        )
    )


def group_step(rows: int, tp: int = 1) -> GroupStep:
    return GroupStep(Phase.DECODE, rows, rows // tp, 1, rows // tp, graph=True)


# A toy model, many ranks


class Rotary:
    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions.float(), positions.float()


@dataclass
class Toy:
    """Logits that show every field of a step; counts its real rows as a load recorder does. `fails_at`: call number."""

    tp: Communicator
    ep: Communicator
    seen: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    calls: int = 0
    fails_at: int | None = None

    @property
    def rotary(self) -> Rotary:
        return Rotary()

    def __call__(self, steps: Sequence[StepInputs], caches: tuple[LatentCache, ...]) -> Tensor:
        self.calls += 1
        return torch.cat([self._logits(step) for step in steps])

    def _logits(self, step: StepInputs) -> Tensor:
        everybody = self.ep.all_reduce(step.token_ids.sum().view(1))
        if self.calls == self.fails_at:
            raise ValueError("the toy broke")
        assert step.absorbed is not None and isinstance(step.moe.num_real, Tensor)
        self.seen += step.moe.num_real
        pages = step.absorbed.page_table[:, 0]
        columns = (
            step.token_ids,
            step.cos,
            step.cache_rows,
            step.absorbed.kv_lens,
            pages,
            everybody.expand(len(pages)),
        )
        return torch.stack([column.float() for column in columns], dim=1)


@dataclass
class World:
    """`dp × tp` virtual ranks with a toy model each."""

    dp: int = 1
    tp: int = 1
    sizes: tuple[int, ...] = (2, 4)
    api: RecordedGraphs = field(default_factory=RecordedGraphs)
    cluster: VirtualCluster = field(init=False)
    process: ProcessGraphs = field(init=False)
    toys: list[Toy] = field(default_factory=list)
    ranks: list[RankGraphs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster = VirtualCluster(self.dp * self.tp, deadline_s=20)
        self.process = ProcessGraphs(self.api, self.sizes)
        groups = virtual_groups(self.cluster, dp=self.dp, tp=self.tp)
        for place, own in zip(virtual_together(self.cluster), groups, strict=True):
            cache = LatentKVCache.zeros(
                1, num_pages=8, page_size=PAGE, latent=6, rope=2, dtype=torch.float32, device=CPU
            )
            self.toys.append(Toy(own.tp, own.ep))
            runner = Runner(self.toys[-1], cache, self.tp, own.tp.rank, one_form=False, device=CPU, num_heads=1)
            self.ranks.append(RankGraphs(self.process, place, runner, max_model_len=16, keeps_logits=own.tp.rank == 0))

    def capture(self) -> None:
        self.cluster.run(lambda rank: self.ranks[rank].capture())

    def step(self, rows: int, *plans: StepPlan) -> list[Tensor]:
        """One step, a plan per DP group; the logits of all ranks."""
        return self.cluster.run(
            lambda rank: self.ranks[rank].run(plans[rank // self.tp], group_step(rows, self.tp)).clone()
        )


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")


@pytest.fixture
def make_world(on_kernels: None) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**sizes: int) -> World:
        worlds.append(World(**sizes))  # type: ignore[arg-type]
        return worlds[-1]

    yield make
    for world in worlds:
        world.cluster.close()


@interpreted
def test_one_capture_serves_all_ranks_and_steps(make_world: Callable[..., World]) -> None:
    world = make_world(dp=2, tp=2)
    world.capture()
    assert world.process.counts == GraphCounts(captures=2)
    assert [int(toy.seen) for toy in world.toys] == [0] * 4, "warm-up and capture count nothing"
    calls = [toy.calls for toy in world.toys]
    first = world.step(4, decode((7, 5, (2, 1)), (9, 0, (3,)), (8, 1, (0,))), StepPlan())
    second = world.step(2, decode((1, 2, (4,))), decode((3, 14, (5, 6, 7, 1))))
    assert [toy.calls for toy in world.toys] == calls, "a replay runs no Python"
    assert world.process.counts == GraphCounts(captures=2, replays=2), "one replay per step, not per rank"
    # token, position, cache row, length, first page, all ranks' tokens
    together = 2 * (7 + 9 + 8)
    assert first[0].tolist() == [
        [7, 5, 1 * PAGE + 1, 6, 2, together],
        [9, 0, 3 * PAGE, 1, 3, together],
        [8, 1, 1, 2, 0, together],
    ]
    assert first[2].shape == (0, 6), "an idle group"
    assert second[0].tolist() == [[1, 2, 4 * PAGE + 2, 3, 4, 8]]
    assert second[2].tolist() == [[3, 14, 1 * PAGE + 2, 15, 5, 8]]
    assert first[1].numel() == second[3].numel() == 0, "tp rank 1 samples nothing and keeps no logits"
    assert [int(toy.seen) for toy in world.toys] == [2 + 1, 1 + 0, 0 + 1, 0 + 0], "each rank's own real rows"


@interpreted
def test_rows_that_sample_nothing_are_left_out(make_world: Callable[..., World]) -> None:
    """A preempted request that is recomputed token by token."""
    world = make_world()
    world.capture()
    recomputed = decode((5, 1, (2,)), samples=False).chunks
    (logits,) = world.step(4, StepPlan(decode((7, 0, (1,))).chunks + recomputed + decode((8, 0, (3,))).chunks))
    assert logits[:, 0].tolist() == [7, 8]


@interpreted
@pytest.mark.parametrize(("call", "moment"), [(1, "warm-up"), (2, "capture"), (3, "warm-up of the next size")])
def test_a_rank_that_raises_while_capturing(make_world: Callable[..., World], call: int, moment: str) -> None:
    world = make_world(dp=3)
    world.toys[1].fails_at = call
    with pytest.raises(CommunicationError, match=r"rank 1 raised ValueError \(step 0.*the toy broke") as caught:
        world.capture()
    assert isinstance(caught.value.__cause__, ValueError), moment
    assert world.process.counts.captures == (call > 2)
    assert world.cluster.call(lambda: int(torch.ones(3).sum())) == 3, "no capture is left open on the thread"
    again = RecordedGraphs()
    again.begin()
    again.abandon()


@interpreted
def test_a_rank_that_waits_for_the_device_while_capturing(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(dp=2)
    monkeypatch.setattr(Toy, "__call__", lambda toy, steps, caches: steps[0].token_ids.nonzero())
    with pytest.raises(CommunicationError, match=r"rank 0 raised CaptureError.*aten\.nonzero.* waits for the device"):
        world.capture()


@interpreted
def test_ranks_that_take_different_sizes_are_named(make_world: Callable[..., World]) -> None:
    world = make_world(dp=2)
    world.capture()
    with pytest.raises(CommunicationError, match=r"replay of a step of 2 rows.*replay of a step of 4 rows"):
        world.cluster.run(lambda rank: world.ranks[rank].run(StepPlan(), group_step((2, 4)[rank])))


@interpreted
def test_a_rank_that_does_not_come_is_named(make_world: Callable[..., World]) -> None:
    world = make_world(dp=2)
    world.capture()
    with pytest.raises(CommunicationError, match=r"rank 0 waits in once #\d+ of process .* for rank 1; rank 1 has ret"):
        world.cluster.run(lambda rank: world.ranks[rank].run(StepPlan(), group_step(2)) if rank == 0 else None)


@interpreted
def test_closed_twice(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.capture()
    for _ in range(2):
        world.ranks[0].close()
    assert all(graph.released for graph in world.api.graphs)


# Buffers


@st.composite
def decode_plans(draw: st.DrawFn) -> StepPlan:
    lengths = draw(st.lists(st.integers(1, 16), max_size=6))
    return decode(
        *[
            (draw(st.integers(0, 999)), length - 1, tuple(draw(st.permutations(range(8)))[: -(-length // PAGE)]))
            for length in lengths
        ]
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(plans=st.lists(st.tuples(decode_plans(), st.integers(0, 3)), min_size=1, max_size=4))
def test_buffers_hold_what_the_runner_makes(plans: list[tuple[StepPlan, int]]) -> None:
    """Of every plan in turn, whatever an earlier and larger one has left behind."""
    cache = LatentKVCache.zeros(1, num_pages=8, page_size=PAGE, latent=6, rope=2, dtype=torch.float32, device=CPU)
    with VirtualCluster(1) as cluster:
        group = virtual_groups(cluster)[0]
    runner = Runner(Toy(group.tp, group.ep), cache, 1, 0, one_form=False, device=CPU, num_heads=1)
    buffers = StepBuffers(9, max_pages=4, page_size=PAGE, device=CPU)
    for plan, extra in plans:
        n, size = plan.num_tokens, plan.num_tokens + extra
        if not size:
            continue
        buffers.fill(plan.chunks, size, num_real=[n])
        fields, wanted = buffers.fields(size), runner.inputs(plan, group_step(size))
        assert fields.token_ids.tolist() == wanted.token_ids.tolist()
        assert fields.positions[:n].tolist() == wanted.cos.tolist()
        assert fields.cache_rows.tolist() == wanted.cache_rows.tolist() + [-1] * extra
        assert fields.logit_rows.tolist() == list(range(size))
        assert int(fields.part(0, size, 0).num_real) == n
        assert fields.page_table.shape == (size, 4)
        if wanted.absorbed is not None:
            assert fields.kv_lens.tolist() == wanted.absorbed.kv_lens.tolist() + [0] * extra
            width = wanted.absorbed.page_table.shape[1]
            assert fields.page_table[:n, :width].tolist() == wanted.absorbed.page_table.tolist()
        assert fields.page_table.min() >= 0 and fields.page_table.max() < 8, "leftovers are pages too"
