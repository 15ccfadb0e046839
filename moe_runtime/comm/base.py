"""Communicator: one contract for virtual ranks and for torch.distributed. n rows, `size` ranks.

Laws, checked by one suite over every implementation:
* every call is collective over `ranks` and in the same order on each of them;
* results are new tensors (they may be shared between virtual ranks: treat them as immutable), but for `out`;
* sums run in rank order with fp32 accumulation for 16-bit dtypes (`all_reduce`, `reduce_scatter`), so virtual and
  gloo ranks agree bitwise;
* size 1 runs the same code;
* `op_begin(...)` followed by `pending.wait()` equals `op(...)`; begun operations complete in the order they began;
* a rank that does not come is reported by `CommunicationError` (who waits where, who is missing), never a hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_runtime.types import Pending


@dataclass(slots=True)
class Location:
    """Where a rank is, for error texts; one per rank, shared by its communicators and written by the engine."""

    step: int = 0
    layer: int | None = None

    def __str__(self) -> str:
        return f"step {self.step}" if self.layer is None else f"step {self.step}, layer {self.layer}"


class Communicator(Protocol):
    """One group of ranks as seen from one of them."""

    @property
    def name(self) -> str:
        """The mesh axis: "world", "pp", "dp", "tp" or "ep"."""

    @property
    def rank(self) -> int:
        """This rank's index within the group."""

    @property
    def size(self) -> int: ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the group, in group order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` (any shape, equal on all ranks)."""

    def all_reduce_begin(self, x: Tensor) -> Pending[Tensor]: ...

    def all_gather(self, x: Tensor) -> Tensor:
        """`x [n, ...]` of every rank, equal shapes, concatenated in rank order to `[size*n, ...]`."""

    def all_gather_begin(self, x: Tensor) -> Pending[Tensor]: ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """`x [size*n, ...]` summed over ranks; this rank's block `[n, ...]`."""

    def reduce_scatter_begin(self, x: Tensor) -> Pending[Tensor]: ...

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], out: Tensor | None = None
    ) -> Tensor:
        """`x [sum(send_counts), ...]`, blocks in destination order, to `[sum(recv_counts), ...]` in source order.

        `out`, on all ranks or on none: contiguous, of that shape, written and returned; no memory is taken then.
        """

    def all_to_all_begin(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], out: Tensor | None = None
    ) -> Pending[Tensor]: ...

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """`x` of group rank `src`; other ranks pass a tensor of equal shape and dtype, which is left unchanged."""

    def broadcast_begin(self, x: Tensor, src: int) -> Pending[Tensor]: ...

    def send(self, x: Tensor, dst: int) -> None: ...

    def recv(self, like: Tensor, src: int) -> Tensor:
        """A tensor of the shape and dtype of `like` from group rank `src`."""

    def barrier(self) -> None: ...

    # Control plane: small host values on a group of their own, beside the device group.

    def exchange(self, row: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Every rank's row of integers (equal lengths, int64), in rank order."""

    def share(self, payload: bytes | None, src: int) -> bytes:
        """`payload` of group rank `src` on every rank (others pass None)."""

    def collect(self, payload: bytes) -> tuple[bytes, ...]:
        """Every rank's payload (any lengths), in rank order."""

    def close(self) -> None:
        """Wait for messages on their way; no further calls. Idempotent."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All communicators of one rank, built once and injected."""

    world: Communicator
    pp: Communicator
    dp: Communicator
    tp: Communicator
    ep: Communicator
    location: Location

    def close(self) -> None:
        """Close all communicators, at the end of the rank's program."""
        for communicator in (self.world, self.pp, self.dp, self.tp, self.ep):
            communicator.close()
