"""Together: something that all ranks of one process do once, when the last of them has come.

A captured graph holds the step of every rank of its process, so capture begins, ends and replays once for all of them:
virtual ranks meet for it, a process of one rank need not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moe_runtime.comm.collectives import ONCE
from moe_runtime.comm.process import Process
from moe_runtime.comm.rendezvous import Rendezvous
from moe_runtime.comm.virtual import VirtualCluster


class Together(Protocol):
    """One rank's place among the ranks of its process."""

    def once(self, what: str, act: Callable[[], None]) -> None:
        """Every rank of the process calls this with the same `what`; `act` of the first runs once, and all return.

        Collective: a rank that does not come, or comes for something else, is a CommunicationError that names it.
        """

    def close(self) -> None:
        """No further calls. Idempotent."""


class VirtualTogether:
    """A virtual rank: the last to arrive acts, on the cluster's thread."""

    def __init__(self, group: Rendezvous, rank: int) -> None:
        self._group = group
        self._rank = rank

    def once(self, what: str, act: Callable[[], None]) -> None:
        self._group.join(self._rank, ONCE, (what, act)).wait()

    def close(self) -> None:
        self._group.leave(self._rank)


def virtual_together(cluster: VirtualCluster) -> list[VirtualTogether]:
    """The places of all ranks of `cluster`, in rank order; made once."""
    group = Rendezvous(cluster.hub, "process", tuple(range(cluster.size)))
    return [VirtualTogether(group, rank) for rank in range(cluster.size)]


class ProcessTogether:
    """The one rank of a process. On a GPU the process's clock watches that what was begun completes."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def once(self, what: str, act: Callable[[], None]) -> None:
        whereabouts, overdue = self._process.whereabouts, self._process.overdue
        if whereabouts.fault is not None:
            raise whereabouts.fault
        act()
        if overdue is not None:
            overdue.reach(what, tuple(range(self._process.world)))

    def close(self) -> None: ...
