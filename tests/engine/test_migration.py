"""One layer on its way: maps that are checked before it commits, copies that are passed on, what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from moe_kernels.linear.packed import PackedWeight
from torch import Tensor

from moe_runtime.balance.moves import Round
from moe_runtime.comm.virtual import VirtualCommunicator
from moe_runtime.engine.mover import LayerMove, Mover
from moe_runtime.engine.rebalance_state import Stage
from moe_runtime.parallel.placement import ExpertPlacement, Move
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector
from moe_runtime.parallel.table_check import wrong_tables
from tests.engine import moving_world
from tests.engine.moving_world import MovingWorld, Row, forced

OLD: list[Row] = [[0, 1, 2, 3, 1, 2, 3, 1], [0, 1, 2, 3, 1, 2, 3, 0]]
NEW: list[Row] = [[0, 1, 0, 3, 0, 2, 0, 1], [0, 2, 2, 3, 1, 3, 3, 1]]
"""Ranks of 2 slots. Layer 0: expert 0 goes from rank 0 to all others."""
SLOT_BYTES = 3 * 32 * 16 * 4

Make = Callable[..., MovingWorld]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A world whose rank 0 decides for `new`."""
    worlds: list[MovingWorld] = []

    def one(old: list[Row] = OLD, *, new: list[Row] = NEW, **kwargs: Any) -> MovingWorld:
        monkeypatch.setattr(moving_world, "decide", lambda *args, **kwargs: forced(dict(enumerate(new))))
        worlds.append(MovingWorld(old, **kwargs))
        return worlds[-1]

    yield one
    for world in worlds:
        world.cluster.close()


# Maps


@pytest.mark.parametrize("choice", list(ReplicaChoice))
def test_every_wrong_entry_of_the_maps_is_seen(choice: ReplicaChoice) -> None:
    placement = ExpertPlacement(torch.tensor(OLD), 4, 4)
    selector = placement.selector(1, choice=choice, ranks_per_node=2, rewritable=True)
    for layer, row in enumerate(OLD):
        assert wrong_tables(selector, layer, row) is None
        assert wrong_tables(selector, layer, NEW[layer]) is not None
        tables = selector.of_layer(layer)
        for table in tables:
            flat = table.view(-1)
            for at in range(flat.numel()):
                before = flat[at].clone()
                flat[at] = (before + 1) % 8
                replica = table is tables[0] and at < 4 and row[int(flat[at])] == at
                assert (wrong_tables(selector, layer, row) is None) == replica, "another of its replicas is none"
                flat[at] = before
        assert wrong_tables(selector, layer, row) is None


@pytest.mark.parametrize("choice", list(ReplicaChoice))
@pytest.mark.parametrize("wrong", ["stay", "of another layer", "one entry"])
def test_wrong_maps_abandon_the_layer(
    make: Make, monkeypatch: pytest.MonkeyPatch, choice: ReplicaChoice, wrong: str
) -> None:
    """On one rank, and once only: maps and slots of all ranks are as before, and the next layer commits."""
    world, write, left = make(choice=choice), ReplicaSelector.write_, [1]

    def tampered(self: ReplicaSelector, layer: int, tables: tuple[Tensor, ...]) -> None:
        if self.ep_rank != 2 or not left:
            return write(self, layer, tables)
        left.clear()
        if wrong == "of another layer":
            write(self, 1 - layer, tables)
        elif wrong == "one entry":
            write(self, layer, tables)
            self.of_layer(layer)[-1].view(-1)[0] += 1
        return None

    monkeypatch.setattr(ReplicaSelector, "write_", tampered)
    if wrong == "of another layer":
        world = make(choice=choice, new=NEW[:1])
    state = world.migrate()
    assert state.num_layers_abandoned == 1 and state.last_failure is not None
    assert (state.last_failure.stage, state.last_failure.layer) == (Stage.COMMIT, 0)
    assert state.last_failure.reasons[0].startswith("rank 2: MismatchError: replica maps: ")
    if wrong != "of another layer":
        world.check([OLD[0], NEW[1]])


def test_maps_that_cannot_be_written_are_put_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails half-way, with some of a layer's tables written."""
    write, left = ReplicaSelector.write_, [1]

    def half(self: ReplicaSelector, layer: int, tables: tuple[Tensor, ...]) -> None:
        if self.ep_rank == 3 and left:
            left.clear()
            self.of_layer(layer)[0].copy_(tables[0])
            raise RuntimeError("a fault of the test")
        write(self, layer, tables)

    monkeypatch.setattr(ReplicaSelector, "write_", half)
    world = make()
    assert world.migrate().num_layers_abandoned == 1
    world.check([OLD[0], NEW[1]])


# On the way


@pytest.mark.parametrize("bytes_per_step", [4096, 1 << 20])
def test_a_rank_passes_on_what_it_receives(make: Make, monkeypatch: pytest.MonkeyPatch, bytes_per_step: int) -> None:
    """Three copies of one expert: its old rank sends fewer than three."""
    world, sent = make(bytes_per_step=bytes_per_step), [0] * 4
    original = VirtualCommunicator.all_to_all

    def watched(self: VirtualCommunicator, x: Tensor, send: Any, receive: Any, out: Tensor) -> Tensor:
        if x.dtype is torch.uint8 and world.state.layer == 0:
            sent[self.rank] += x.nbytes
        return original(self, x, send, receive, out)

    monkeypatch.setattr(VirtualCommunicator, "all_to_all", watched)
    world.migrate()
    world.check(NEW)
    slot = 2 * 4096
    assert sum(sent) == 3 * slot and sent[0] < 3 * slot and max(sent[1:]) == slot


def test_what_is_passed_on_is_checked_against_its_source(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flips on the way to rank 1, which passes it on: all ranks behind it see it."""
    world, original = make(bytes_per_step=4096), VirtualCommunicator.all_to_all
    moves: list[Move] = []

    def flip(self: VirtualCommunicator, x: Tensor, send: Any, receive: Any, out: Tensor) -> Tensor:
        got = original(self, x, send, receive, out)
        if x.dtype is torch.uint8 and world.state.layer == 0:
            change = world.ranks[0]._migration._change
            moves[:] = [] if change is None else change.moves
            if self.rank == 1 and sum(receive):
                got.view(-1)[7] ^= 4
        return got

    monkeypatch.setattr(VirtualCommunicator, "all_to_all", flip)
    state = world.migrate()
    assert state.last_failure is not None and state.last_failure.stage is Stage.CHECKSUM
    passed_on = [move for move in moves if move.via is not None]
    assert passed_on and passed_on[0].via == 2
    for move in passed_on:
        for slot in (move.via, move.target):
            text = f"expert 0 of slot {slot} arrived with other bits than slot 0 of rank 0 holds"
            assert any(text in reason for reason in state.last_failure.reasons)
    world.check([OLD[0], NEW[1]])


def test_a_packed_slot_is_unpacked_once_to_be_sent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces it goes in."""
    calls, dense = [0], PackedWeight.dense

    def counted(self: PackedWeight) -> Tensor:
        calls[0] += 1
        return dense(self)

    monkeypatch.setattr(PackedWeight, "dense", counted)
    counts = []
    for bytes_per_step in (1 << 20, 1 << 14):
        world = make([[0, 1, 2, 3]], new=[[2, 1, 0, 3]], ep=2, shape=(256, 160), bytes_per_step=bytes_per_step)
        assert not world.weights(0, 0).is_fixed
        calls[0] = 0
        world.migrate()
        counts.append(calls[0])
        world.check([[2, 1, 0, 3]])
    assert counts[0] == counts[1]


def test_what_an_abandoned_layer_was_sending_is_forgotten(make: Make) -> None:
    """Layer 1 sends the same slots as layer 0, which ends while they are on their way."""
    calls: list[Stage] = []

    def fail(stage: Stage, rank: int, layer: int | None) -> None:
        if (stage, rank, layer) == (Stage.SEND, 1, 0):
            calls.append(stage)
            if len(calls) == 8:
                raise OSError("a fault of the test")

    rows: list[Row] = [[0, 1, 2, 3], [0, 1, 2, 3]]
    new: list[Row] = [[2, 1, 0, 3], [2, 1, 0, 3]]
    world = make(rows, new=new, ep=2, shape=(256, 160), bytes_per_step=1 << 14, on_stage=fail)
    state = world.migrate()
    assert (state.num_layers_abandoned, state.num_layers_committed) == (1, 1), state.last_failure
    world.check([rows[0], new[1]])


# What is told


def test_the_cause_comes_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 does not send; that rank 0 therefore receives something else is told after it."""
    put_out = Mover.put_out

    def fail(self: Mover, change: LayerMove, pieces: Round) -> None:
        if self._ep.rank == 2:
            raise OSError("a fault of the test")
        put_out(self, change, pieces)

    monkeypatch.setattr(Mover, "put_out", fail)
    world = make([[0, 1, 2, 3, 4, 5, 6, 7]], new=[[4, 1, 2, 3, 0, 5, 6, 7]])
    failure = world.migrate().last_failure
    assert failure is not None and failure.stage is Stage.SEND and len(failure.reasons) == 2
    assert failure.reasons[0] == "rank 2: OSError: a fault of the test"
    assert failure.reasons[1].startswith("rank 0: MismatchError: expert 4 of slot 0 arrived with")


def test_bytes_between_ranks_are_counted(make: Make) -> None:
    state = make().migrate()
    assert (state.num_slots_moved, state.moved_bytes) == (3 + 3, (3 + 3) * SLOT_BYTES)
    state = make([[0, 1, 2, 3, 0, 4, 5, 6]], new=[[0, 0, 3, 2, 1, 4, 5, 6]]).migrate()
    assert (state.num_slots_moved, state.moved_bytes) == (4, SLOT_BYTES), "moves within a rank send nothing"


def test_the_budget_named_to_a_late_layer_is_the_nearest(make: Make) -> None:
    """Of the doublings: with half of it the layer would be late too."""
    world = make([[0, 1, 2, 3]], new=[[2, 3, 0, 1]], ep=2, shape=(128, 64), bytes_per_step=4096, deadline_s=5.0)
    world.step()
    for _ in range(10):
        world.step(worked=False)
    world.now += 5.1
    state = world.step(worked=False)
    # 2 slots of 24 rows at each rank: 48 rounds of one row; 11 rounds took 5.1 s, so 10 are in time.
    assert state.last_failure is not None and state.last_failure.reasons == (
        "rank 0: round 11 of 48 after balance.deadline_s=5, with balance.bytes_per_step=4096. "
        "Nearest: balance.deadline_s=24, or balance.bytes_per_step=32768.",
    )
