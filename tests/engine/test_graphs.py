"""Decode steps as captured graphs: where there are any, their buffers, and ranks that capture and replay together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import backends
from moe_kernels.mla import LatentCache
from moe_models.base import ModelConfig
from torch import Tensor

from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.cli.doctor import doctor
from moe_runtime.comm.base import Communicator
from moe_runtime.comm.overdue import Completable, Overdue
from moe_runtime.comm.together import ProcessTogether, virtual_together
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.config import EngineConfig, RuntimeConfig
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.cuda_graph import CudaGraphs
from moe_runtime.engine.graphs import GraphCounts, ProcessGraphs, RankGraphs
from moe_runtime.engine.plan import ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.engine.step_buffers import StepBuffers
from moe_runtime.errors import CommunicationError, ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.launch.graphs import graphs_mode
from moe_runtime.launch.wire import decode_run, encode_run
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


# torch's own graphs, in front of a stand-in for torch.cuda: the order of the calls


class FakeCuda:
    """What `CudaGraphs` calls, written down. `fails`: the call that raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails = ""
        self.current = "main"
        cuda = self

        class Stream:
            device = torch.device("cuda", 1)

            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                cuda.call(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(self, pool: str, capture_error_mode: str) -> None:
                cuda.call(f"begin in {pool}, {capture_error_mode}, on {cuda.current}")

            def capture_end(self) -> None:
                cuda.call("end")

            def replay(self) -> None:
                cuda.call(f"replay on {cuda.current}")

            def reset(self) -> None:
                cuda.call("reset")

        def set_stream(stream: Stream) -> None:
            self.current = stream.name

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(self.current))
        monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device="": self.call(f"synchronize {device}".rstrip()))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.call("empty_cache"))

    def call(self, what: str) -> None:
        self.calls.append(what)
        if self.fails and what.startswith(self.fails):
            raise RuntimeError(f"CUDA refuses {what}")


def test_torch_graphs_capture_beside_the_stream_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    api = CudaGraphs()
    api.warm()
    assert cuda.current == "side", "what is made on first use is made for the stream of the capture"
    api.begin()
    graph = api.end()
    assert cuda.current == "main"
    graph.replay()
    graph.release()
    graph.release()
    assert cuda.calls == [
        "side waits for main",
        "synchronize",
        "empty_cache",
        "begin in pool, thread_local, on side",
        "end",
        "main waits for side",
        "replay on main",
        "synchronize cuda:1",  # whoever releases, it may have another device current
        "reset",
    ]


@pytest.mark.parametrize("fails", ["synchronize", "begin", "end"])
def test_torch_graphs_leave_the_stream_after_a_failure(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    cuda = FakeCuda(monkeypatch)
    api = CudaGraphs()
    api.warm()
    cuda.fails = fails
    if fails == "end":
        api.begin()
    with pytest.raises(RuntimeError, match=f"CUDA refuses {fails}"):
        (api.end if fails == "end" else api.begin)()
    api.abandon()
    api.abandon()
    assert cuda.current == "main"
    cuda.fails = ""
    api.begin()
    with pytest.raises(RuntimeError, match="inside a capture"):
        api.begin()
    api.abandon()
    assert cuda.current == "main" and cuda.calls[-2:] == ["reset", "main waits for side"]


def test_a_failed_device_hides_no_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    api = CudaGraphs()
    api.warm()
    cuda.fails = "main waits for side"
    api.abandon()
    assert cuda.current == "main" and cuda.calls[-1] == cuda.fails


class Clock(Overdue):
    """Says what it is given to watch."""

    def __init__(self, added: list[tuple[str, tuple[int, ...], bool]]) -> None:
        self._added = added

    def add(self, label: str, ranks: Sequence[int], work: Completable) -> None:
        self._added.append((label, tuple(ranks), work.is_completed()))


def test_a_replay_that_hangs_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it on the host, so the clock of the process's operations watches it."""
    added: list[tuple[str, tuple[int, ...], bool]] = []
    process = SimpleNamespace(
        whereabouts=SimpleNamespace(fault=None),
        overdue=Clock(added),
        world=3,
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    together, acts = ProcessTogether(process), list[int]()  # type: ignore[arg-type]
    together.once("replay", lambda: acts.append(1))
    capturing[0] = True
    together.once("capture", lambda: acts.append(2))
    assert acts == [1, 2] and added == [("replay", (0, 1, 2), False)]
    process.whereabouts.fault = CommunicationError("rank 2 is gone")
    with pytest.raises(CommunicationError, match="rank 2 is gone"):
        together.once("replay", lambda: acts.append(3))


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


# Whether


@pytest.mark.parametrize(
    ("words", "why", "remedy"),
    [
        ("device=cpu", "device=cpu has no CUDA graphs", "device=cuda"),
        ("engine.padding=own", "engine.padding=own gives every DP group rows of its own", "engine.padding=auto"),
        ("engine.dispatch_buffer_bytes=512KiB engine.cuda_graph_sizes=[64]", "cuts steps of 64 rows", "or more"),
    ],
)
def test_what_stands_against_graphs(words: str, why: str, remedy: str) -> None:
    config, model = run_of(f"device=cuda dispatch=all_gather ep=4 {words}")
    assert graphs_mode(config, model)[0] == "off"
    assert why in graphs_mode(config, model).reason
    asked = replace(config, engine=replace(config.engine, cuda_graphs="on"))
    with pytest.raises(ConfigError, match=rf"engine.cuda_graphs=on: .*Set .*{remedy}") as caught:
        graphs_mode(asked, model)
    assert why in str(caught.value)


def test_where_nothing_stands_against_graphs() -> None:
    mode, reason, sizes = graphs_mode(*run_of("device=cuda dispatch=all_gather ep=8 tp=4 engine.max_num_seqs=30"))
    assert (mode, sizes) == ("on", (4, 8, 16, 24, 32))
    assert "up to 32 rows per DP group, in 5 sizes" in reason
    found = graphs_mode(*run_of("device=cuda dispatch=local engine.cuda_graph_sizes=[8,1] engine.max_num_seqs=30"))
    assert found.sizes == (1, 8) and "9 to 30 tokens run without" in found.reason
    assert graphs_mode(*run_of("device=cuda dispatch=local engine.cuda_graphs=off")).mode == "off"


@pytest.mark.parametrize("words", ["device=cpu", "device=cuda engine.cuda_graphs=off", "device=cuda dispatch=local"])
def test_sizes_that_are_none(words: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.cuda_graph_sizes=\[4, 0\]: .*at least 1"):
        graphs_mode(*run_of(f"{words} engine.cuda_graph_sizes=[4,0]"))


def run_of(words: str) -> tuple[RuntimeConfig, ModelConfig]:
    problems: list[Exception] = []
    composed = compose(words.split(), report=problems.append)  # no CUDA device here
    return composed.config, composed.model


def test_sizes_cross_between_processes() -> None:
    composed = compose(["engine.cuda_graph_sizes=[1,4]"])
    assert composed.config.engine.cuda_graph_sizes == (1, 4)
    assert decode_run(encode_run(composed)).config == composed.config
    assert compose(["engine.cuda_graph_sizes=null"]).config.engine == EngineConfig()


def test_doctor_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["engine.cuda_graphs=on"]) == 1
    assert "device=cpu has no CUDA graphs. Set device=cuda" in capsys.readouterr().out
    assert doctor([]) == 0
    assert "off: device=cpu has no CUDA graphs" in capsys.readouterr().out
