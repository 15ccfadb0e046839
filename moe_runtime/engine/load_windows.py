"""The loads of the steps from one decision to the next, in windows of time. W windows, L layers, E logical experts."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.engine.rebalance_state import Counts

MOST_WINDOWS: Final = 16


class LoadWindows:
    """One rank's. All ranks call `step` for the same steps and `take` at the same ones.

    The loads are wanted after `interval_steps`, which are cut into windows of at least `window_steps`, as far as they
    are as many. If more steps pass, windows are merged by two. A rank keeps at most MOST_WINDOWS + 1 copies
    `[L, E] int64` of its counters, where these are.
    """

    def __init__(self, recorder: Counts, *, interval_steps: int, window_steps: int) -> None:
        self._recorder = recorder
        parts = max(1, min(MOST_WINDOWS, interval_steps // window_steps))
        self._first_size = -(-interval_steps // parts)
        self._size, self._open_steps, self._marks = self._first_size, 0, [recorder.counts()]

    def step(self) -> None:
        """A step with tokens has ended."""
        if len(self._marks) > MOST_WINDOWS:  # the first mark begins the first window
            del self._marks[1::2]
            self._size *= 2
        self._open_steps += 1
        if self._open_steps == self._size:
            self._marks.append(self._recorder.counts())
            self._open_steps = 0

    def take(self, ep: Communicator) -> Tensor:
        """Collective: `[W, L, E] int64`, summed over ranks, of the steps since the last time; 1 <= W <= MOST_WINDOWS.

        What is left over is a window of its own, if it has half the steps of one.
        """
        now = self._recorder.counts()
        if self._open_steps:
            if 2 * self._open_steps < self._size and len(self._marks) > 1:
                self._marks.pop()
            self._marks.append(now)
        if len(self._marks) == 1:
            self._marks.append(now)
        loads = ep.all_reduce(torch.stack([after - before for before, after in pairwise(self._marks)]))
        self._size, self._open_steps, self._marks = self._first_size, 0, [now]
        return loads
