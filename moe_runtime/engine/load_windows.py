"""The loads of the steps from one decision to the next, in windows of time. W windows, L layers, E logical experts."""

from __future__ import annotations

import logging
from typing import Final

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.engine.rebalance_state import Counts

MOST_WINDOWS: Final = 16


class LoadWindows:
    """One rank's. All ranks call `step` for the same steps and `take` at the same ones.

    The loads are wanted after `interval_steps`, which are cut into windows of at least `window_steps`, as far as they
    are as many. If more steps pass, windows are merged by two. MOST_WINDOWS + 1 copies `[L, E] int64` of the counters
    are made room for at the start, where these are. How many windows there are depends on the steps alone: a rank
    that cannot read its counters gives no tokens to that window, and gives them to the next one.
    """

    def __init__(self, recorder: Counts, *, interval_steps: int, window_steps: int) -> None:
        self._recorder = recorder
        parts = max(1, min(MOST_WINDOWS, interval_steps // window_steps))
        self._first_size = -(-interval_steps // parts)
        first = recorder.counts()
        self._marks = first.new_empty(MOST_WINDOWS + 1, *first.shape)
        self._marks[0].copy_(first)
        self._size, self._open_steps, self._num_windows = self._first_size, 0, 0

    def step(self) -> None:
        """A step with tokens has ended."""
        if self._num_windows == MOST_WINDOWS:
            for window in range(1, MOST_WINDOWS // 2 + 1):
                self._marks[window].copy_(self._marks[2 * window])
            self._num_windows //= 2
            self._size *= 2
        self._open_steps += 1
        if self._open_steps == self._size:
            self._end_window()

    def take(self, ep: Communicator) -> Tensor:
        """Collective: `[W, L, E] int64`, summed over ranks, of the steps since the last time; 1 <= W <= MOST_WINDOWS.

        What is left over is a window of its own, if it has half the steps of one.
        """
        if 0 < 2 * self._open_steps < self._size and self._num_windows:
            self._num_windows -= 1
        if self._open_steps or not self._num_windows:
            self._end_window()
        marks, count = self._marks, self._num_windows
        for window in range(count):
            torch.sub(marks[window + 1], marks[window], out=marks[window])
        loads = ep.all_reduce(marks[:count])
        marks[0].copy_(marks[count])
        self._size, self._open_steps, self._num_windows = self._first_size, 0, 0
        return loads

    def _end_window(self) -> None:
        """With a mark of the counters as they are now; as they were, where they cannot be read."""
        before, mark = self._marks[self._num_windows], self._marks[self._num_windows + 1]
        mark.copy_(before)
        try:
            self._recorder.copy_counts_(mark)
        except Exception as error:  # noqa: BLE001 - no reason to end serving
            mark.copy_(before)
            logging.getLogger(__name__).warning(
                "rebalance: a rank's tokens of the last %d steps are given to the next window: %s: %s",
                self._open_steps,
                type(error).__name__,
                error,
            )
        self._num_windows, self._open_steps = self._num_windows + 1, 0
