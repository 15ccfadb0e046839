"""One process decides what runs. Under torchrun, rank 0 composes and the others receive the run through the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from moe_runtime.errors import CommunicationError
from moe_runtime.launch.compose import Composed, compose
from moe_runtime.launch.env import TorchrunEnv

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

T = TypeVar("T")

MEETING_DEADLINE_S = 60.0
"""How long the processes wait for the one that composes: the run's own deadline is not known before."""
_RUN, _REFUSED = "run ", "refused "


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where torchrun's processes meet. The store must live as long as the run, since rank 0 may be its server.

    `number` counts this process's runs from 1: every process starts the same runs in the same order.
    """

    place: TorchrunEnv
    store: TCPStore
    number: int = 1

    @property
    def run_id(self) -> str:
        """Keeps the keys of a run apart from those of the runs before, and of a world before it was restarted."""
        return f"moe_runtime/{self.place.restart}/{self.number}"

    def together(self, what: str, work: Callable[[], T]) -> T:
        """`work()` on every rank. Where it fails on one, the error of the first that failed is raised on all."""
        from moe_runtime.launch.wire import decode_error, encode_error

        value: T | None = None
        failure: Exception | None = None
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank must hear of it
            failure = error
        with self._named(f"not every rank was done with {what}"):
            payload = self._first("" if failure is None else encode_error(failure), key=f"{self.run_id}/{what}")
        if payload:
            raise decode_error(payload) from failure
        assert value is not None, "work returns something"
        return value

    def _first(self, error: str, *, key: str) -> bytes:
        """The first error that a rank came with, on all of them; empty where there is none."""
        self.store.compare_set(f"{key}/failed", "", error)
        self._count(f"{key}/met")
        self.store.wait([f"{key}/met"], timedelta(seconds=MEETING_DEADLINE_S))
        payload: bytes = self.store.get(f"{key}/failed")
        self.linger(f"{key}/read", last_word=bool(payload))
        return payload

    def tell(self, decision: str, *, last_word: bool) -> None:
        """Rank 0's decision on the run, to the others. `last_word`: this process is about to leave."""
        with self._named("the decision could not be told"):
            self.store.set(f"{self.run_id}/decision", decision)
            self.linger(f"{self.run_id}/heard", last_word=last_word)

    def hear(self) -> str:
        """Rank 0's decision on the run."""
        key = f"{self.run_id}/decision"
        with self._named("rank 0 has not decided on a run"):
            self.store.wait([key], timedelta(seconds=MEETING_DEADLINE_S))
            decision: str = self.store.get(key).decode()
            self.linger(f"{self.run_id}/heard", last_word=False)
        return decision

    def linger(self, key: str, *, last_word: bool) -> None:
        """Say that this rank has read; where it serves the store and is about to leave, wait until all have."""
        self._count(key)
        if last_word and self.place.serves_store:
            with suppress(RuntimeError):  # one that never comes is torchrun's to report
                self.store.wait([key], timedelta(seconds=MEETING_DEADLINE_S))

    def _count(self, key: str) -> None:
        if self.store.add(f"{key}/count", 1) == self.place.world_size:
            self.store.set(key, "all")

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """A CommunicationError for what torch says of a store that times out or goes away."""
        try:
            yield
        except RuntimeError as error:
            raise CommunicationError(
                f"rank {self.place.rank}: {what} within {MEETING_DEADLINE_S:g} s ({str(error).partition(chr(10))[0]})."
            ) from error


def decide(words: Sequence[str], *, torchrun: TorchrunEnv | None) -> tuple[Composed, Meeting | None]:
    """The run that `words` ask for. Under torchrun only rank 0's words count, and all ranks fail together.

    Raises ConfigError for anything that does not fit, and CommunicationError where the ranks do not meet.
    """
    if torchrun is None:
        return compose(words), None
    meeting = _meet(torchrun)
    from moe_runtime.launch.wire import decode_error, decode_run, encode_error, encode_run

    if torchrun.rank == 0:
        try:
            composed = compose(words, torchrun=torchrun)
        except Exception as error:
            with suppress(CommunicationError):
                meeting.tell(_REFUSED + encode_error(error), last_word=True)
            raise
        meeting.tell(_RUN + encode_run(composed), last_word=False)
        return meeting.together("the configuration", lambda: composed), meeting
    decision = meeting.hear()
    if decision.startswith(_REFUSED):
        raise decode_error(decision.removeprefix(_REFUSED))
    return meeting.together("the configuration", lambda: decode_run(decision.removeprefix(_RUN))), meeting


def _meet(place: TorchrunEnv) -> Meeting:
    from moe_runtime.comm.process import host_store, join_store

    if place.serves_store:
        store = host_store(place.master_addr, port=place.master_port, deadline_s=MEETING_DEADLINE_S)
    else:
        store = join_store(place.master_addr, place.master_port, deadline_s=MEETING_DEADLINE_S)
    try:
        number = store.add(f"moe_runtime/{place.restart}/runs/{place.rank}", 1)
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {place.rank}: torchrun's store is gone, with the process that served it."
        ) from error
    return Meeting(place, store, number)
