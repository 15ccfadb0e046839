"""Virtual ranks that hold experts and move them, without a model around: every expert's weights are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from moe_kernels.experts import ExpertWeights, OneSlot, allocate_experts
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms, Verdict, decide
from moe_runtime.balance.schedule import LayerChange
from moe_runtime.comm.base import Communicator
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.engine.migration import OnStage
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import RebalanceState, Rules, Stage
from moe_runtime.layers.experts import Experts
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector

HIDDEN, WIDTH = 32, 16
FP8 = torch.float8_e4m3fn
Row = Sequence[int]


def inline(work: Callable[[], Decision]) -> Future[Decision]:
    """Plan at once."""
    future: Future[Decision] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - as the thread hands it on
        future.set_exception(error)
    return future


def forced(rows: dict[int, Row]) -> Decision:
    """Move these layers, whatever the loads say."""
    changes = tuple([LayerChange(layer, tuple(row), 1, 0, 1.0) for layer, row in rows.items()])
    return Decision(
        verdict=Verdict.MOVE,
        steps=1,
        num_tokens=1,
        utilisation=0.5,
        without=0.5,
        planned=0.9,
        predicted=0.9,
        num_layers=len(changes),
        num_moves=len(changes),
        saved_bytes_per_step=1.0,
        changes=changes,
    )


def expert(layer: int, logical: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[OneSlot, OneSlot]:
    """`w13 [2I, H]`, `w2 [H, I]` of one expert."""
    hidden, width = shape
    draw = torch.Generator().manual_seed(1000 * layer + logical)
    w13, w2 = torch.randn(2 * width, hidden, generator=draw), torch.randn(hidden, width, generator=draw)
    if dtype is not FP8:
        return w13.to(dtype), w2.to(dtype)
    scales = [torch.rand(2, 1, generator=draw) + 0.5, torch.rand(1, 1, generator=draw) + 0.5]
    return BlockScaled(w13.to(dtype), scales[0]), BlockScaled(w2.to(dtype), scales[1])


@dataclass
class Fixed:
    """A recorder with the same loads each time."""

    loads: Tensor

    def counts(self) -> Tensor:
        return self.loads

    def copy_counts_(self, out: Tensor) -> None:
        out.copy_(self.loads)


@dataclass
class MovingWorld:
    """`ep` ranks; layer l begins with `rows[l]`. `decisions`: what rank 0 decides, one after the other."""

    rows: list[Row]
    ep: int = 4
    dtype: torch.dtype = torch.float32
    shape: tuple[int, int] = (HIDDEN, WIDTH)
    bytes_per_step: int = 1 << 20
    on_stage: OnStage = lambda stage, rank, layer: None
    choice: ReplicaChoice = ReplicaChoice.ROUND_ROBIN
    deadline_s: float = 10.0
    now: float = 0.0
    cluster: VirtualCluster = field(init=False)
    experts: list[list[Experts]] = field(init=False)
    ranks: list[Rebalancer] = field(init=False)
    saved: list[ExpertPlacement] = field(default_factory=list)
    stages: list[tuple[Stage, int, int | None]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.placement = ExpertPlacement(torch.tensor(self.rows), max(map(max, self.rows)) + 1, self.ep)
        self.cluster = VirtualCluster(self.ep, deadline_s=60, num_threads=1)
        groups = virtual_groups(self.cluster, dp=self.ep, tp=1)
        self.experts = self.cluster.call(lambda: [self._experts(rank) for rank in range(self.ep)])
        self.selectors = self.cluster.call(lambda: [self._selector(rank) for rank in range(self.ep)])
        self.ranks = self.cluster.run(lambda rank: self._rank(rank, groups[rank].ep))

    def _experts(self, rank: int) -> list[Experts]:
        found = []
        for layer in range(len(self.rows)):
            weights = allocate_experts(
                self.placement.num_local, *self.shape, dtype=self.dtype, device=torch.device("cpu")
            )
            for slot, logical in enumerate(self.placement.local_logical(layer, rank)):
                w13, w2 = expert(layer, logical, self.shape, self.dtype)
                weights.write_slot_(slot, w13=w13, w2=w2)
            found.append(Experts(weights))
        return found

    def _selector(self, rank: int) -> ReplicaSelector:
        return self.placement.selector(rank, choice=self.choice, ranks_per_node=2, rewritable=True)

    def _rank(self, rank: int, ep: Communicator) -> Rebalancer:
        mover = Mover(ep, self.experts[rank], bytes_per_step=self.bytes_per_step)
        terms = Terms(0.9, 1, 1, mover.slot_bytes, self.bytes_per_step, 2)
        recorder = Fixed(torch.ones(len(self.rows), self.placement.num_logical, dtype=torch.int64))

        def on_stage(stage: Stage, rank: int, layer: int | None) -> None:
            self.stages.append((stage, rank, layer))
            self.on_stage(stage, rank, layer)

        return Rebalancer(
            ep,
            mover,
            selector=self.selectors[rank],
            recorder=recorder,
            placement=self.placement,
            decide=partial(self._decide, terms=terms),
            rules=Rules(1, self.deadline_s, terms, self.saved.append),
            start=inline,
            clock=lambda: self.now,
            on_stage=on_stage,
        )

    @staticmethod
    def _decide(
        loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement, terms: Terms, **_: object
    ) -> Decision:
        """Here and at once; tests put other decisions into `decide`'s place."""
        return decide(loads, steps, now=now, first=first, plan=lambda *_: [now], terms=terms)

    def step(self, *, worked: bool = True) -> RebalanceState:
        """One step of all ranks; rank 0's state."""
        self.cluster.run(lambda rank: self.ranks[rank].advance(self.steps, worked=worked))
        self.steps += 1
        return self.state

    def migrate(self) -> RebalanceState:
        """From a decision to the end of what it moves."""
        self.step()
        for _ in range(1000):
            if not self.ranks[0].moving:
                break
            self.step(worked=False)
        assert self.ranks[0]._saver.wait(10.0)
        return self.state

    @property
    def state(self) -> RebalanceState:
        states = [rank.state for rank in self.ranks]
        assert all(state == states[0] for state in states), "ranks stay together"
        return states[0]

    def check(self, rows: Sequence[Row]) -> None:
        """Every slot holds the bits of its expert, and every map leads there."""
        wanted = ExpertPlacement(torch.tensor(rows), self.placement.num_logical, self.ep)
        for rank in range(self.ep):
            for layer in range(len(rows)):
                for slot, logical in enumerate(wanted.local_logical(layer, rank)):
                    found = self.experts[rank][layer].weights.slot_tensors(slot)
                    for part, want in zip(found, _flat(expert(layer, logical, self.shape, self.dtype)), strict=True):
                        assert _bits(part) == _bits(want), f"layer {layer}, rank {rank}, slot {slot}: not {logical}"
            fresh = wanted.selector(rank, choice=self.choice, ranks_per_node=2, rewritable=True)
            own = self.selectors[rank]
            assert torch.equal(own.fixed, fresh.fixed) and torch.equal(own.replica_counts, fresh.replica_counts)
            if own.waterfill is not None and fresh.waterfill is not None:
                for ours, wanted_table in zip(own.waterfill.tables, fresh.waterfill.tables, strict=True):
                    assert torch.equal(ours, wanted_table)
            for mine, other in zip(own.rotating, fresh.rotating, strict=True):
                assert torch.equal(mine, other) if mine is not None and other is not None else mine is other
            assert torch.equal(self.ranks[rank].placement.phy2log, wanted.phy2log)

    def weights(self, rank: int, layer: int) -> ExpertWeights:
        return self.experts[rank][layer].weights


def _flat(pair: tuple[OneSlot, OneSlot]) -> list[Tensor]:
    return [part for one in pair for part in ((one.data, one.scale) if isinstance(one, BlockScaled) else (one,))]


def _bits(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


Make = Callable[..., MovingWorld]
"""Makes one, and closes it when its test has ended."""
