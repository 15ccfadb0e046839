"""A dispatcher whose buffers are made later: once every rank has loaded, since making them is collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_runtime.dispatch.base import Capabilities, Dispatcher, DispatchStep, Rows, splitting
from moe_runtime.types import Pending, PhysicalRouting


class DeferredDispatcher:
    """`Dispatcher` of whatever `make` gives; every rank opens it before its first dispatch."""

    def __init__(self, make: Callable[[], Dispatcher[Any]]) -> None:
        self._make = make
        self._made: Dispatcher[Any] | None = None

    def open(self) -> None:
        """Make the buffers. Collective, outside of every capture. Raises what `make` raises."""
        assert self._made is None, "opened twice"
        self._made = self._make()

    @property
    def _inner(self) -> Dispatcher[Any]:
        assert self._made is not None, "a dispatch before the dispatcher was opened"
        return self._made

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Pending[tuple[Rows, Any]]:
        return self._inner.dispatch_begin(x, routing, step)

    def combine_begin(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        return self._inner.combine_begin(y, handle)

    def split(self, rows: Rows, handle: Any) -> tuple[tuple[Rows, Any], tuple[Rows, Any]]:
        return splitting(self._inner).split(rows, handle)

    def combine_first_begin(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        return splitting(self._inner).combine_first_begin(y, handle)

    def combine_rest_begin(self, y: Tensor, handle: Any, first: Pending[Tensor]) -> Pending[Tensor]:
        return splitting(self._inner).combine_rest_begin(y, handle, first)

    def close(self) -> None:
        """Free the buffers. Collective; idempotent."""
        made, self._made = self._made, None
        if made is not None:
            made.close()
