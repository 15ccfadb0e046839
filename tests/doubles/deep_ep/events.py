"""Streams and events as far as a CPU can show them, for the doubles of both generations of DeepEP.

A result of an asynchronous call is garbage until somebody waited for its event: then, and only then, it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 0x5A5A5A5A
"""Garbage of integers: an index with it is out of bounds."""


def garbage_(x: Tensor) -> Tensor:
    """Fill with what memory without an owner may hold: NaN, or integers that are no index."""
    if x.dtype is torch.float8_e4m3fn:
        x.view(torch.uint8).fill_(0x7F)
    elif x.dtype is torch.bool:
        x.fill_(True)
    else:
        x.fill_(float("nan") if x.is_floating_point() else LARGE if x.element_size() >= 4 else 0x5A)
    return x


class EventHandle:
    """A point of a stream; with `results`, those of the calls before it, which arrive at a wait.

    `time`: operations before it, where somebody counts (`Clock`).
    """

    def __init__(self, results: Sequence[tuple[Tensor, Tensor]] = (), time: int | None = None) -> None:
        self._results = tuple(results)
        self.time = time

    def current_stream_wait(self) -> None:
        """May be called more than once: later waits find the results there."""
        arriving, self._results = self._results, ()
        for target, value in arriving:
            target.copy_(value)


class EventOverlap:
    """What DeepEP's calls return: `event` is None unless the call was asynchronous."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], None] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None, "the call was not asynchronous: there is no event"
        self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        assert self.hook_after_wait is None, "one hook at a time"
        self.hook_after_wait = hook

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.event is not None:
            self.current_stream_wait()


def hide(results: Sequence[Tensor | None]) -> EventHandle:
    """The event of an asynchronous call: its results, correct so far, become garbage until somebody waits."""
    hidden = [(x, x.clone()) for x in results if x is not None]
    for x, _ in hidden:
        garbage_(x)
    return EventHandle(hidden)


class Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of its thread, and when each piece of memory was written last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._written: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.now += 1
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            # A view is no write.
            if isinstance(x, Tensor) and (func._schema.is_mutable or _memory(x) not in given):
                self._written[_memory(x)] = self.now
        return found

    def written(self, x: Tensor) -> int:
        """After so many operations; 0 for what was there before."""
        return self._written.get(_memory(x), 0)


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage().data_ptr())


class Capture:
    """Whether a CUDA graph is being captured: `with capture():`, by any rank."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def active(self) -> bool:
        return self._depth > 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
