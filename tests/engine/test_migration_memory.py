"""Memory that is lacking while experts move: whichever it is, the layer is abandoned and serving goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_runtime.comm.virtual import VirtualCommunicator
from moe_runtime.engine import mover
from moe_runtime.engine.rebalance_state import Stage
from tests.engine import moving_world
from tests.engine.moving_world import FP8, MovingWorld, Row, forced

OLD: list[Row] = [[0, 1, 2, 3]]
NEW: list[Row] = [[2, 1, 3, 0]]
"""Rank 1 sends a slot, receives one and copies one."""


class NoRoom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operation number `failing`, counted from 1, that takes memory where `counts()` holds raises MemoryError, and
    so does every later one."""

    def __init__(self, counts: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = counts
        self.failing = 0
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._counts():
            return result
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} - {None}
        fresh = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _storage(x) not in known]
        if fresh:
            self.number += 1
            if self.failing and self.number >= self.failing:
                raise MemoryError(f"no room for {func}")
        return result


def _storage(x: Tensor) -> int | None:
    """None: packed for oneDNN, always new here."""
    return None if x.is_mkldnn else x.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("dtype", "shape", "bytes_per_step"),
    [(FP8, (128, 64), 1 << 14), (torch.float32, (256, 160), 1 << 20)],
    ids=["fp8 with scales", "packed"],
)
def test_whatever_memory_is_lacking(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int], bytes_per_step: int
) -> None:
    """From the n-th allocation of an interval on rank 1 has no memory, for every n; then it has some again. The sum of
    the loads over ranks is a collective like those of a step, and not counted."""
    monkeypatch.setattr(moving_world, "decide", lambda *args, **kwargs: forced({0: NEW[0]}))
    monkeypatch.setattr(mover, "checksum", lambda data: data.view(-1).view(torch.uint8).sum().expand(2))
    world = MovingWorld(OLD, ep=2, dtype=dtype, shape=shape, bytes_per_step=bytes_per_step)
    hub, all_reduce, summing = world.cluster._hub, VirtualCommunicator.all_reduce, set[int]()

    def watched(self: VirtualCommunicator, x: Tensor) -> Tensor:
        summing.add(self.rank)
        found = all_reduce(self, x)
        summing.remove(self.rank)
        return found

    monkeypatch.setattr(VirtualCommunicator, "all_reduce", watched)
    mode = NoRoom(lambda: hub.running == 1 and 1 not in summing)
    world.cluster.call(mode.__enter__)
    try:
        while not world.state.num_layers_committed:
            mode.failing, mode.number = mode.failing + 1, 0
            state = world.migrate()
            mode.failing, failed = 0, mode.failing
            if not state.num_layers_committed:
                assert state.num_layers_abandoned == failed and state.last_failure is not None
                assert "rank 1: MemoryError" in str(state.last_failure)
                if state.last_failure.stage in (Stage.CANARY, Stage.COMMIT) or failed % 16 == 0:
                    world.check(OLD)
            mode.failing = failed
        world.check(NEW)
        assert mode.failing > 20, "every allocation was lacking once"
    finally:
        world.cluster.call(lambda: mode.__exit__(None, None, None))  # type: ignore[no-untyped-call]
        world.cluster.close()
