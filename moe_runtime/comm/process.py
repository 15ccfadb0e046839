"""One process of a torch.distributed run: the store where processes find each other, joining, and leaving.

No port is fixed: `host_store` lets the system choose one and binds a single address, 127.0.0.1 unless told otherwise.
Nothing here reads the environment; a launcher passes in what torchrun or Slurm gave it.
"""

from __future__ import annotations

import socket
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from moe_runtime.comm.checks import show_ranks
from moe_runtime.comm.overdue import Overdue
from moe_runtime.comm.whereabouts import Whereabouts
from moe_runtime.errors import CommunicationError, ConfigError, EngineClosedError

Backend = Literal["gloo", "nccl"]


def host_store(host: str = "127.0.0.1", *, port: int = 0, deadline_s: float) -> TCPStore:
    """A store served by this process on `host` alone; `store.port` is the port that the system chose for port 0."""
    listener = socket.create_server((host, port), backlog=1024)
    chosen = listener.getsockname()[1]
    # The store owns the descriptor from here on. torch's own socket would listen on every interface.
    return TCPStore(
        host,
        chosen,
        is_master=True,
        timeout=timedelta(seconds=deadline_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, *, deadline_s: float) -> TCPStore:
    """A connection to the store at `host`:`port`. Raises CommunicationError if nobody answers in time."""
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=deadline_s), wait_for_workers=False)
    except RuntimeError as error:
        raise CommunicationError(
            f"no store answers at {host}:{port} within {deadline_s:g} s. Is the process that hosts it running, "
            "and is the address reachable from here?"
        ) from error


class Link:
    """A process group that its process can let go of, whoever still holds the communicator (a traceback, say).

    gloo closes its connections when the last reference to the group goes, and only then do the peers notice.
    """

    __slots__ = ("_group",)

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group: dist.ProcessGroup | None = group

    @property
    def group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise EngineClosedError("a call on the process groups of a process that has left its run. Start a new run.")
        return self._group

    def release(self) -> None:
        self._group = None


@dataclass(frozen=True, slots=True)
class Process:
    """This process within the run; `close` it in every case, with the error that ended its program if there was one."""

    rank: int
    world: int
    backend: Backend
    device: torch.device
    deadline_s: float
    whereabouts: Whereabouts
    overdue: Overdue | None
    links: list[Link] = field(default_factory=list)

    def close(self, error: BaseException | None = None) -> None:
        """Leave: end all process groups and the helper thread. Idempotent. Peers that still wait are told `error`."""
        if dist.is_initialized():
            self.whereabouts.close(error)
            if self.overdue is not None:
                self.overdue.close()
            for link in self.links:
                link.release()
            # On a device that has failed this fails too, and would stand in the place of `error`.
            with nullcontext() if error is None else suppress(RuntimeError):
                dist.destroy_process_group()


def init_process(
    rank: int,
    world: int,
    *,
    store: TCPStore,
    backend: Backend,
    deadline_s: float,
    device: torch.device | str = "cpu",
    run_id: str = "0",
) -> Process:
    """Join the run of `world` processes that meet at `store`; every one of them calls this.

    `deadline_s` bounds this call and later every wait of a collective. `run_id` keeps the keys of two runs on one store
    apart (for example torchrun's restart count). Raises ConfigError for a backend that does not fit the device, and
    CommunicationError naming the ranks that did not come.
    """
    place = torch.device(device)
    _check_backend(backend, place)
    timeout = timedelta(seconds=deadline_s)
    keys = PrefixStore(f"run/{run_id}", store)
    try:
        keys.set(f"here/{rank}", "1")
        keys.wait([f"here/{other}" for other in range(world)], timeout)
        dist.init_process_group(
            backend,
            store=keys,
            rank=rank,
            world_size=world,
            timeout=torch_timeout(backend, deadline_s),
            # An address makes NCCL connect now, so that a missing peer is found here and not in the first step.
            device_id=place if backend == "nccl" else None,
        )
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {rank} could not join {world} processes in {deadline_s:g} s: {_who_is_absent(keys, world)}."
        ) from error
    whereabouts = Whereabouts(rank, store, run_id=run_id)
    overdue = Overdue(whereabouts, deadline_s=deadline_s) if backend == "nccl" else None
    return Process(rank, world, backend, place, deadline_s, whereabouts, overdue)


def _who_is_absent(keys: PrefixStore, world: int) -> str:
    try:
        absent = [other for other in range(world) if not keys.check([f"here/{other}"])]
    except RuntimeError:
        return "the store where they meet is gone, with the process that served it"
    return f"{show_ranks(absent)} did not come" if absent else "all came, but could not connect to each other"


def torch_timeout(backend: Backend, deadline_s: float) -> timedelta:
    """gloo waits under this clock; NCCL's own watchdog ends the process, so ours must ring first."""
    return timedelta(seconds=deadline_s if backend == "gloo" else 2 * deadline_s + 60)


def _check_backend(backend: Backend, device: torch.device) -> None:
    match backend, device.type:
        case ("gloo", "cpu"):
            return
        case ("nccl", "cuda"):
            if device.index is None:
                raise ConfigError(f"device={device}: nccl needs the device's number. Use cuda:<local rank>.")
            if not dist.is_nccl_available():
                raise ConfigError("backend=nccl: this build of torch has no NCCL. Install a CUDA build, or use gloo.")
        case _:
            fitting = "gloo" if device.type == "cpu" else "nccl"
            raise ConfigError(f"backend={backend} on device={device}: these do not fit. Use backend={fitting}.")
