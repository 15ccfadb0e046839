"""Launches of the kernels that put rows into other ranks' blocks. Dims as in the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import interpreted
from moe_kernels.errors import KernelError
from moe_kernels.permute.triton import BLOCK_TOKENS, ONE_LAUNCH, count_kernel, scan_kernel
from moe_kernels.put_rows import triton_kernels as kernels
from moe_kernels.put_rows.block import COUNTS, READY, ROWS, Announced, Peers, Spans
from moe_kernels.put_rows.geometry import (
    announce_constants,
    bins,
    columns_of,
    lanes,
    offsets_constants,
    place_constants,
    pull_constants,
)
from moe_kernels.put_rows.triton_return import publish_kernel, pull_kernel
from moe_kernels.scaled import BlockScaled

POLLS: Final = 2**27
"""Looks at a signal before a wait gives up: a look takes some 0.5 us, so a minute."""
_COPIED: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Rows travel as integers of their values' size: bytes stay as they are."""


def aot_cases() -> Iterator[AotCase]:
    """See `put_rows/cases.py`."""
    from moe_kernels.put_rows.cases import cases

    return cases()


def _launch(peers: Peers, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`options`: the kernel's constants and how it is compiled."""
    if peers.far is not None and not interpreted():
        options["extern_libs"] = {"libnvshmem_device": str(peers.far.bitcode)}
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        compiled._init_handles()
        peers.far.prepare(int(compiled.module))
    kernel[grid](*arguments, **options)


def announce(peers: Peers, slots: Tensor) -> Announced:
    block, count = peers.block, slots.numel()
    num_slots, top_k = block.ranks * block.slots, slots.shape[1]
    peers.step.add_(1)
    earlier = totals = torch.empty(0, dtype=torch.int32, device=slots.device)
    if count > ONE_LAUNCH:
        blocks = triton.cdiv(slots.shape[0], BLOCK_TOKENS)
        earlier = torch.empty(num_slots, blocks, dtype=torch.int32, device=slots.device)
        totals = torch.empty(num_slots, dtype=torch.int32, device=slots.device)
        chunk = {"PER_BLOCK": BLOCK_TOKENS * top_k, "CHUNK": lanes(BLOCK_TOKENS * top_k)}
        count_kernel[(blocks,)](slots, earlier, count, **chunk, E=num_slots, BINS=bins(num_slots), num_warps=4)
        scan_kernel[(num_slots,)](earlier, totals, blocks, BLOCKS=lanes(blocks), num_warps=1)
    constants = announce_constants(block, one=count <= ONE_LAUNCH, far=peers.far is not None)
    _launch(
        peers,
        kernels.announce_kernel,
        (block.ranks,),
        slots,
        totals,
        peers.addresses,
        peers.step,
        count,
        peers.rank,
        **constants,
        num_warps=4,
    )
    return Announced(earlier)


def place(
    peers: Peers,
    x: Tensor | BlockScaled,
    slots: Tensor,
    announced: Announced,
    spans: Spans,
    scale_strides: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """`(row_of [T, K] int64, ends [E] int32)`."""
    block, device = peers.block, slots.device
    first_row = torch.empty(block.ranks * block.slots, dtype=torch.int32, device=device)
    ends = torch.empty(block.slots, dtype=torch.int32, device=device)
    row_of = torch.empty_like(slots)
    _check_came(peers, COUNTS)
    _launch(
        peers,
        kernels.offsets_kernel,
        (block.ranks,),
        peers.addresses,
        peers.step,
        first_row,
        ends,
        peers.rank,
        _polls(),
        spans.room,
        **offsets_constants(block, spans, far=peers.far is not None),
        num_warps=4,
        debug=True,
        sanitize_overflow=False,
    )
    data = x if isinstance(x, Tensor) else x.data
    source = data.view(_COPIED[data.element_size()])
    scale = torch.empty(0, dtype=torch.float32, device=device) if isinstance(x, Tensor) else x.scale.contiguous()
    groups = 0 if isinstance(x, Tensor) else x.scale.shape[1]
    tokens, hidden = source.shape
    if row_of.numel():
        one = row_of.numel() <= ONE_LAUNCH
        constants = place_constants(block, hidden, source.element_size(), slots.shape[1], one=one, groups=groups)
        constants["FAR"] = peers.far is not None
        _launch(
            peers,
            kernels.place_kernel,
            (tokens, triton.cdiv(hidden, constants["COLUMNS"])),
            source,
            scale,
            slots,
            announced.earlier,
            first_row,
            peers.addresses,
            row_of,
            peers.rank,
            triton.cdiv(tokens, BLOCK_TOKENS),
            source.stride(0),
            groups,
            *scale_strides,
            **constants,
            num_warps=4,
        )
    _signal(peers, ROWS)
    return row_of, ends


def arrive(peers: Peers) -> None:
    _check_came(peers, ROWS)
    _launch(
        peers,
        kernels.arrive_kernel,
        (1,),
        peers.addresses,
        peers.step,
        peers.rank,
        _polls(),
        CHANNEL=ROWS,
        S=peers.block.ranks,
        LANES=lanes(peers.block.ranks),
        FAR=peers.far is not None,
        num_warps=1,
        debug=True,
        sanitize_overflow=False,
    )


def publish(peers: Peers, y: Tensor, ends: Tensor, spans: Spans) -> None:
    block, hidden = peers.block, y.shape[-1]
    source = y.view(-1, hidden).view(_COPIED[y.element_size()])
    programs = 1 if interpreted() else max(1, 1056 // block.slots)  # 8 for each of 132 SMs
    publish_kernel[(block.slots, programs)](
        source,
        ends,
        peers.addresses,
        peers.rank,
        spans.room,
        DATA_AT=block.data_at,
        H=hidden,
        ALIGNMENT=spans.alignment,
        PADDED=spans.room > 0,
        COLUMNS=columns_of(hidden, y.element_size()),
        num_warps=4,
    )
    _signal(peers, READY)


def pull(peers: Peers, slots: Tensor, row_of: Tensor, weights: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """`[T, hidden]` in `dtype`."""
    tokens, top_k = row_of.shape
    out = torch.empty(tokens, hidden, dtype=dtype, device=row_of.device)
    if not row_of.numel():
        return out.zero_()
    _check_came(peers, READY)
    constants = pull_constants(peers.block, hidden, out.element_size(), top_k) | {"FAR": peers.far is not None}
    _launch(
        peers,
        pull_kernel,
        (tokens, triton.cdiv(hidden, constants["COLUMNS"])),
        peers.addresses,
        peers.step,
        slots,
        row_of,
        weights,
        out,
        peers.rank,
        _polls(),
        **constants,
        num_warps=4,
        # A fused multiply-add would round once where `unpermute` rounds twice.
        enable_fp_fusion=False,
        debug=True,
        sanitize_overflow=False,
    )
    return out


def _signal(peers: Peers, channel: int) -> None:
    ranks = peers.block.ranks
    _launch(
        peers,
        kernels.signal_kernel,
        (1,),
        peers.addresses,
        peers.step,
        peers.rank,
        CHANNEL=channel,
        S=ranks,
        LANES=lanes(ranks),
        FAR=peers.far is not None,
        num_warps=1,
    )


def _polls() -> int:
    return 1 if interpreted() else POLLS


def _check_came(peers: Peers, channel: int) -> None:
    """The interpreter has no assertions of kernels and runs one rank at a time: what is not there will not come."""
    if not interpreted():
        return
    ranks = peers.block.ranks
    signals = peers.own[: channel * ranks * 8 + ranks * 8].view(torch.int64)[channel * ranks :]
    late = (signals < peers.step).nonzero().flatten().tolist()
    if late:
        raise KernelError(f"put_rows: ranks {late} have not come to dispatch {int(peers.step)}, channel {channel}")
