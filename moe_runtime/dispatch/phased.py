"""Two backends in one: a dispatch goes the way that its step's phase says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_runtime.dispatch.base import Capabilities, Dispatcher, DispatchStep, Phase, Rows, splitting
from moe_runtime.types import Pending, PhysicalRouting


@dataclass(frozen=True, slots=True)
class PhasedHandle:
    of: Dispatcher[Any]
    inner: Any


@dataclass(frozen=True, slots=True)
class PhasedDispatcher:
    """`Dispatcher[PhasedHandle]`: `mixed` for steps with prompt tokens, `decode` for those without."""

    mixed: Dispatcher[Any]
    decode: Dispatcher[Any]

    @property
    def capabilities(self) -> Capabilities:
        """What holds for both; of graphs decode's, of parts mixed's."""
        mixed, decode = self.mixed.capabilities, self.decode.capabilities
        return Capabilities(
            sums_at_home=mixed.sums_at_home and decode.sums_at_home,
            tolerance=max(mixed.tolerance, decode.tolerance),
            layouts=tuple([layout for layout in mixed.layouts if layout in decode.layouts]),
            counts_on_host=mixed.counts_on_host or decode.counts_on_host,
            graph_safe=decode.graph_safe,
            dedups_per_rank=mixed.dedups_per_rank and decode.dedups_per_rank,
            keeps_order=mixed.keeps_order and decode.keeps_order,
            splits_combine=mixed.splits_combine,
        )

    def dispatch_begin(
        self, x: Tensor, routing: PhysicalRouting, step: DispatchStep
    ) -> Pending[tuple[Rows, PhasedHandle]]:
        chosen = self.mixed if step.phase is Phase.MIXED else self.decode
        return _Arriving(chosen, chosen.dispatch_begin(x, routing, step))

    def combine_begin(self, y: Tensor, handle: PhasedHandle) -> Pending[Tensor]:
        return handle.of.combine_begin(y, handle.inner)

    def split(self, rows: Rows, handle: PhasedHandle) -> tuple[tuple[Rows, PhasedHandle], tuple[Rows, PhasedHandle]]:
        of = handle.of
        (first, ours), (rest, theirs) = splitting(of).split(rows, handle.inner)
        return (first, PhasedHandle(of, ours)), (rest, PhasedHandle(of, theirs))

    def combine_first_begin(self, y: Tensor, handle: PhasedHandle) -> Pending[Tensor]:
        return splitting(handle.of).combine_first_begin(y, handle.inner)

    def combine_rest_begin(self, y: Tensor, handle: PhasedHandle, first: Pending[Tensor]) -> Pending[Tensor]:
        return splitting(handle.of).combine_rest_begin(y, handle.inner, first)

    def close(self) -> None:
        self.mixed.close()
        self.decode.close()


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A dispatch of one of the two."""

    of: Dispatcher[Any]
    pending: Pending[tuple[Rows, Any]]

    def wait(self) -> tuple[Rows, PhasedHandle]:
        rows, inner = self.pending.wait()
        return rows, PhasedHandle(self.of, inner)
