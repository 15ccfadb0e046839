"""Values that cross floors. T tokens, K top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

NOWHERE = -1
"""Expert id of an assignment that routes nowhere (padding rows)."""


class Pending(Protocol[T_co]):
    """Something begun; `wait()` returns its value and is called exactly once."""

    def wait(self) -> T_co: ...


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A pending value that is there already."""

    value: T

    def wait(self) -> T:
        return self.value


@dataclass(frozen=True, slots=True)
class LogicalRouting:
    """What the router chose: `expert_ids [T, K] int64` in 0..E'-1 (NOWHERE on padding), `weights [T, K] fp32`.

    The ids of one token are distinct.
    """

    expert_ids: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class PhysicalRouting:
    """Where it runs: `expert_ids [T, K] int64` are slots 0..P-1 (NOWHERE on padding), `weights [T, K] fp32`.

    The ids of one token are distinct.
    """

    expert_ids: Tensor
    weights: Tensor
