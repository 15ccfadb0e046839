"""One process decides what runs. Under torchrun, rank 0 composes and the others receive the run through the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.launch.compose import Composed, compose
from moe_runtime.launch.env import TorchrunEnv

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

MEETING_DEADLINE_S = 60.0
"""How long the processes wait for the one that composes: the run's own deadline is not known before."""
_RUN, _REFUSED = b"run ", b"refused "


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where torchrun's processes meet. The store must live as long as the run, since rank 0 may be its server."""

    place: TorchrunEnv
    store: TCPStore

    @property
    def run_id(self) -> str:
        """Keeps a restarted world's keys apart from those before."""
        return f"moe_runtime/{self.place.restart}"


def decide(words: Sequence[str], *, torchrun: TorchrunEnv | None) -> tuple[Composed, Meeting | None]:
    """The run that `words` ask for. Under torchrun only rank 0's words count, and all ranks fail together.

    Raises ConfigError for anything that does not fit.
    """
    if torchrun is None:
        return compose(words), None
    meeting = _meet(torchrun)
    key = f"{meeting.run_id}/decision"
    from moe_runtime.launch.wire import decode_run, encode_run

    if torchrun.rank == 0:
        try:
            composed = compose(words, torchrun=torchrun)
        except MoeRuntimeError as error:
            meeting.store.set(key, _REFUSED + str(error).encode())
            raise
        meeting.store.set(key, _RUN + encode_run(composed))
        return composed, meeting
    try:
        meeting.store.wait([key], timedelta(seconds=MEETING_DEADLINE_S))
    except RuntimeError as error:
        raise ConfigError(f"rank 0 has not decided on a run within {MEETING_DEADLINE_S:g} s; see its output.") from error
    decision: bytes = meeting.store.get(key)
    if decision.startswith(_REFUSED):
        raise ConfigError(decision.removeprefix(_REFUSED).decode())
    return decode_run(decision.removeprefix(_RUN)), meeting


def _meet(place: TorchrunEnv) -> Meeting:
    from moe_runtime.comm.process import host_store, join_store

    if place.rank == 0 and not place.agent_store:
        return Meeting(place, host_store(place.master_addr, port=place.master_port, deadline_s=MEETING_DEADLINE_S))
    return Meeting(place, join_store(place.master_addr, place.master_port, deadline_s=MEETING_DEADLINE_S))
