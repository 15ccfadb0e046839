"""Experts on the move between virtual ranks: what arrives, what is checked, what a failure leaves behind."""

from __future__ import annotations

import math
import threading
from itertools import count
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from moe_runtime.balance.moves import layer_moves, num_rounds
from moe_runtime.comm.virtual import VirtualCommunicator
from moe_runtime.engine.disk import DiskThread
from moe_runtime.engine.rebalance_state import Activity, Stage
from moe_runtime.errors import CommunicationError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from tests.engine import moving_world
from tests.engine.moving_world import FP8, Make, Row, forced

BUDGET: Final = {"slot_bytes": 3 * 32 * 16 * 4, "bytes_per_step": 4096, "num_local": 2}
OLD: list[Row] = [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 4, 5, 6, 1]]
NEW: list[Row] = [[4, 1, 0, 3, 2, 6, 5, 3], [6, 1, 2, 0, 4, 5, 3, 2], [0, 1, 2, 3, 4, 5, 6, 4]]
"""Swaps between ranks, chains, a local move (layer 1: expert 6), copies that change hands, a slot that stays."""


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 decides for NEW."""
    monkeypatch.setattr(moving_world, "decide", lambda *args, **kwargs: forced(dict(enumerate(NEW))))


# What arrives


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (32, 16)),
        (torch.bfloat16, (32, 16)),
        (torch.float16, (31, 5)),
        (FP8, (128, 64)),
        (torch.float32, (256, 160)),
    ],
    ids=["fp32", "bf16", "odd sizes", "fp8 with scales", "packed"],
)
def test_every_form_of_weights(make: Make, decided: None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    world = make(OLD, dtype=dtype, shape=shape)
    assert world.weights(0, 0).is_fixed == (shape != (256, 160))
    world.check(OLD)
    state = world.migrate()
    assert (state.activity, state.num_layers_committed, state.num_layers_abandoned) == (Activity.WATCHING, 3, 0)
    assert state.last_failure is None and state.num_migrations == 1
    world.check(NEW)
    assert [placement.phy2log.tolist() for placement in world.saved] == [NEW]


@pytest.mark.parametrize("choice", list(ReplicaChoice))
def test_maps_and_storage_stay_where_they_are(make: Make, decided: None, choice: ReplicaChoice) -> None:
    """Two migrations, there and back; what a captured graph would read has not moved."""
    world = make(OLD, choice=choice)
    slots = [own.slot_tensors(slot) for rank in range(4) for own in [world.weights(rank, 0)] for slot in range(2)]
    before = [part.data_ptr() for parts in slots for part in parts]
    maps = [list(selector.addresses) for selector in world.selectors]
    world.migrate()
    world.check(NEW)
    slots = [own.slot_tensors(slot) for rank in range(4) for own in [world.weights(rank, 0)] for slot in range(2)]
    assert before == [part.data_ptr() for parts in slots for part in parts]
    assert maps == [list(selector.addresses) for selector in world.selectors]


def test_no_step_carries_more_than_the_budget(make: Make, decided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of 6 KiB, 2 rows of 4 KiB, one of them a step."""
    world = make(OLD, bytes_per_step=4096)
    sent: dict[tuple[int, int], int] = {}
    original = VirtualCommunicator.all_to_all

    def watched(self: VirtualCommunicator, x: Tensor, send: Any, receive: Any, out: Tensor) -> Tensor:
        if x.dtype is torch.uint8:
            assert sent.setdefault((world.steps, self.rank), x.nbytes) == x.nbytes
            assert max(x.nbytes, sum(receive) * x.shape[1]) <= 4096
        return original(self, x, send, receive, out)

    monkeypatch.setattr(VirtualCommunicator, "all_to_all", watched)
    progress = [world.step().layer_progress]
    while world.ranks[0].moving:
        progress.append(world.step(worked=False).layer_progress)
    assert max(progress) >= 0.5 and world.state.layers_left == 0, "progress shows"
    world.check(NEW)
    assert len({step for step, _ in sent}) >= 6, "a layer takes several steps"


def test_a_layer_commits_on_all_ranks_between_the_same_steps(make: Make, decided: None) -> None:
    world = make(OLD)
    world.step()
    for layer in range(3):
        world.check([*NEW[:layer], *OLD[layer:]])
        world.step(worked=False)
    world.check(NEW)


def test_ranks_that_idle_move_on(make: Make, decided: None) -> None:
    world = make(OLD)
    assert world.step(worked=False).activity is Activity.WATCHING, "no tokens, no decision"
    assert world.step().activity is Activity.MOVING
    world.migrate()
    world.check(NEW)


# What a failure leaves behind


@pytest.mark.parametrize("stage", [Stage.SEND, Stage.CHECKSUM, Stage.CANARY, Stage.COMMIT])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_fails_at_a_stage(make: Make, decided: None, stage: Stage, rank: int) -> None:
    """The layer that moves then is abandoned on all ranks; those before and after it are not."""

    def fail(at: Stage, where: int, layer: int | None) -> None:
        if (at, where, layer) == (stage, rank, 1):
            raise OSError("a fault of the test")

    world = make(OLD, on_stage=fail)
    state = world.migrate()
    assert (state.num_layers_committed, state.num_layers_abandoned) == (2, 1)
    assert state.last_failure is not None
    assert (state.last_failure.stage, state.last_failure.layer) == (stage, 1)
    assert f"rank {rank}: OSError: a fault of the test" in state.last_failure.reasons
    world.check([NEW[0], OLD[1], NEW[2]])
    world.on_stage = lambda stage, rank, layer: None
    assert world.migrate().num_layers_committed == 5
    world.check(NEW)


def test_every_commit_stage_is_undone(make: Make, decided: None) -> None:
    """Fail at the n-th thing that a rank does for a layer, for every n: never a mixture."""
    for number in count():
        seen: list[Stage] = []

        def fail(stage: Stage, rank: int, layer: int | None, seen: list[Stage] = seen, number: int = number) -> None:
            if (rank, layer) == (1, 0):
                seen.append(stage)
                if len(seen) == number + 1:
                    raise ValueError("a fault of the test")

        world = make(OLD, on_stage=fail)
        state = world.migrate()
        failed = len(seen) == number + 1
        assert state.num_layers_abandoned == failed, seen
        world.check([OLD[0] if failed else NEW[0], *NEW[1:]])
        world.cluster.close()
        if not failed:
            break
    assert len(seen) >= 11, "the last run has no fault left to inject"


@pytest.mark.parametrize(
    ("dtype", "shape", "at"),
    [(torch.float32, (32, 16), 100), (FP8, (128, 64), 100), (FP8, (128, 64), 2 * 64 * 128 + 5)],
    ids=["fp32", "fp8", "a scale"],
)
def test_a_bit_that_flips_on_the_way(
    make: Make,
    decided: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, int],
    at: int,
) -> None:
    world = make(OLD, dtype=dtype, shape=shape)
    original = VirtualCommunicator.all_to_all

    def flip(self: VirtualCommunicator, x: Tensor, send: Any, receive: Any, out: Tensor) -> Tensor:
        got = original(self, x, send, receive, out)
        if x.dtype is torch.uint8 and self.rank == 2 and world.state.layer == 0:
            got.view(-1)[at] ^= 4
        return got

    monkeypatch.setattr(VirtualCommunicator, "all_to_all", flip)
    state = world.migrate()
    assert state.last_failure is not None and state.last_failure.stage is Stage.CHECKSUM
    (reason,) = state.last_failure.reasons
    assert reason.startswith("rank 2: MismatchError: expert 2 of slot 4 arrived with other bits than slot 2 of rank 1")
    world.check([OLD[0], *NEW[1:]])


@pytest.mark.parametrize("tampered", [Stage.CANARY, Stage.COMMIT])
def test_a_slot_that_is_not_what_was_checked(
    make: Make, decided: None, monkeypatch: pytest.MonkeyPatch, tampered: Stage
) -> None:
    """Bits that change after the staging set was checked: the slot's own checksum finds them, and where they change
    after that, the canary. The old weights come back, whatever the new ones were."""

    def tamper(stage: Stage, rank: int, layer: int | None) -> None:
        if (stage, rank, layer) == (tampered, 1, 2) and not done:
            done.append(stage)
            weights = world.ranks[1]._mover._staging if stage is Stage.COMMIT else world.weights(1, 2)
            weights.slot_tensors(1)[0].mul_(2)

    done: list[Stage] = []
    wanted = [0, 1, 2, 4, 3, 5, 6, 1]
    monkeypatch.setattr(moving_world, "decide", lambda *args, **kwargs: forced({2: wanted}))
    world = make(OLD, on_stage=tamper)
    state = world.migrate()
    assert state.num_layers_abandoned == 1 and state.last_failure is not None
    assert state.last_failure.stage is tampered
    how = "gives canary outputs with" if tampered is Stage.CANARY else "was written with"
    assert state.last_failure.reasons[0].startswith(f"rank 1: MismatchError: expert 4 of slot 3 {how} other bits")
    world.check(OLD)


def test_a_layer_that_takes_too_long_ends_its_migration(make: Make, decided: None) -> None:
    """Slots of 2 rows, one a step; the next decision waits longer each time, and as long as at first after a commit."""
    world = make(OLD, bytes_per_step=4096, deadline_s=5.0)
    waited = []
    for _ in range(5):
        steps = 1
        while world.step().activity is not Activity.MOVING:
            steps += 1
        waited.append(steps)
        world.step(worked=False)
        world.now += 5.1
        state = world.step(worked=False)
        assert state.activity is Activity.WATCHING, "the other layers are not tried"
    assert waited == [1, 2, 4, 8, 8]
    assert (state.num_layers_abandoned, state.num_layers_dropped, state.num_layers_committed) == (5, 10, 0)
    assert state.last_failure is not None and state.last_failure.stage is Stage.DEADLINE
    count = num_rounds(layer_moves(0, OLD[0], NEW[0], num_local=2, ranks_per_node=2, slot_steps=2), **BUDGET)
    assert state.last_failure.reasons == (
        f"rank 0: round 2 of {count} after balance.deadline_s=5, with balance.bytes_per_step=4096. "
        f"Nearest: balance.deadline_s={math.ceil(5.1 * count / 2) + 1}, or balance.bytes_per_step=16384.",
    )
    world.check(OLD)
    for _ in range(8):
        world.migrate()
    assert world.state.num_layers_committed == 3 and world.state.intervals == 1
    world.check(NEW)


@pytest.mark.parametrize("what", ["expert slots", "replica maps"])
def test_storage_that_has_moved_is_a_fault_like_others(make: Make, decided: None, what: str) -> None:
    """Captured graphs would read what is no longer there. Told before the vote, so nothing is committed anywhere."""
    world = make(OLD)
    holder = world.ranks[2]._mover if what == "expert slots" else world.ranks[2]._migration
    holder._addresses = [0]
    state = world.migrate()
    assert state.num_layers_abandoned == 3 and state.last_failure is not None
    assert state.last_failure.stage is Stage.COMMIT
    assert state.last_failure.reasons == (f"rank 2: MismatchError: {what} have moved in memory",)
    world.check(OLD)


def test_a_rank_that_does_not_come_is_named(make: Make, decided: None) -> None:
    """No migration waits for ever: the communicator's own deadline ends it, as it ends a step."""
    world = make(OLD)
    world.step()
    with pytest.raises(CommunicationError, match="rank 2 has returned"):
        world.cluster.run(lambda rank: None if rank == 2 else world.ranks[rank].advance(1, worked=True))


# What goes wrong beside a migration


def test_ranks_with_other_forms_of_weights_move_nothing(make: Make, decided: None) -> None:
    world = make(OLD)
    world.ranks[3]._mover._form = ()
    state = world.migrate()
    assert state.activity is Activity.OFF and "different forms" in str(state.last_failure)
    assert world.step().activity is Activity.OFF
    world.check(OLD)


def test_a_placement_that_cannot_be_saved(make: Make, decided: None) -> None:
    world = make(OLD)

    def full(placement: object) -> None:
        raise ValueError("disk full")

    first, failures = world.ranks[0], []
    first._saver._write = full
    world.migrate()
    first.advance(9, worked=False)
    failures.append(first.state.last_failure)
    for _ in range(2):
        first.close()
        failures.append(first.state.last_failure)
    assert failures[0] is not failures[1] and failures[1] is failures[2], "it is tried again at the end, once"
    for failure in failures:
        assert failure is not None and failure.stage is Stage.SAVE and "ValueError: disk full" in str(failure)
    assert first.state.num_layers_committed == 3, "serving and the moves are not touched by it"


def test_no_thread_for_a_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    written = list[ExpertPlacement]()
    saver = DiskThread(written.append, name="placement-saver")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        saver.offer(placement := ExpertPlacement(torch.tensor([[0, 1]]), 2, 2))
    assert saver.wait(0) and saver.take_failure() == "RuntimeError: can't start new thread"
    saver.offer(placement)
    assert saver.wait(30) and written == [placement] and saver.take_failure() is None


def test_a_disk_that_hangs_holds_nobody_up(make: Make, decided: None) -> None:
    """One thread writes; of the placements that wait, the newest is written."""
    go, written = threading.Event(), list[int]()

    def write(placement: ExpertPlacement) -> None:
        go.wait(30)
        written.append(int(placement.phy2log[0, 0]))

    saver = DiskThread(write, name="placement-saver")
    for expert in range(4):
        saver.offer(ExpertPlacement(torch.tensor([[expert, *(set(range(4)) - {expert})]]), 4, 2))
        while expert == 0 and saver._waiting:
            pass
    assert not saver.wait(0.01) and threading.active_count() < 10
    world = make(OLD, deadline_s=0.01)
    world.ranks[0]._saver = saver
    world.ranks[0].close()
    assert "not written within balance.deadline_s=0.01" in str(world.ranks[0].state.last_failure)
    go.set()
    assert saver.wait(30) and written == [0, 3]
