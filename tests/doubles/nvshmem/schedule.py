"""Orders in which ranks go on: one rank runs as far as it can before the next one moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator

T = TypeVar("T")


class Shuffled:
    """A communicator after whose every collective the ranks go on one by one, in an order drawn from `seed`.

    Ends with `finish`, after which the last turns are given on.
    """

    def __init__(self, inner: Communicator, seed: int) -> None:
        self._inner = inner
        self._seed = seed
        self._calls = 0
        self._next: int | None = None
        self._token = torch.zeros(1, dtype=torch.uint8)

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def rank(self) -> int:
        return self._inner.rank

    def exchange(self, row: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        self.finish()
        return self._take_turn(self._inner.exchange(row))

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        self.finish()
        return self._take_turn(self._inner.all_to_all(x, send_counts, recv_counts))

    def share(self, payload: bytes | None, src: int) -> bytes:
        self.finish()
        return self._take_turn(self._inner.share(payload, src))

    def barrier(self) -> None:
        self.finish()
        self._inner.barrier()
        self._take_turn(None)

    def finish(self) -> None:
        """Let the next rank go on."""
        if self._next is not None:
            self._inner.send(self._token, self._next)
            self._next = None

    def _take_turn(self, result: T) -> T:
        self._calls += 1
        order = list(range(self.size))
        random.Random(self._seed * 1_000_003 + self._calls).shuffle(order)
        place = order.index(self.rank)
        if place:
            self._inner.recv(self._token, order[place - 1])
        self._next = order[place + 1] if place + 1 < self.size else None
        return result
