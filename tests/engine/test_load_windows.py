"""The windows of loads that live rebalancing decides by."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.engine.load_windows import MOST_WINDOWS, LoadWindows


@dataclass
class Counter:
    """One layer, one expert."""

    loads: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    copies: int = 0
    fails: bool = False

    def counts(self) -> Tensor:
        return self.loads.clone()

    def copy_counts_(self, out: Tensor) -> None:
        self.copies += 1
        if self.fails:
            out.zero_()
            raise MemoryError("no room")
        out.copy_(self.loads)


def taken(interval: int, window: int, steps: int) -> list[int]:
    """How many steps each window has, of two ranks that count 1 and 2 in each step."""
    cluster = VirtualCluster(2, deadline_s=10, num_threads=1)
    groups = virtual_groups(cluster, dp=2, tp=1)

    def run(rank: int) -> Tensor:
        counter = Counter()
        windows = LoadWindows(counter, interval_steps=interval, window_steps=window)
        counter.loads += 100
        windows.step()
        windows.take(groups[rank].ep)  # whatever was before does not count
        counter.copies = 0
        for _ in range(steps):
            counter.loads += rank + 1
            windows.step()
        found = windows.take(groups[rank].ep)
        assert counter.copies <= 1 + max(steps, 1)
        return found

    both = cluster.run(run)
    cluster.close()
    assert torch.equal(both[0], both[1]) and both[0].shape[1:] == (1, 1)
    loads = both[0].flatten()
    assert (loads % 3 == 0).all() and int(loads.sum()) == 3 * steps and len(loads) <= MOST_WINDOWS
    return (loads // 3).tolist()


@pytest.mark.parametrize(
    ("interval", "window", "steps", "wanted"),
    [
        (12, 3, 12, [3, 3, 3, 3]),
        (12, 100, 12, [12]),
        (14, 4, 14, [5, 5, 4]),
        (13, 6, 13, [7, 6]),
        (12, 3, 13, [3, 3, 3, 4]),
        (12, 3, 14, [3, 3, 3, 3, 2]),
        (40, 1, 40, [3] * 12 + [4]),
        (16, 1, 16, [1] * 16),
        (16, 1, 17, [2] * 8 + [1]),
        (16, 1, 70, [8] * 8 + [6]),
        (4, 2, 1, [1]),
        (4, 2, 0, [0]),
    ],
)
def test_windows_of_an_interval(interval: int, window: int, steps: int, wanted: list[int]) -> None:
    """What is left over is a window of its own from half a window on; too many windows are merged by two."""
    assert taken(interval, window, steps) == wanted


def test_a_rank_that_cannot_read_its_counters() -> None:
    """There are as many windows as on the others. Its tokens are in a later one, of the next interval at the last."""
    cluster = VirtualCluster(2, deadline_s=10, num_threads=1)
    groups = virtual_groups(cluster, dp=2, tp=1)

    def run(rank: int) -> list[list[int]]:
        counter = Counter()
        windows = LoadWindows(counter, interval_steps=8, window_steps=2)
        taken = []
        for step in range(16):
            counter.loads += rank + 1
            counter.fails = rank == 1 and step in (3, 7)
            windows.step()
            if step % 8 == 7:
                taken.append(windows.take(groups[rank].ep).flatten().tolist())
        return taken

    both = cluster.run(run)
    cluster.close()
    assert both[0] == both[1] == [[6, 2, 10, 2], [10, 6, 6, 6]]
