"""Constants of the kernels that put rows, launch geometry among them. Dims as in the package.

Geometry is by reasoning, not yet measured on hardware; no choice of it shows in the results.
"""

from __future__ import annotations

from typing import Any

from moe_kernels.permute.triton import BLOCK_TOKENS
from moe_kernels.put_rows.block import COUNTS, READY, Block, Spans


def lanes(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def bins(slots: int) -> int:
    """Of a histogram."""
    return max(32, lanes(slots))


def columns_of(hidden: int, itemsize: int) -> int:
    """16 bytes for each of 128 threads, in whole groups of 128 values."""
    return max(128, min(2048 // itemsize, lanes(hidden)))


def announce_constants(block: Block, *, one: bool, far: bool = False) -> dict[str, Any]:
    num_slots = block.ranks * block.slots
    constants = {"COUNTS_AT": block.counts_at, "CHANNEL": COUNTS, "S": block.ranks, "P": num_slots}
    return constants | {"BINS": bins(num_slots), "ONE": one, "CHUNK": 1024, "FAR": far}


def offsets_constants(block: Block, spans: Spans, *, far: bool = False) -> dict[str, Any]:
    wide = lanes(block.slots)
    return {
        "COUNTS_AT": block.counts_at,
        "CHANNEL": COUNTS,
        "S": block.ranks,
        "E": block.slots,
        "SOURCES": lanes(block.ranks),
        "LANES": wide,
        "CHUNK": max(1, min(lanes(block.ranks), 2048 // wide)),
        "ALIGNMENT": spans.alignment,
        "PADDED": spans.room > 0,
        "FAR": far,
    }


def place_constants(
    block: Block, hidden: int, itemsize: int, top_k: int, *, one: bool, groups: int = 0
) -> dict[str, Any]:
    return {
        "DATA_AT": block.data_at,
        "SCALES_AT": block.scales_at,
        "H": hidden,
        "K": top_k,
        "LANES": lanes(top_k),
        "E": block.slots,
        "P": block.ranks * block.slots,
        "ONE": one,
        "PER_BLOCK": BLOCK_TOKENS * top_k,
        "CHUNK": 1024 if one else lanes(BLOCK_TOKENS * top_k),
        "COLUMNS": columns_of(hidden, itemsize),
        "GROUPS": groups,
        "STAGE_AT": block.stage_at,
        "FAR": False,
    }


def pull_constants(block: Block, hidden: int, itemsize: int, top_k: int) -> dict[str, Any]:
    return {
        "CHANNEL": READY,
        "DATA_AT": block.data_at,
        "S": block.ranks,
        "E": block.slots,
        "H": hidden,
        "K": top_k,
        "LANES": lanes(top_k),
        "COLUMNS": columns_of(hidden, itemsize),
        "PULL_AT": block.pull_at,
        "FAR": False,
    }
