"""The block of memory that every rank holds and all ranks of a fabric address, and how it is divided.

S ranks, E slots of each, P = S·E, R room for rows, H hidden, G scales of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from torch import Tensor

CHANNELS: Final = 3
"""Signals from each rank: its counts are here, its rows are here, its experts' outputs can be read."""
COUNTS, ROWS, READY = range(CHANNELS)

_ALIGNMENT = 256

BITCODE: Final = "libnvshmem_device.bc"
"""In nvidia-nvshmem 3.4.5; 3.8.0 has one file per architecture instead."""


def find_bitcode() -> Path | None:
    """NVSHMEM's device library in the installed nvidia-nvshmem wheel, or None."""
    try:
        spec = find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [file for place in places if (file := Path(place) / "lib" / BITCODE).is_file()]
    return found[0] if found else None


def _up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Block:
    """Offsets in bytes, equal on all ranks.

    Signals `[CHANNELS, S] int64`: the number of the latest dispatch that rank s has come so far with. Counts `[S, P]
    int32`: rows of rank s for each slot of all ranks. Then R rows, what travels and in their place what comes back, and
    R·G scales fp32 (with room for rows up to a multiple of 4).
    """

    ranks: int
    slots: int
    rows: int
    row_bytes: int
    """Of the wider of a row that travels and one that comes back."""
    groups: int = 0
    """G; 0 where rows travel without scales."""
    staged: int = 0
    """Tokens of a rank for which there is room to put rows out to ranks out of reach, and for `staged * top_k` rows
    fetched from them; 0 where all are within reach."""
    top_k: int = 0

    @property
    def counts_at(self) -> int:
        return _up(CHANNELS * self.ranks * 8)

    @property
    def data_at(self) -> int:
        return self.counts_at + _up(self.ranks * self.ranks * self.slots * 4)

    @property
    def scales_at(self) -> int:
        return self.data_at + _up(self.rows * self.row_bytes)

    @property
    def stage_at(self) -> int:
        return self.scales_at + _up((self.rows + 3) // 4 * 4 * self.groups * 4)

    @property
    def pull_at(self) -> int:
        return self.stage_at + _up(self.staged * self.row_bytes)

    @property
    def num_bytes(self) -> int:
        return self.pull_at + _up(self.staged * self.top_k * self.row_bytes)


@dataclass(frozen=True, slots=True)
class Far:
    """NVSHMEM's device functions, for kernels that reach ranks without an address here."""

    bitcode: Path
    """`libnvshmem_device.bc`."""
    prepare: Callable[[int], None]
    """Makes a kernel's module known to NVSHMEM, by its handle, before its first launch; any number of times."""


@dataclass(frozen=True, slots=True, eq=False)
class Peers:
    """All blocks as one rank sees them."""

    block: Block
    rank: int
    own: Tensor
    """[num_bytes] uint8: this rank's block, its signals zero before any rank begins."""
    addresses: Tensor
    """[S] int64: where this rank finds each rank's block, its own too; 0 for those out of reach."""
    step: Tensor
    """[1] int64 on the device: the number of the latest dispatch, from 0. On the device, so that graphs can replay."""
    far: Far | None = None
    """Needed where some are out of reach."""


@dataclass(frozen=True, slots=True)
class Spans:
    """How a rank's rows lie: slot e at `e * room`, or where `room` is 0 one after the other, each at a multiple of
    `alignment`."""

    alignment: int = 1
    room: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Announced:
    """What `announce` counted, for `place`: empty where a token's program counts for itself."""

    earlier: Tensor
    """[P, blocks] int32: per slot, the rows of earlier blocks of tokens."""
