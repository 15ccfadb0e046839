"""Dispatcher: the shuffle to the experts and back.

T tokens, H hidden, K top-k, E local slots, R received rows, C capacity.

Laws, checked by one contract suite over every backend:
* identity experts with weights summing to 1 return `x`;
* counts conserve the valid assignments: the rows received over all ranks are those with an id >= 0;
* zero tokens on any rank is legal and still collective;
* `local` is the oracle; `Capabilities.sums_at_home` says whether a backend equals it bitwise (weighted sum at the
  token's home rank, in top-k order, fp32) or within which bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar, cast

from torch import Tensor

from moe_runtime.types import Pending, PhysicalRouting

H = TypeVar("H")
"""What a backend remembers between dispatch and combine."""


class Phase(StrEnum):
    """What the agreed step holds; it only sizes the step."""

    IDLE = "idle"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class DispatchStep:
    """Agreed by all ranks of the ep group: at most `capacity` tokens per rank enter this dispatch."""

    capacity: int
    phase: Phase
    micro_batch: int = 0
    split_combine: bool = False
    """The outputs go home in two parts (`SplitDispatcher`); only with prompt tokens and two slots or more."""

    def check(self, x: Tensor) -> None:
        """Assert that `x [T, H]` keeps to what was agreed."""
        assert x.shape[0] <= self.capacity, f"{x.shape[0]} tokens exceed the agreed capacity {self.capacity}"


class Layout(StrEnum):
    GROUPED = "grouped"
    PADDED = "padded"


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """Contiguous rows sorted by local slot (prefill).

    `data [R, H]`; `psum [E] int32`: end of slot e's rows; slot e+1 starts at `psum[e]` rounded up to `alignment`.
    Rows between the slots and past `psum[-1]` are no one's and may hold anything, NaN too: a backend may make room for
    more rows than it receives.
    `weights [R] fp32`, only where the backend wants them applied before combine. `expected_rows`: the mean per slot,
    where R says little of it; it may choose tiles, never results. `exact`: all R rows are the slots' own.
    """

    data: Tensor
    psum: Tensor
    alignment: int = 1
    scales: Tensor | None = None
    weights: Tensor | None = None
    expected_rows: int | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """`data [E, C, H]`, of which the first `counts[e]` (`counts [E] int32`) rows are real (decode).

    The others are no one's and may hold anything, NaN too; C may exceed every count. `weights [E, C] fp32` and
    `expected_rows` as in GroupedRows; `scales [E, C, ceil(H/128)] fp32` where data is fp8.
    """

    data: Tensor
    counts: Tensor
    scales: Tensor | None = None
    weights: Tensor | None = None
    expected_rows: int | None = None


Rows = GroupedRows | PaddedRows


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What callers may rely on."""

    sums_at_home: bool
    """Weighted sum at the token's home, top-k order, fp32: bitwise equal to `local`."""
    tolerance: float
    """Bound on |y - local| / max|local| in fp32 where `sums_at_home` is false; else 0."""
    layouts: tuple[Layout, ...]
    counts_on_host: bool
    """Some dispatch waits on the host for its counts."""
    graph_safe: bool
    """Decode steps can be captured as CUDA graphs."""
    dedups_per_rank: bool = False
    """A token crosses once to a rank that holds several of its experts."""
    keeps_order: bool = True
    """Rows of a slot stand in order of source rank, then token."""
    splits_combine: bool = False
    """It is a SplitDispatcher. DeepEP is none: its releases combine a dispatch as a whole."""


class Dispatcher(Protocol[H]):
    """One per rank; used by all layers, one dispatch in flight per micro-batch."""

    @property
    def capabilities(self) -> Capabilities: ...

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Pending[tuple[Rows, H]]:
        """Send `x [T, H]` (T <= step.capacity) to the slots that `routing` names."""

    def combine_begin(self, y: Tensor, handle: H) -> Pending[Tensor]:
        """Bring the experts' outputs back (`y` shaped as the rows' data) and sum them by weight to `[T, H]`."""

    def close(self) -> None: ...


class SplitDispatcher(Dispatcher[H], Protocol[H]):
    """One that can bring the outputs of the first slots home while the others' are computed.

    After a dispatch with `DispatchStep.split_combine`, on all ranks: `split`, `combine_first_begin`, then
    `combine_rest_begin`, in place of `combine_begin`; the sum is bitwise the same.
    """

    def split(self, rows: Rows, handle: H) -> tuple[tuple[Rows, H], tuple[Rows, H]]:
        """`rows` as those of the first slots (`first_slots`) and of the others, views, each with its own handle."""

    def combine_first_begin(self, y: Tensor, handle: H) -> Pending[Tensor]:
        """Bring the outputs `y` of the first slots back, unsummed; what it gives is for `combine_rest_begin` alone."""

    def combine_rest_begin(self, y: Tensor, handle: H, first: Pending[Tensor]) -> Pending[Tensor]:
        """Bring the other slots' outputs back and sum both parts by weight to `[T, H]`."""


def first_slots(num_slots: int) -> int:
    """Slots of the first part, of `num_slots` >= 2: half of them, or one more, since only the second part's way home is
    left without company."""
    assert num_slots > 1, f"{num_slots} slots have no parts"
    return (num_slots + 1) // 2


def splitting(dispatcher: Dispatcher[H]) -> SplitDispatcher[H]:
    """`dispatcher`, known to be one that can; a configuration is checked for it."""
    assert dispatcher.capabilities.splits_combine, f"{type(dispatcher).__name__} combines as a whole"
    return cast("SplitDispatcher[H]", dispatcher)
