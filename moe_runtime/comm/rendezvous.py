"""Rendezvous: where the ranks of one group meet. The last to arrive computes the results of all, in rank order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from moe_runtime.comm.checks import show_ranks, show_signature
from moe_runtime.comm.collectives import Op
from moe_runtime.comm.hub import Awaited, Hub
from moe_runtime.errors import CommunicationError

P = TypeVar("P")
R = TypeVar("R")


class Meeting(Generic[P, R]):
    """One collective of one group. `results` are there once all have come."""

    __slots__ = ("absent", "first", "group", "number", "op", "payloads", "results", "signature", "waiting")

    def __init__(self, group: Rendezvous, op: Op[P, R], number: int) -> None:
        self.group = group
        self.op = op
        self.number = number
        self.payloads: list[P | None] = [None] * len(group.ranks)
        self.signature: tuple[object, ...] | None = None
        self.first = -1
        self.absent = len(group.ranks)
        self.waiting: list[int] = []
        self.results: Sequence[R] | None = None

    def missing(self) -> tuple[int, ...]:
        joined = self.group.counts
        return tuple(rank for member, rank in enumerate(self.group.ranks) if joined[member] <= self.number)

    def __str__(self) -> str:
        return f"{self.op.name} #{self.number} of {self.group.name}"


class Ticket(Generic[R]):
    """One rank's claim on a meeting's result."""

    __slots__ = ("_meeting", "_member")

    def __init__(self, meeting: Meeting[Any, R], member: int) -> None:
        self._meeting = meeting
        self._member = member

    def wait(self) -> R:
        meeting = self._meeting
        results = meeting.results
        if results is None:
            group = meeting.group
            rank = group.ranks[self._member]
            group.hub.check_caller(rank)
            meeting.waiting.append(rank)
            group.hub.block(rank, meeting)
            results = meeting.results
            assert results is not None, "only the last to arrive wakes the others"
        return results[self._member]


@dataclass(slots=True)
class Channel:
    """Messages from one rank to another: sent and not yet received, or awaited and not yet sent."""

    group: Rendezvous
    source: int
    target: int
    mail: deque[Tensor] = field(default_factory=deque)
    sent: int = 0
    received: int = 0
    blocked: bool = False

    def missing(self) -> tuple[int, ...]:
        return (self.target,) if self.mail else (self.source,)

    def __str__(self) -> str:
        if self.mail:
            return f"send #{self.received} of {self.group.name} from rank {self.source}"
        return f"recv #{self.received} of {self.group.name}"


class Rendezvous:
    """All collectives and messages of one group. Members are group ranks; `ranks` their world ranks."""

    def __init__(self, hub: Hub, name: str, ranks: tuple[int, ...]) -> None:
        self.hub = hub
        self.name = name
        self.ranks = ranks
        self.counts = [0] * len(ranks)
        """Collectives that each member has joined."""
        self._open: dict[int, Meeting[Any, Any]] = {}
        self._channels: dict[tuple[int, int], Channel] = {}
        for rank in ranks:
            hub.groups[rank].append(self)

    def join(self, member: int, op: Op[P, R], payload: P) -> Ticket[R]:
        """Enter the member's next collective; the result is there once all members have entered it."""
        hub = self.hub
        hub.check_caller(self.ranks[member])
        number = self.counts[member]
        meeting: Meeting[P, R] | None = self._open.get(number)
        signature = op.signature(payload)
        if meeting is None:
            meeting = self._open[number] = Meeting(self, op, number)
            meeting.signature = signature
            meeting.first = member
        elif meeting.op is not op or meeting.signature != signature:
            self._disagree(meeting, member, op, signature)
        self.counts[member] = number + 1
        meeting.payloads[member] = payload
        meeting.absent -= 1
        if not meeting.absent:
            self._complete(meeting, member)
        return Ticket(meeting, member)

    def _complete(self, meeting: Meeting[P, R], member: int) -> None:
        try:
            # All payloads are set: `absent` is 0.
            meeting.results = meeting.op.complete(meeting.payloads, self.ranks)  # type: ignore[arg-type]
        except RuntimeError as error:
            place = self.hub.locations[self.ranks[member]]
            self.hub.fail(CommunicationError(f"{meeting} ({place}) of {show_ranks(self.ranks)}: {error}"))
        meeting.payloads = []
        del self._open[meeting.number]
        if meeting.waiting:
            self.hub.wake(meeting.waiting)

    def _disagree(self, meeting: Meeting[Any, Any], member: int, op: Op[P, R], signature: tuple[object, ...]) -> None:
        rank, first = self.ranks[member], self.ranks[meeting.first]
        here, there = self.hub.locations[rank], self.hub.locations[first]
        verb = "waits in" if first in meeting.waiting else "has begun"
        mine, theirs = "", ""
        if meeting.op is op:
            mine, theirs = (f" with {show_signature(s)}" for s in (signature, meeting.signature or ()))
        self.hub.fail(
            CommunicationError(
                f"rank {first} {verb} {meeting}{theirs} ({there}); "
                f"rank {rank} is in {op.name} #{meeting.number} of {self.name}{mine} ({here}). "
                f"All of {show_ranks(self.ranks)} must make the same calls in the same order with fitting inputs."
            )
        )

    def send(self, x: Tensor, member: int, target: int) -> None:
        hub = self.hub
        hub.check_caller(self.ranks[member])
        channel = self._channel(member, target)
        if channel.target in hub.finished:
            place = f"send #{channel.sent} of {self.name} ({hub.locations[channel.source]})"
            hub.fail(CommunicationError(f"rank {channel.source} is in {place}; rank {channel.target} has returned."))
        channel.sent += 1
        channel.mail.append(x.clone())
        if channel.blocked:
            channel.blocked = False
            hub.wake([channel.target])

    def recv(self, like: Tensor, member: int, source: int) -> Tensor:
        hub = self.hub
        hub.check_caller(self.ranks[member])
        channel = self._channel(source, member)
        if not channel.mail:
            channel.blocked = True
            hub.block(channel.target, channel)
        x = channel.mail.popleft()
        if x.shape != like.shape or x.dtype != like.dtype:
            sent, expected = (show_signature((t.shape, t.dtype)) for t in (x, like))
            hub.fail(
                CommunicationError(
                    f"recv #{channel.received} of {self.name}: "
                    f"rank {channel.source} sends {sent} ({hub.locations[channel.source]}), "
                    f"rank {channel.target} expects {expected} ({hub.locations[channel.target]})."
                )
            )
        channel.received += 1
        return x

    def _channel(self, source: int, target: int) -> Channel:
        channel = self._channels.get((source, target))
        if channel is None:
            channel = Channel(self, self.ranks[source], self.ranks[target])
            self._channels[source, target] = channel
        return channel

    def without(self, rank: int) -> Awaited | None:
        """What is still open and needs world rank `rank`: a collective, a message to it, a message from it."""
        if self._open:
            member = self.ranks.index(rank)
            for number, meeting in self._open.items():
                if self.counts[member] <= number:
                    return meeting
        for channel in self._channels.values():
            if (channel.mail and channel.target == rank) or (channel.blocked and channel.source == rank):
                return channel
        return None

    def leave(self, rank: int) -> None:
        if self in self.hub.groups[rank]:
            self.hub.groups[rank].remove(self)

    def reset(self) -> None:
        """Forget everything open, so that a new run starts at number 0."""
        self.counts = [0] * len(self.ranks)
        self._open.clear()
        self._channels.clear()
