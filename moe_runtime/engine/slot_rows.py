"""The bytes of a slot as rows that travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, uint8

from moe_runtime.balance.moves import ROW_BYTES, Piece


def copy_rows(parts: Sequence[Tensor], piece: Piece, rows: Tensor, *, inward: bool) -> None:
    """Between the bytes of a slot, its `parts` one after the other, and the rows of a piece of it."""
    flat = rows.view(-1)
    for part, begin, end, at in _overlaps(parts, piece.first * ROW_BYTES, piece.last * ROW_BYTES):
        own, wire = part[begin:end], flat[at : at + end - begin]
        if inward:
            own.copy_(wire)
        else:
            wire.copy_(own)


def _overlaps(parts: Sequence[Tensor], first: int, last: int) -> Iterator[tuple[Tensor, int, int, int]]:
    """(part as bytes, begin and end in it, offset from `first`) of each part that bytes `first … last` touch."""
    start = 0
    for part in parts:
        data = part.view(-1).view(uint8)
        begin, end = max(first - start, 0), min(last - start, data.numel())
        if begin < end:
            yield data, begin, end, start + begin - first
        start += data.numel()
