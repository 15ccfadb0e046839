"""One process decides what runs. Under torchrun, rank 0 composes and the others receive the run through the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from moe_runtime.errors import CommunicationError, MoeRuntimeError
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
        failed, met = f"{self.run_id}/{what}/failed", f"{self.run_id}/{what}/met"
        try:
            value = work()
        except (MoeRuntimeError, OSError) as error:
            self.store.compare_set(failed, "", encode_error(error))
        else:
            self.store.compare_set(failed, "", "")
        if self.store.add(f"{met}/count", 1) == self.place.world_size:
            self.store.set(met, "all")
        try:
            self.store.wait([met], timedelta(seconds=MEETING_DEADLINE_S))
        except RuntimeError as error:
            raise CommunicationError(
                f"rank {self.place.rank}: not every rank was done with {what} within {MEETING_DEADLINE_S:g} s."
            ) from error
        if payload := self.store.get(failed):
            raise decode_error(payload)
        assert value is not None, "work returns something"
        return value


def decide(words: Sequence[str], *, torchrun: TorchrunEnv | None) -> tuple[Composed, Meeting | None]:
    """The run that `words` ask for. Under torchrun only rank 0's words count, and all ranks fail together.

    Raises ConfigError for anything that does not fit.
    """
    if torchrun is None:
        return compose(words), None
    meeting = _meet(torchrun)
    key = f"{meeting.run_id}/decision"
    from moe_runtime.launch.wire import decode_error, decode_run, encode_error, encode_run

    if torchrun.rank == 0:
        try:
            composed = compose(words, torchrun=torchrun)
        except (MoeRuntimeError, OSError) as error:
            meeting.store.set(key, _REFUSED + encode_error(error))
            raise
        meeting.store.set(key, _RUN + encode_run(composed))
        return meeting.together("the configuration", lambda: composed), meeting
    try:
        meeting.store.wait([key], timedelta(seconds=MEETING_DEADLINE_S))
    except RuntimeError as error:
        raise CommunicationError(f"rank 0 has not decided on a run within {MEETING_DEADLINE_S:g} s.") from error
    decision = meeting.store.get(key).decode()
    if decision.startswith(_REFUSED):
        raise decode_error(decision.removeprefix(_REFUSED))
    return meeting.together("the configuration", lambda: decode_run(decision.removeprefix(_RUN))), meeting


def _meet(place: TorchrunEnv) -> Meeting:
    from moe_runtime.comm.process import host_store, join_store

    if place.rank == 0 and not place.agent_store:
        store = host_store(place.master_addr, port=place.master_port, deadline_s=MEETING_DEADLINE_S)
    else:
        store = join_store(place.master_addr, place.master_port, deadline_s=MEETING_DEADLINE_S)
    return Meeting(place, store, store.add(f"moe_runtime/{place.restart}/runs/{place.rank}", 1))
