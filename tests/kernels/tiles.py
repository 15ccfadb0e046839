"""Tiles by hand: tiny shapes would all choose the lowest and narrowest ones."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.grouped_gemm.configs import Entry, shipped


def entries(dtype: torch.dtype, *, swiglu: bool, height: int) -> list[Entry]:
    """The table's entries of a height (fp32 has one height), widest first."""
    size = dtype.itemsize
    found = [entry for bytes_, fused, entry in shipped() if bytes_ == size and fused is swiglu]
    return [entry for entry in found if size == 4 or entry.config.block_m == height]


def pin_tiles(monkeypatch: pytest.MonkeyPatch, height: int, *, number: int = 0) -> None:
    """Let every product take the entry `number` (or the narrowest) of `height`, whatever its shape."""

    def chosen(*, dtype: torch.dtype, swiglu: bool, **_: object) -> Entry:
        of_height = entries(dtype, swiglu=swiglu, height=height)
        return of_height[min(number, len(of_height) - 1)]

    monkeypatch.setattr("moe_kernels.grouped_gemm.triton.configure", chosen)
