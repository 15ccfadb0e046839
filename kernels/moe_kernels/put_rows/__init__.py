"""Rows put straight into the memory of the ranks whose experts they go to, and outputs read back from there.

T tokens, K top-k, H hidden, S ranks, E slots of each, P = S·E, R room for rows, G scales of a row.

One dispatch is `announce`, `place`, `arrive`, then the experts, then `publish` and `pull`, the same calls on all ranks:
* `announce` writes how many rows go to each slot into every rank's counts;
* `place` knows from all counts where each row belongs, so that rows stand in order of slot, source rank and token;
* `pull` reads the K rows of each token where they are and sums them in top-k order, fp32.

Signals carry the number of the dispatch and only grow, so nothing is ever reset. No rank overwrites what another still
reads: rows of dispatch n+1 are put only after the counts of n+1 came from every rank, and each rank sends these after
its reads of dispatch n (all calls of a rank on one stream). Counts are overwritten by a rank that has seen the rows of
dispatch n from everyone, who by then have read the counts.
A wait that lasts for POLLS looks stops its kernel with an assertion: a rank is missing.
Ranks whose memory has no address here are reached by NVSHMEM's own device functions (`Peers.far`), without scales.
Ranks that share a stream must all have made a call before any makes the next (`arrive` waits for `place`, and so on).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from moe_kernels.backends import check_triton, require
from moe_kernels.put_rows.block import BITCODE, Announced, Block, Far, Peers, Spans, find_bitcode
from moe_kernels.scaled import BlockScaled

__all__ = [
    "BITCODE",
    "MAX_SLOTS",
    "Announced",
    "Block",
    "Far",
    "Peers",
    "Spans",
    "announce",
    "arrive",
    "find_bitcode",
    "place",
    "publish",
    "pull",
]

MAX_SLOTS: Final = 4096
"""Of all ranks together: bins of one histogram."""


def announce(peers: Peers, slots: Tensor) -> Announced:
    """Begin the next dispatch: tell all ranks how many rows `slots [T, K] int64` (0..P-1, others go nowhere) bring.

    Raises KernelError on other slots.
    """
    check_triton(slots, op="announce")
    block = peers.block
    require(
        slots.dim() == 2 and slots.dtype == torch.int64 and slots.is_contiguous(),
        f"announce: slots are {tuple(slots.shape)} {slots.dtype} with strides {slots.stride()}; they must be [T, K], "
        "int64 and contiguous; call .contiguous()",
    )
    require(
        1 <= block.ranks * block.slots <= MAX_SLOTS,
        f"announce: {block.ranks} ranks of {block.slots} slots; at most {MAX_SLOTS} in all; use fewer slots per rank",
    )
    from moe_kernels.put_rows import triton as kernels

    return kernels.announce(peers, slots)


def place(
    peers: Peers,
    x: Tensor | BlockScaled,
    slots: Tensor,
    announced: Announced,
    *,
    spans: Spans,
    scale_strides: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Wait for all counts, put each row of `x [T, H]` where it belongs, and signal it.

    Returns the row of each assignment at its destination, `[T, K] int64` (-1 for none), and of this rank's own slots
    the `[E] int32` ends of their rows, or with `spans.room` their numbers. `scale_strides` (row, group): of the scales
    at the destination. Raises KernelError where x does not fit.
    """
    data = x if isinstance(x, Tensor) else x.data
    block = peers.block
    require(
        data.dim() == 2 and data.shape[0] == slots.shape[0] and data.stride(1) == 1,
        f"place: x is {tuple(data.shape)} with strides {data.stride()} for {slots.shape[0]} rows of slots; it must "
        "have a row of unit stride for each; call .contiguous()",
    )
    require(
        data.shape[1] * data.element_size() <= block.row_bytes,
        f"place: rows of {data.shape[1]} x {data.dtype} exceed the block's {block.row_bytes} bytes per row",
    )
    groups = 0 if isinstance(x, Tensor) else x.scale.shape[1]
    require(
        not groups or peers.far is None, "place: rows with scales reach ranks with an address only; pass x unquantised"
    )
    require(groups in (0, block.groups), f"place: {groups} scales per row, the block has room for {block.groups}")
    from moe_kernels.put_rows import triton as kernels

    return kernels.place(peers, x, slots, announced, spans, scale_strides)


def arrive(peers: Peers) -> None:
    """Wait for the rows of all ranks."""
    from moe_kernels.put_rows import triton as kernels

    kernels.arrive(peers)


def publish(peers: Peers, y: Tensor, ends: Tensor, *, spans: Spans) -> None:
    """Put the experts' outputs `y`, shaped as the rows, in the place of the rows, for all ranks to read.

    `ends [E] int32` as `place` gave them. Raises KernelError where y does not fit.
    """
    wide = y.shape[-1] * y.element_size()
    require(
        y.is_contiguous() and wide <= peers.block.row_bytes and y.numel() <= peers.block.rows * y.shape[-1],
        f"publish: y is {tuple(y.shape)} {y.dtype} with strides {y.stride()}; it must be contiguous and within the "
        f"block's {peers.block.rows} rows of {peers.block.row_bytes} bytes",
    )
    from moe_kernels.put_rows import triton as kernels

    kernels.publish(peers, y, ends, spans)


def pull(peers: Peers, slots: Tensor, row_of: Tensor, weights: Tensor, *, hidden: int, dtype: torch.dtype) -> Tensor:
    """`[T, hidden]` in `dtype`: per token the sum of `weights [T, K] fp32` times its rows of that dtype, in top-k
    order.

    Bitwise what `unpermute` makes of the same rows. Waits, per token, for the ranks that it reads from.
    Raises KernelError where shapes differ.
    """
    require(
        slots.shape == row_of.shape == weights.shape and weights.is_contiguous() and weights.dtype == torch.float32,
        f"pull: slots {tuple(slots.shape)}, row_of {tuple(row_of.shape)}, weights {tuple(weights.shape)} "
        f"{weights.dtype}; make them agree, weights contiguous float32",
    )
    from moe_kernels.put_rows import triton as kernels

    return kernels.pull(peers, slots, row_of, weights, hidden, dtype)
