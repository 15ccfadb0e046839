"""Control plane of a process group: small host values over gloo, whatever the device group is. n = `size` ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_runtime.comm.checks import pack_ints, unpack_ints
from moe_runtime.comm.process import Link
from moe_runtime.comm.wires import all_gather_into

FRAME_BYTES = 4096
"""What `share` sends in its first message, length included; most payloads (plans, tokens) need no second one."""
_LENGTH_BYTES = 8


class Control:
    """Host-blocking calls on a gloo group; torch raises RuntimeError when its deadline passes or a peer is gone."""

    def __init__(self, link: Link, *, rank: int, size: int) -> None:
        self._link = link
        self._rank = rank
        self._size = size

    def exchange(self, row: bytes) -> tuple[tuple[int, ...], ...]:
        """Rows of packed int64, of equal lengths."""
        if not row:
            self.exchange(pack_ints([0]))
            return ((),) * self._size
        gathered = self._gather(row)
        return tuple(unpack_ints(gathered[i * len(row) : (i + 1) * len(row)]) for i in range(self._size))

    def share(self, payload: bytes | None, src: int) -> bytes:
        frame = b""
        if payload is not None:
            frame = pack_ints([len(payload)]) + payload
        head = self._broadcast(frame[:FRAME_BYTES].ljust(FRAME_BYTES, b"\0"), src)
        (length,) = unpack_ints(head[:_LENGTH_BYTES])
        total = _LENGTH_BYTES + length
        if total <= FRAME_BYTES:
            return head[_LENGTH_BYTES:total]
        rest = frame[FRAME_BYTES:] if payload is not None else b"\0" * (total - FRAME_BYTES)
        return head[_LENGTH_BYTES:] + self._broadcast(rest, src)

    def collect(self, payload: bytes) -> tuple[bytes, ...]:
        lengths = [row[0] for row in self.exchange(pack_ints([len(payload)]))]
        width = max(lengths)
        if width == 0:
            return (b"",) * self._size
        gathered = self._gather(payload.ljust(width, b"\0"))
        return tuple(gathered[i * width : i * width + length] for i, length in enumerate(lengths))

    def barrier(self) -> None:
        self.exchange(pack_ints([0]))

    def _gather(self, data: bytes) -> bytes:
        out = torch.empty(self._size * len(data), dtype=torch.uint8)
        all_gather_into(out, _tensor(data), self._link.group).wait()
        return out.numpy().tobytes()

    def _broadcast(self, data: bytes, src: int) -> bytes:
        x = _tensor(data)
        dist.broadcast(x, group=self._link.group, group_src=src)
        return x.numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def disagreement(name: str, ranks: Sequence[int], calls: Sequence[bytes]) -> str | None:
    """The text of the first difference between the ranks' calls, given as b"op #n signature", or None."""
    for member, call in enumerate(calls):
        if call != calls[0]:
            return (
                f"rank {ranks[0]} is in {calls[0].decode()} of {name}; rank {ranks[member]} is in {call.decode()} "
                f"of {name}. All ranks must make the same calls in the same order with fitting inputs."
            )
    return None
