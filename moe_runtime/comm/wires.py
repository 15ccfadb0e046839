"""Wires: how the device collectives of one process group run on gloo and on NCCL. n rows, `size` ranks.

Each method starts an operation and gives (work, finish): `finish()` makes the result after `work.wait()`.
Inputs must stay unchanged until then.

gloo moves bytes only and sums are made here, in rank order, by the function that virtual ranks use: its own sums differ
in order and its dtype lists have gaps (no fp8, no int16). NCCL sums natively, in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.comm.collectives import byte_view, ordered_sum
from moe_runtime.comm.process import Link

Started = tuple[dist.Work, Callable[[], Tensor]]


class Wire(Protocol):
    """The collectives of comm/base.py on one group; arguments were checked before. Ranks are group ranks."""

    def all_reduce(self, x: Tensor) -> Started: ...

    def all_gather(self, x: Tensor) -> Started: ...

    def reduce_scatter(self, x: Tensor) -> Started: ...

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], into: Tensor | None
    ) -> Started: ...

    def broadcast(self, x: Tensor, src: int) -> Started: ...

    def send(self, x: Tensor, dst: int) -> Started: ...

    def recv(self, like: Tensor, src: int) -> Started: ...


def all_gather_into(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """torch renamed this call in 2.13."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _begun(gather(out, x, group=group, async_op=True))


def _reduce_scatter_into(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return _begun(scatter(out, x, group=group, async_op=True))


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None, "torch gives no work only to ranks outside the group"
    return work


def _as_bytes(x: Tensor) -> Tensor:
    """The bytes of `x`, [numel * itemsize] uint8."""
    return x.contiguous().view(-1).view(torch.uint8)


class GlooWire:
    """CPU tensors."""

    def __init__(self, link: Link, size: int) -> None:
        self._link = link
        self._size = size

    def all_reduce(self, x: Tensor) -> Started:
        work, gathered = self._gather(x)
        return work, lambda: ordered_sum(gathered.view(x.dtype).view(self._size, *x.shape).unbind(0))

    def all_gather(self, x: Tensor) -> Started:
        work, gathered = self._gather(x)
        return work, lambda: gathered.view(x.dtype).view(self._size * x.shape[0], *x.shape[1:])

    def _gather(self, x: Tensor) -> tuple[dist.Work, Tensor]:
        data = _as_bytes(x)
        out = torch.empty(self._size * data.numel(), dtype=torch.uint8)
        return all_gather_into(out, data, self._link.group), out

    def reduce_scatter(self, x: Tensor) -> Started:
        data = _as_bytes(x)
        out = torch.empty_like(data)
        work = _begun(dist.all_to_all_single(out, data, group=self._link.group, async_op=True))
        block = (x.shape[0] // self._size, *x.shape[1:])
        return work, lambda: ordered_sum(out.view(x.dtype).view(self._size, *block).unbind(0))

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], into: Tensor | None
    ) -> Started:
        shape = (sum(recv_counts), *x.shape[1:])
        row_bytes = x.itemsize
        for extent in x.shape[1:]:
            row_bytes *= extent
        out = torch.empty(shape[0] * row_bytes, dtype=torch.uint8) if into is None else _as_bytes(into)
        work = dist.all_to_all_single(
            out,
            _as_bytes(x),
            [count * row_bytes for count in recv_counts],
            [count * row_bytes for count in send_counts],
            group=self._link.group,
            async_op=True,
        )
        return _begun(work), lambda: out.view(x.dtype).view(shape)

    def broadcast(self, x: Tensor, src: int) -> Started:
        data = _as_bytes(x).clone()
        work = dist.broadcast(data, group=self._link.group, group_src=src, async_op=True)
        return _begun(work), lambda: data.view(x.dtype).view(x.shape)

    def send(self, x: Tensor, dst: int) -> Started:
        data = _as_bytes(x).clone()
        return _begun(dist.isend(data, group=self._link.group, group_dst=dst)), lambda: data

    def recv(self, like: Tensor, src: int) -> Started:
        data = torch.empty(like.numel() * like.itemsize, dtype=torch.uint8)
        work = dist.irecv(data, group=self._link.group, group_src=src)
        return _begun(work), lambda: data.view(like.dtype).view(like.shape)


class NcclWire:
    """CUDA tensors. `work.wait()` orders the current stream behind the operation and does not block the host."""

    def __init__(self, link: Link, size: int) -> None:
        self._link = link
        self._size = size

    @property
    def group(self) -> dist.ProcessGroup:
        return self._link.group

    def all_reduce(self, x: Tensor) -> Started:
        out = x.clone(memory_format=torch.contiguous_format)
        return _begun(dist.all_reduce(out, group=self._link.group, async_op=True)), lambda: out

    def all_gather(self, x: Tensor) -> Started:
        data = byte_view(x.contiguous())
        out = data.new_empty((self._size * x.shape[0], *x.shape[1:]))
        return all_gather_into(out, data, self._link.group), lambda: out.view(x.dtype)

    def reduce_scatter(self, x: Tensor) -> Started:
        data = x.contiguous()
        out = data.new_empty((x.shape[0] // self._size, *x.shape[1:]))
        return _reduce_scatter_into(out, data, self._link.group), lambda: out

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], into: Tensor | None
    ) -> Started:
        data = byte_view(x.contiguous())
        out = data.new_empty((sum(recv_counts), *x.shape[1:])) if into is None else byte_view(into)
        work = dist.all_to_all_single(
            out, data, list(recv_counts), list(send_counts), group=self._link.group, async_op=True
        )
        return _begun(work), lambda: out.view(x.dtype)

    def broadcast(self, x: Tensor, src: int) -> Started:
        data = byte_view(x.clone(memory_format=torch.contiguous_format))
        work = dist.broadcast(data, group=self._link.group, group_src=src, async_op=True)
        return _begun(work), lambda: data.view(x.dtype)

    def send(self, x: Tensor, dst: int) -> Started:
        data = byte_view(x.clone(memory_format=torch.contiguous_format))
        return _begun(dist.isend(data, group=self._link.group, group_dst=dst)), lambda: data

    def recv(self, like: Tensor, src: int) -> Started:
        data = byte_view(torch.empty_like(like, memory_format=torch.contiguous_format))
        return _begun(dist.irecv(data, group=self._link.group, group_src=src)), lambda: data.view(like.dtype)
