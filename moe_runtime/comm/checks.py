"""Checks of collective arguments, shared by virtual ranks and processes, so that both refuse the same calls."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_runtime.errors import CommunicationError

Counts = Sequence[int]
Ranks = tuple[int, ...]
IntMatrix = npt.NDArray[np.int64]


class DisagreementError(CommunicationError):
    """Inputs that do not fit together; the text names world ranks."""


def check_summable(x: Tensor, op: str) -> None:
    """Raise unless `x` has a dtype with a defined sum (8-bit floats and bool have none)."""
    dtype = x.dtype
    if dtype is torch.bool or dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1):
        raise ValueError(f"{op} of {dtype}: this dtype has no sum. Convert to bfloat16, float32 or an integer.")


def check_has_rows(x: Tensor, op: str) -> None:
    if x.dim() == 0:
        raise ValueError(f"{op} got a 0-dimensional tensor: rows are needed, give it shape [n, ...].")


def check_divisible(x: Tensor, size: int) -> None:
    """Raise unless the rows of `x` make `size` equal blocks."""
    check_has_rows(x, "reduce_scatter")
    if x.shape[0] % size:
        raise ValueError(f"reduce_scatter got {x.shape[0]} rows: it needs a multiple of the group's size, {size}.")


def check_all_to_all(x: Tensor, send_counts: Counts, recv_counts: Counts, out: Tensor | None, size: int) -> None:
    """Raise unless both counts have one entry per rank, and `out`, where there is one, holds what is received."""
    check_has_rows(x, "all_to_all")
    if len(send_counts) != size or len(recv_counts) != size:
        raise ValueError(
            f"all_to_all got {len(send_counts)} send_counts and {len(recv_counts)} recv_counts: "
            f"both need one entry for each of the group's {size} ranks."
        )
    shape = (sum(recv_counts), *x.shape[1:])
    if out is not None and (out.shape != shape or out.dtype is not x.dtype or not out.is_contiguous()):
        raise ValueError(
            f"all_to_all got out {tuple(out.shape)} {out.dtype}{'' if out.is_contiguous() else ', not contiguous'}: "
            f"it must be contiguous {shape} {x.dtype}."
        )


def check_member(member: int, size: int, name: str) -> None:
    if not 0 <= member < size:
        raise ValueError(f"{name}={member}: must be a rank of the group, 0..{size - 1} (not a world rank).")


def check_share(payload: bytes | None, src: int, *, rank: int, size: int) -> None:
    """Raise unless exactly the source has a payload."""
    check_member(src, size, "src")
    if (payload is None) == (rank == src):
        raise ValueError(
            f"share from src={src}: group rank {rank} gave {'None' if payload is None else 'a payload'}; "
            "the source gives bytes and all others None."
        )


def check_rows(rows: int, total: int, rank: int) -> None:
    """Raise unless `send_counts` of world rank `rank`, which add up to `total`, cover its `rows`."""
    if rows != total:
        raise DisagreementError(
            f"rank {rank} gives all_to_all {rows} rows but its send_counts add up to {total}: they must be equal."
        )


def check_meeting_counts(send: IntMatrix, recv: IntMatrix, ranks: Ranks) -> None:
    """Raise unless every rank expects what its peers send. `send [source, target]`, `recv [target, source]`, rows."""
    if send.min() < 0:
        source, target = (int(i) for i in np.argwhere(send < 0)[0])
        raise DisagreementError(
            f"rank {ranks[source]} gives a negative send count, {send[source, target]}, for rank {ranks[target]}."
        )
    if (recv != send.T).any():
        target, source = (int(i) for i in np.argwhere(recv != send.T)[0])
        raise DisagreementError(
            f"rank {ranks[target]} expects {recv[target, source]} rows from rank {ranks[source]}, "
            f"which sends it {send[source, target]}: recv_counts must be what the peers send."
        )


def pack_ints(row: Sequence[int]) -> bytes:
    """`row` as native int64; TypeError for anything but integers, OverflowError past 64 bits."""
    try:
        return struct.pack(f"{len(row)}q", *row)
    except struct.error as error:
        if all(hasattr(value, "__index__") for value in row):
            raise OverflowError(f"{max(row, key=abs)} does not fit 64 bits: rows are int64.") from error
        raise TypeError(f"a row holds integers only, got {list(row)[:8]}.") from error


def unpack_ints(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"{len(data) // 8}q", data)


def show_signature(signature: tuple[object, ...]) -> str:
    """For example "[4, 128] torch.float32"."""
    return " ".join(str(list(item)) if isinstance(item, torch.Size) else str(item) for item in signature)


def show_ranks(ranks: Iterable[int]) -> str:
    """ "rank 3" or "ranks 0-3, 8"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank {text}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"ranks {text}"
