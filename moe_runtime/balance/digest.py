"""Checksums of weights on the device: equal bytes, equal numbers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_WIDTH: Final = 256
_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)


def checksum(data: Tensor) -> Tensor:
    """`data` contiguous, any dtype and shape -> `[2] int64` on its device. No host sync, no copy of the data.

    The bytes are words w of a grid of 256 columns; the numbers are sum (2 column + 1) w and sum (2 row + 1) w, modulo
    2^64. The factors are odd, so one wrong word changes both; words that have changed places change one of them, where
    a plain sum would not. A CRC finds no more of what happens to weights on their way (lost, doubled or swapped pieces,
    flipped bits), and is serial: these are two reductions at the speed of memory. It is no protection against forgery.
    """
    flat = data.view(-1).view(torch.uint8)
    words = flat.view(next(dtype for dtype in _WORDS if not flat.numel() % dtype.itemsize))
    whole = words.numel() // _WIDTH * _WIDTH
    grid, rest = words[:whole].view(-1, _WIDTH), words[whole:]
    columns, rows = grid.sum(0, dtype=torch.int64), grid.sum(1, dtype=torch.int64)
    columns[: rest.numel()] += rest
    rows = torch.cat((rows, rest.sum(dtype=torch.int64).view(1)))
    return torch.stack([(sums * _odd(sums)).sum() for sums in (columns, rows)])


def _odd(like: Tensor) -> Tensor:
    return torch.arange(1, 2 * like.numel(), 2, device=like.device)
