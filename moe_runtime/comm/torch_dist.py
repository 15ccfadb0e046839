"""Communicators between processes, over torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

Every wait ends by the process's deadline. The error names this rank, the call and its number, layer and step, and
where every other rank of the group is (`whereabouts.py`). After it the groups of this process are unusable: close.
Sums: on gloo bitwise those of virtual ranks; on NCCL its native order and accumulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from moe_runtime.comm import checks
from moe_runtime.comm.base import Groups
from moe_runtime.comm.control import Control, disagreement
from moe_runtime.comm.process import Backend, Link, Process, torch_timeout
from moe_runtime.comm.wires import GlooWire, NcclWire, Started, Wire
from moe_runtime.errors import CommunicationError, ConfigError, EngineClosedError
from moe_runtime.parallel.mesh import AXES, Axis, ProcessMesh
from moe_runtime.types import Pending

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Begun(Generic[T]):
    """An operation under way; `wait` is `Pending.wait`."""

    owner: TorchCommunicator
    label: str
    work: dist.Work
    finish: Callable[[], T]

    def wait(self) -> T:
        self.owner.guarded(self.label, self.work.wait)
        self.owner.watch(self.label)
        return self.finish()


@dataclass(frozen=True, slots=True)
class Lines:
    """What communicators over the same ranks share: a device group and a control group."""

    ranks: tuple[int, ...]
    device: Wire
    control: Control


class TorchCommunicator:
    """`Communicator` of one process; see comm/base.py for the laws.

    `verify`: before each call the ranks compare what they are about to do (op, number, shapes, counts), at the price of
    one more message round; wrong counts and mixed-up calls are then errors at once, as on virtual ranks.
    """

    def __init__(self, name: Axis, lines: Lines, *, process: Process, verify: bool = False) -> None:
        self._name = name
        self._lines = lines
        self._rank = lines.ranks.index(process.rank)
        self._process = process
        self._verify = verify
        self._count = 0
        self._messages: dict[tuple[str, int], int] = {}
        self._sent: deque[Begun[Tensor]] = deque()
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._lines.ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._lines.ranks

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The NCCL group of these ranks, for libraries with kernels of their own; None where tensors are on CPUs."""
        return self._lines.device.group if isinstance(self._lines.device, NcclWire) else None

    def guarded(self, label: str, wait: Callable[[], T]) -> T:
        """`wait()` with a name: what torch raises becomes a CommunicationError that says who is where."""
        whereabouts = self._process.whereabouts
        if whereabouts.fault is not None:
            raise whereabouts.fault
        whereabouts.enter(label)
        try:
            result = wait()
        except CommunicationError:
            raise
        except RuntimeError as error:
            raise whereabouts.report(label, self.ranks, error) from error
        whereabouts.leave()
        return result

    def _open(
        self, op: str, signature: tuple[object, ...] = (), counts: tuple[checks.Counts, checks.Counts] | None = None
    ) -> str:
        """The label of this rank's next call, after the checks that every call needs."""
        if self._closed:
            raise EngineClosedError(f"{op} on a closed communicator ({self._name}). Build new groups.")
        number = self._count
        self._count += 1
        label = f"{op} #{number} of {self._name}"
        if self._verify:
            call = f"{op} #{number} {checks.show_signature(signature)}".rstrip()
            self.guarded(label, lambda: self._compare(label, call, counts))
        return label

    def _compare(self, label: str, call: str, counts: tuple[checks.Counts, checks.Counts] | None) -> None:
        calls = self._lines.control.collect(call.encode())
        text = disagreement(self._name, self.ranks, calls)
        if text is not None:
            raise CommunicationError(f"{label} ({self._process.whereabouts.location}): {text}")
        if counts is not None:
            send, recv = (np.array(self._lines.control.exchange(checks.pack_ints(row))) for row in counts)
            checks.check_meeting_counts(send, recv, self.ranks)

    def watch(self, label: str) -> None:
        """On a GPU, where `wait` does not wait: that the stream comes past it in time."""
        if self._process.overdue is not None:
            self._process.overdue.reach(label, self.ranks)

    def _start(self, label: str, start: Callable[[], Started]) -> Begun[Tensor]:
        return Begun(self, label, *self.guarded(label, start))

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_reduce_begin(x).wait()

    def all_reduce_begin(self, x: Tensor) -> Pending[Tensor]:
        checks.check_summable(x, "all_reduce")
        label = self._open("all_reduce", (x.shape, x.dtype))
        return self._start(label, lambda: self._lines.device.all_reduce(x))

    def all_gather(self, x: Tensor) -> Tensor:
        return self.all_gather_begin(x).wait()

    def all_gather_begin(self, x: Tensor) -> Pending[Tensor]:
        checks.check_has_rows(x, "all_gather")
        label = self._open("all_gather", (x.shape, x.dtype))
        return self._start(label, lambda: self._lines.device.all_gather(x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.reduce_scatter_begin(x).wait()

    def reduce_scatter_begin(self, x: Tensor) -> Pending[Tensor]:
        checks.check_summable(x, "reduce_scatter")
        checks.check_divisible(x, self.size)
        label = self._open("reduce_scatter", (x.shape, x.dtype))
        return self._start(label, lambda: self._lines.device.reduce_scatter(x))

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], out: Tensor | None = None
    ) -> Tensor:
        return self.all_to_all_begin(x, send_counts, recv_counts, out).wait()

    def all_to_all_begin(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], out: Tensor | None = None
    ) -> Pending[Tensor]:
        checks.check_all_to_all(x, send_counts, recv_counts, out, self.size)
        checks.check_rows(x.shape[0], sum(send_counts), self._process.rank)
        label = self._open("all_to_all", (x.shape[1:], x.dtype), (send_counts, recv_counts))
        return self._start(label, lambda: self._lines.device.all_to_all(x, send_counts, recv_counts, out))

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        return self.broadcast_begin(x, src).wait()

    def broadcast_begin(self, x: Tensor, src: int) -> Pending[Tensor]:
        checks.check_member(src, self.size, "src")
        label = self._open("broadcast", (x.shape, x.dtype, f"src {src}"))
        return self._start(label, lambda: self._lines.device.broadcast(x, src))

    def send(self, x: Tensor, dst: int) -> None:
        checks.check_member(dst, self.size, "dst")
        label = self._message("send", dst)
        self._reap()
        sent = self._start(label, lambda: self._lines.device.send(x, dst))
        if self._process.overdue is not None:
            self._process.overdue.add(label, self.ranks, sent.work)  # nobody waits for it
        self._sent.append(sent)

    def recv(self, like: Tensor, src: int) -> Tensor:
        checks.check_member(src, self.size, "src")
        label = self._message("recv", src)
        return self._start(label, lambda: self._lines.device.recv(like, src)).wait()

    def _message(self, op: str, peer: int) -> str:
        number = self._messages.get((op, peer), 0)
        self._messages[op, peer] = number + 1
        way = "to" if op == "send" else "from"
        return f"{op} #{number} of {self._name} {way} rank {self.ranks[peer]}"

    def _reap(self) -> None:
        """Let go of messages that have left."""
        while self._sent and self._sent[0].work.is_completed():
            self._sent.popleft().wait()

    def barrier(self) -> None:
        label = self._open("barrier")
        self.guarded(label, self._lines.control.barrier)

    def exchange(self, row: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        data = checks.pack_ints(row)
        label = self._open("exchange", (f"{len(row)} integers",))
        return self.guarded(label, lambda: self._lines.control.exchange(data))

    def share(self, payload: bytes | None, src: int) -> bytes:
        checks.check_share(payload, src, rank=self._rank, size=self.size)
        label = self._open("share", (f"src {src}",))
        return self.guarded(label, lambda: self._lines.control.share(payload, src))

    def collect(self, payload: bytes) -> tuple[bytes, ...]:
        label = self._open("collect")
        return self.guarded(label, lambda: self._lines.control.collect(payload))

    def close(self) -> None:
        """Wait for messages on their way; the process groups end with `Process.close`."""
        self._closed = True
        if self._process.whereabouts.fault is None:
            while self._sent:
                self._sent.popleft().wait()


def torch_dist_groups(mesh: ProcessMesh, process: Process, *, verify: bool = False) -> Groups:
    """The communicators of this process; every process of the mesh calls this once. Raises CommunicationError."""
    if (mesh.rank, mesh.world) != (process.rank, process.world):
        raise ConfigError(
            f"mesh rank {mesh.rank} of {mesh.world} on process {process.rank} of {process.world}: they must be equal."
        )
    lines: dict[tuple[int, ...], Lines] = {}
    for axis in AXES:
        ranks = mesh.ranks(axis)
        if ranks not in lines:
            lines[ranks] = _connect(ranks, axis, process)

    def communicator(axis: Axis) -> TorchCommunicator:
        return TorchCommunicator(axis, lines[mesh.ranks(axis)], process=process, verify=verify)

    world, pipeline, data, tensor, expert = (communicator(axis) for axis in AXES)
    return Groups(world, pipeline, data, tensor, expert, location=process.whereabouts.location)


def patient_world(process: Process, *, deadline_s: float) -> TorchCommunicator:
    """All processes on a gloo group of their own, whose waits end after `deadline_s` instead of the process's deadline.

    For work of very different length, such as loading. Every process calls this. Raises CommunicationError.
    """
    ranks = tuple(range(process.world))
    try:
        link = _link(ranks, "world", process, "gloo", deadline_s=deadline_s)
    except RuntimeError as error:
        raise process.whereabouts.report("the meeting of all processes", ranks, error) from error
    control = Control(link, rank=process.rank, size=len(ranks))
    return TorchCommunicator("world", Lines(ranks, GlooWire(link, len(ranks)), control), process=process)


def _connect(ranks: tuple[int, ...], axis: Axis, process: Process) -> Lines:
    """A device group and a control group over `ranks`. All processes go through the axes in one order."""
    try:
        control, device = (
            _link(ranks, axis, process, backend, deadline_s=process.deadline_s) for backend in ("gloo", process.backend)
        )
    except RuntimeError as error:
        raise process.whereabouts.report(f"the meeting of group {axis}", ranks, error) from error
    host = Control(control, rank=ranks.index(process.rank), size=len(ranks))
    if process.overdue is None:
        return Lines(ranks, GlooWire(device, len(ranks)), host)
    process.overdue.groups.append(device.group)
    return Lines(ranks, NcclWire(device, len(ranks)), host)


def _link(ranks: tuple[int, ...], axis: Axis, process: Process, backend: Backend, *, deadline_s: float) -> Link:
    made = dist.new_group(
        list(ranks),
        timeout=torch_timeout(backend, deadline_s),
        backend=backend,
        use_local_synchronization=True,
        group_desc=axis,
    )
    assert isinstance(made, dist.ProcessGroup), "this process is one of `ranks`"
    process.links.append(Link(made))
    return process.links[-1]
