"""The latent cache in fp8. P pages, S rows per page, C latent width, R rotary width, G = ceil(C/128) groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from moe_kernels.backends import require
from moe_kernels.quant import quantize_rows

GROUP: Final = 128
"""Latent columns that share a scale."""


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLatent:
    """Cached rows of C + 4·G + 2·R bytes (DeepSeek-V3: 656, against 1152 in bf16), in three tensors.

    `data [P, S, C]` float8_e4m3fn and `scale [P, S, G]` fp32: the latent is `data * scale` of its row and group of 128
    columns (the last group may be short). `rope [P, S, R]`: the rotary part, not quantised, as it carries positions.
    """

    data: Tensor
    scale: Tensor
    rope: Tensor

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int,
        *,
        latent: int,
        rope: int,
        rope_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> ScaledLatent:
        """All rows 0. `latent` = C, `rope` = R."""
        rows = (num_pages, page_size)
        return cls(
            torch.zeros(*rows, latent, dtype=torch.float8_e4m3fn, device=device),
            torch.zeros(*rows, -(-latent // GROUP), device=device),
            torch.zeros(*rows, rope, dtype=rope_dtype, device=device),
        )

    def __post_init__(self) -> None:
        pages, size, latent = self.data.shape
        wanted = (pages, size, -(-latent // GROUP))
        require(
            self.data.dtype == torch.float8_e4m3fn
            and self.scale.dtype == torch.float32
            and self.scale.shape == wanted
            and self.rope.shape[:2] == self.data.shape[:2],
            f"ScaledLatent: data is {tuple(self.data.shape)} {self.data.dtype}, scale {tuple(self.scale.shape)} "
            f"{self.scale.dtype}, rope {tuple(self.rope.shape)}; data must be float8_e4m3fn, scale fp32 {wanted}, rope "
            "of the same pages; make it with ScaledLatent.zeros",
        )

    @property
    def page_size(self) -> int:
        """S."""
        return self.data.shape[1]

    @property
    def width(self) -> int:
        """C + R."""
        return self.data.shape[2] + self.rope.shape[2]

    def write_(self, rows: Tensor, values: Tensor, *, backend: str | None = None) -> None:
        """Store `values [n, C+R]` as the flat rows `rows [n] int64`, quantised: scale = max(amax, 1e-4) / 448."""
        latent = self.data.shape[2]
        scaled = quantize_rows(values[:, :latent].contiguous(), group=GROUP, backend=backend)
        # Bytes: an fp8 tensor has no index_copy_.
        self.data.flatten(0, 1).view(torch.uint8).index_copy_(0, rows, scaled.data.view(torch.uint8))
        self.scale.flatten(0, 1).index_copy_(0, rows, scaled.scale)
        self.rope.flatten(0, 1).index_copy_(0, rows, values[:, latent:].to(self.rope.dtype))

    def read(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The flat rows `rows [...] int64` -> `[..., C+R]` in `dtype`."""
        flat = rows.reshape(-1)
        data = self.data.flatten(0, 1).view(torch.uint8).index_select(0, flat).view(torch.float8_e4m3fn)
        scale = self.scale.flatten(0, 1).index_select(0, flat)
        if scale.shape[1] > 1:  # one group's scale broadcasts
            scale = scale.repeat_interleave(GROUP, dim=1)[:, : data.shape[1]]
        latent = (data.float() * scale).to(dtype)
        rope = self.rope.flatten(0, 1).index_select(0, flat).to(dtype)
        return torch.cat((latent, rope), dim=1).view(*rows.shape, self.width)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All rows, `[P, S, C+R]`."""
        pages, size, _ = self.data.shape
        return self.read(torch.arange(pages * size, device=self.data.device).view(pages, size), dtype)


LatentCache: TypeAlias = Tensor | ScaledLatent
"""One layer's cached rows: `[P, S, C+R]` as they were computed, or in fp8."""
