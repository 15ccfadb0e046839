"""Storage of the paged latent KV: per layer `[pages, page_size, C + R]`, one latent row per token, for all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LatentKVCache:
    """One rank's cache."""

    layers: tuple[Tensor, ...]
    page_size: int

    @classmethod
    def zeros(
        cls, num_layers: int, *, num_pages: int, page_size: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> LatentKVCache:
        """All rows 0. `width` = kv_lora_rank + rope dims."""
        shape = (num_pages, page_size, width)
        return cls(tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)), page_size)
