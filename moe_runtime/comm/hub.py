"""Hub: runs the programs of N ranks as greenlets of one thread, first come first served, and stops all on a fault.

It knows no collectives: a rank blocks on something `Awaited`, which names the ranks it needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from moe_runtime.comm.base import Location
from moe_runtime.comm.checks import show_ranks
from moe_runtime.errors import CommunicationError

T = TypeVar("T")


class Awaited(Protocol):
    """What a blocked rank waits for."""

    def missing(self) -> tuple[int, ...]:
        """World ranks that have not come yet."""

    def __str__(self) -> str:
        """For example "all_to_all #42 of ep"."""


class Meetings(Protocol):
    """A group's open collectives, as the hub needs them."""

    def without(self, rank: int) -> Awaited | None:
        """An open collective in which world rank `rank` has no part yet."""

    def reset(self) -> None: ...


class Interruption:
    """Set from any thread to stop one run where its ranks next wait."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: BaseException | None = None


class Hub:
    """One run at a time, on one thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.locations = [Location() for _ in range(size)]
        self.groups: list[list[Meetings]] = [[] for _ in range(size)]
        self.ready: deque[greenlet] = deque()
        self.ranks: list[greenlet | None] = [None] * size
        self.blocked: dict[int, Awaited] = {}
        self.finished: set[int] = set()
        self.running: int | None = None
        self.switches = 0
        self.failure: BaseException | None = None
        self._main: greenlet | None = None
        """The greenlet that runs the ranks; only during a run, since it belongs to a thread that may end."""

    def run(self, fn: Callable[[int], T], interruption: Interruption) -> list[T]:
        """`fn(rank)` on every rank until all return. Raises CommunicationError once every rank is unwound."""
        self._main = getcurrent()
        results: dict[int, T] = {}

        def program(rank: int) -> None:
            results[rank] = fn(rank)

        self.ranks = [greenlet(partial(program, rank)) for rank in range(self.size)]
        self.ready.extend(g for g in self.ranks if g is not None)
        rank_of = {g: rank for rank, g in enumerate(self.ranks)}
        try:
            self._loop(rank_of, interruption)
            return [results[rank] for rank in range(self.size)]
        finally:
            # The failure's traceback holds this frame, and may be collected after the thread has ended: no greenlet of
            # that thread may be reached from it.
            rank_of.clear()
            self._reset()

    def _loop(self, rank_of: dict[greenlet | None, int], interruption: Interruption) -> None:
        ready = self.ready
        while self.failure is None and interruption.error is None and ready:
            current: greenlet | None = ready.popleft()
            assert current is not None
            self.running = rank_of[current]
            self.switches += 1
            try:
                current.switch()
            except BaseException as error:  # noqa: BLE001 - whatever a rank raises must stop the others
                if self.failure is None:
                    self.failure = self._raised(rank_of[current], error)
            if current.dead and self.failure is None:
                self._finish(rank_of[current])
        current = None
        if self.failure is None:
            self.failure = interruption.error
        if self.failure is None and len(self.finished) < self.size:
            self.failure = CommunicationError(f"no rank can go on: {self.describe()}.")
        if self.failure is not None:
            self._unwind(self.failure)
            raise self.failure

    def block(self, rank: int, awaited: Awaited) -> None:
        """Suspend `rank`'s program until it is made ready again."""
        if self.finished and (gone := self.finished.intersection(awaited.missing())):
            self.fail(CommunicationError(f"{self._waits(awaited, [rank])}; {self._returned(gone)}."))
        self.blocked[rank] = awaited
        assert self._main is not None, "a rank blocks only within a run"
        self._main.switch()
        del self.blocked[rank]

    def wake(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            program = self.ranks[rank]
            assert program is not None, "only a running rank can have blocked"
            self.ready.append(program)

    def fail(self, error: BaseException) -> None:
        """Stop the whole run with `error`, whatever the calling rank does about it."""
        if self.failure is None:
            self.failure = error
        raise error

    def check_caller(self, rank: int) -> None:
        """Raise unless the caller is the program of `rank`, inside a run that still goes on."""
        if self.failure is not None:
            raise CommunicationError("this run is being stopped: no further communication.") from self.failure
        if getcurrent() is not self.ranks[rank]:
            raise CommunicationError(
                f"the communicator of rank {rank} was called from outside that rank's program: "
                "use it inside the function given to VirtualCluster.run, on its own rank only."
            )

    def describe(self) -> str:
        """Where every blocked rank waits, and which ranks have returned."""
        places: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        awaited: dict[tuple[str, str, tuple[int, ...]], Awaited] = {}
        for rank, what in sorted(self.blocked.items()):
            key = (str(what), str(self.locations[rank]), what.missing())
            places.setdefault(key, []).append(rank)
            awaited[key] = what
        texts = [self._waits(awaited[key], ranks) for key, ranks in places.items()]
        if self.finished:
            texts.append(self._returned(self.finished))
        return "; ".join(texts)

    def _waits(self, awaited: Awaited, ranks: list[int]) -> str:
        place = f"{awaited} ({self.locations[ranks[0]]})"
        return f"{show_ranks(ranks)} {_s('wait', ranks)} in {place} for {show_ranks(awaited.missing())}"

    def _returned(self, ranks: Iterable[int]) -> str:
        ranks = list(ranks)
        return f"{show_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} returned"

    def _raised(self, rank: int, error: BaseException) -> BaseException:
        if isinstance(error, CommunicationError):
            return error
        waiting = self.describe()
        text = f"rank {rank} raised {type(error).__name__} ({self.locations[rank]}): {error}"
        failure = CommunicationError(f"{text}\nThe other ranks were stopped: {waiting}." if waiting else text)
        failure.__cause__ = error
        return failure

    def _finish(self, rank: int) -> None:
        self.finished.add(rank)
        for group in self.groups[rank]:
            if (awaited := group.without(rank)) is not None:
                waiting = [r for r, what in self.blocked.items() if what is awaited]
                text = self._waits(awaited, waiting) if waiting else f"{awaited} was begun by other ranks"
                self.failure = CommunicationError(f"{text}; {self._returned([rank])}.")
                return

    def _unwind(self, error: BaseException) -> None:
        """Raise GreenletExit in every living program, so that its `finally` blocks run."""
        for rank, program in enumerate(self.ranks):
            if program is None or program.dead:
                continue
            try:
                program.throw(GreenletExit)
            except BaseException as second:  # noqa: BLE001 - the first fault is the one to report
                if second is not error:
                    error.add_note(f"rank {rank} raised {type(second).__name__} while it was stopped: {second}")
            if not program.dead:
                error.add_note(f"rank {rank} did not end when it was stopped.")

    def _reset(self) -> None:
        failed = self.failure is not None
        self.ready.clear()
        self.blocked.clear()
        self.finished.clear()
        self.ranks = [None] * self.size
        self._main = None
        self.running = None
        self.failure = None
        if failed:
            for group in {id(group): group for groups in self.groups for group in groups}.values():
                group.reset()


def _s(verb: str, ranks: list[int]) -> str:
    return verb + "s" if len(ranks) == 1 else verb
