"""Storage of the paged latent KV: per layer `[pages, page_size]` rows, one row per token for all heads.

C kv_lora_rank, R rope dims. A row is `[C + R]` numbers in one dtype, or, in fp8, C numbers of e4m3 with an fp32 scale
per 128 of them, and R in the dtype. A token attends to what the cache holds: in fp8 to rounded rows, its own too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.mla import LatentCache, ScaledLatent


@dataclass(frozen=True, slots=True)
class LatentKVCache:
    """One rank's cache. `fp8`: layers are `ScaledLatent`, else tensors `[pages, page_size, C + R]`."""

    layers: tuple[LatentCache, ...]
    page_size: int
    fp8: bool = False

    @classmethod
    def zeros(
        cls,
        num_layers: int,
        *,
        num_pages: int,
        page_size: int,
        latent: int,
        rope: int,
        dtype: torch.dtype,
        device: torch.device,
        fp8: bool = False,
    ) -> LatentKVCache:
        """All rows 0. `latent` = C, `rope` = R."""

        def layer() -> LatentCache:
            if fp8:
                return ScaledLatent.zeros(
                    num_pages, page_size, latent=latent, rope=rope, rope_dtype=dtype, device=device
                )
            return torch.zeros(num_pages, page_size, latent + rope, dtype=dtype, device=device)

        return cls(tuple(layer() for _ in range(num_layers)), page_size, fp8)
