"""Hidden sizes that a kernel does not take: rows travel with columns of zeros. H hidden."""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn.functional import pad

SCALE_BLOCK: Final = 128
"""Values of a row for each fp32 scale."""


def widened(x: Tensor, width: int) -> Tensor:
    """`x [..., H]` with zeros up to `width` columns, contiguous."""
    missing = width - x.shape[-1]
    return pad(x, (0, missing)) if missing else x.contiguous()


def narrowed(data: Tensor, scales: Tensor | None, hidden: int) -> tuple[Tensor, Tensor | None]:
    """The first `hidden` columns and the scales of those: views."""
    if data.shape[-1] == hidden:
        return data, scales
    return data[..., :hidden], None if scales is None else scales[..., : -(-hidden // SCALE_BLOCK)]
