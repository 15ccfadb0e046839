"""Checksums of weights on the device: equal bytes, equal numbers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_WIDTH: Final = 256
_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)
# splitmix64 (Steele, Lea, Flood 2014), as signed numbers.
_STEP: Final = 0x9E3779B97F4A7C15 - 2**64
_MIX: Final = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def checksum(data: Tensor) -> Tensor:
    """`data` contiguous, any dtype and shape -> `[2] int64` on its device. No host sync, no copy of the data.

    The bytes are words of a grid of 256 columns. Each column is summed up modulo 2^64, and so is each row; a sum and
    its place are mixed by a bijection that is not linear, and what comes of all columns is one number, of all rows the
    other. One wrong word changes both. Two words that have changed places change the sums of two columns or of two
    rows, hence a number, but for one chance in 2^64; so do rows or columns whose sums differ. What leaves every sum as
    it was is not seen, such as two rows of equal sums that have changed places: at least four words must be wrong for
    that, in two rows and two columns. A CRC is serial; these are two reductions at the speed of memory. It is no
    protection against forgery.
    """
    flat = data.view(-1).view(torch.uint8)
    words = flat.view(next(dtype for dtype in _WORDS if not flat.numel() % dtype.itemsize))
    whole = words.numel() // _WIDTH * _WIDTH
    grid, rest = words[:whole].view(-1, _WIDTH), words[whole:]
    columns, rows = grid.sum(0, dtype=torch.int64), grid.sum(1, dtype=torch.int64)
    columns[: rest.numel()] += rest
    rows = torch.cat((rows, rest.sum(dtype=torch.int64).view(1)))
    return torch.stack([_mixed(sums).sum() for sums in (columns, rows)])


def _mixed(sums: Tensor) -> Tensor:
    """Each sum with its place."""
    x = sums + torch.arange(1, sums.numel() + 1, device=sums.device) * _STEP
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """To the right, zeros moving in."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)
