"""What MLA does between its projections and its attention: rotate the query, make the latent row, cache it.

n tokens, h local heads, C kv_lora_rank, R rotary width, P pages of S rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend
from moe_kernels.errors import KernelError
from moe_kernels.latent import eager
from moe_kernels.mla.latent import LatentCache, ScaledLatent

__all__ = ["Prepared", "mla_prepare_"]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`query_rope [n, h, R]` rotated; `latent [n, C+R]`, None where it is in the cache only."""

    query_rope: Tensor
    latent: Tensor | None


def mla_prepare_(
    query_rope: Tensor,
    down: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    kv_norm: Tensor,
    eps: float,
    cache: LatentCache | None,
    cache_rows: Tensor | None,
    keep_latent: bool = True,
    backend: str | None = None,
) -> Prepared:
    """Rotate the query and write the latent rows `[rms_norm(down[:, :C]) | rotated down[:, C:]]`; on Triton one launch.

    `query_rope [n, h, R]` and `down [n, C+R]` may be slices with rows of unit stride; `cos, sin [n, R/2]`: see
    `apply_rope`; `kv_norm [C]`: see `rms_norm`. `cache [P, S, C+R]` is written in place at `cache_rows [n] int64`, row
    numbers over all pages, distinct; a negative one is written nowhere (padding). A row is rounded to down's dtype
    first, then to the cache's; for a `ScaledLatent` it is quantised in the same launch, to the bytes of `write_`.
    `cache=None` writes nothing; `keep_latent=False` returns no latent.
    A token's bits depend on its own rows alone. Raises KernelError where shapes do not fit or nothing would be kept.
    """
    rank, width = kv_norm.shape[0], query_rope.shape[-1]
    tokens = down.shape[0]
    # Messages are made only where something is wrong: on a CPU 320 virtual ranks call this in every layer.
    if query_rope.dim() != 3 or query_rope.shape[0] != tokens or down.shape != (tokens, rank + width):
        raise KernelError(
            f"mla_prepare_: query_rope is {tuple(query_rope.shape)}, down {tuple(down.shape)}, kv_norm {(rank,)}; they "
            "must be [n, h, R], [n, C+R] and [C]"
        )
    if cos.shape != (tokens, width // 2) or sin.shape != cos.shape or width % 2:
        raise KernelError(
            f"mla_prepare_: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; they must be {(tokens, width // 2)}"
        )
    if cache is None and not keep_latent:
        raise KernelError("mla_prepare_: cache=None and keep_latent=False keep nothing; give one")
    if isinstance(cache, ScaledLatent):
        _check_part("cache.data", cache.data, rank)
        _check_part("cache.scale", cache.scale, cache.scale.shape[-1])
        _check_part("cache.rope", cache.rope, width)
    elif cache is not None:
        _check_part("cache", cache, rank + width)
    if cache is not None and (cache_rows is None or cache_rows.shape != (tokens,) or cache_rows.dtype != torch.int64):
        seen = "None" if cache_rows is None else f"{tuple(cache_rows.shape)} {cache_rows.dtype}"
        raise KernelError(f"mla_prepare_: cache_rows is {seen}; with a cache it must be ({tokens},) int64")
    if choose_backend(down, backend, op="mla_prepare_") == "torch":
        query, latent = eager.mla_prepare(query_rope, down, cos, sin, kv_norm, eps)
        if cache is not None and cache_rows is not None:
            eager.write_rows_(cache, cache_rows, latent)
        return Prepared(query, latent if keep_latent else None)
    from moe_kernels.latent import triton as kernels

    return Prepared(*kernels.mla_prepare(query_rope, down, cos, sin, kv_norm, eps, cache, cache_rows, keep_latent))


def _check_part(name: str, part: Tensor, columns: int) -> None:
    if not part.is_contiguous() or part.shape[-1] != columns:
        raise KernelError(
            f"mla_prepare_: {name} is {tuple(part.shape)} with strides {part.stride()}; it must be contiguous "
            f"[P, S, {columns}]"
        )
