"""FlashMLA behind the contract of `mla_absorbed`: Hopper's own dense decoding kernel, where it is installed.

T query tokens, h heads, C latent width, R rotary width, P pages. FlashMLA (github.com/deepseek-ai/FlashMLA) is built
from source with nvcc 12.8 or newer; it is not on PyPI.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from moe_kernels.backends import require
from moe_kernels.errors import KernelError
from moe_kernels.mla.latent import ScaledLatent

PAGE_SIZE: Final = 64
LATENT: Final = 512
WIDTH: Final = 576
CAPABILITY: Final = (9, 0)
_DTYPES: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """Metadata is filled by the first layer's call and valid as long as lengths and shapes stay: one step."""

    metadata: Any
    page_table: Tensor
    lengths: Tensor
    """[T] int32, at least 1: what FlashMLA makes of no rows is not documented"""
    empty: Tensor
    """[T, 1, 1] bool"""
    batch_invariant: bool = False


def plan_flash(page_table: Tensor, kv_lens: Tensor, *, page_size: int, batch_invariant: bool) -> FlashPlan:
    """See `plan_absorbed`. Raises KernelError where FlashMLA is absent or cannot serve the step."""
    require(
        page_size == PAGE_SIZE,
        f"flash_mla: page_size is {page_size}; it reads pages of {PAGE_SIZE} rows only; set that size or take "
        "backend='triton'",
    )
    require(
        not batch_invariant,
        "flash_mla: batch_invariant=True; it cuts sequences by the batch's lengths; take backend='triton'",
    )
    capability = _capability(page_table.device)
    require(
        capability == CAPABILITY,
        f"flash_mla: {page_table.device} has compute capability {capability}; dense decoding is for 9.0 (Hopper) only; "
        "take backend='triton'",
    )
    try:
        metadata = _library().get_mla_metadata()[0]
    except TypeError as error:
        raise KernelError(
            "flash_mla: get_mla_metadata() wants arguments, so it is an old revision; build the current one"
        ) from error
    lengths, table = kv_lens.int(), page_table.int().clamp(min=0)  # a token without rows may have no page either
    return FlashPlan(metadata, table.contiguous(), lengths.clamp(min=1), lengths.eq(0).view(-1, 1, 1))


def attend(q_latent: Tensor, q_rope: Tensor, cache: Tensor | ScaledLatent, plan: FlashPlan, *, scale: float) -> Tensor:
    """See `mla_absorbed`."""
    require(
        not isinstance(cache, ScaledLatent),
        "flash_mla: the cache is a ScaledLatent; dense decoding reads bf16 and fp16 rows; take backend='triton'",
    )
    assert isinstance(cache, Tensor)
    widths = (q_latent.shape[2], q_rope.shape[2], cache.shape[2])
    require(
        widths == (LATENT, WIDTH - LATENT, WIDTH) and cache.shape[1] == PAGE_SIZE and cache.is_contiguous(),
        f"flash_mla: widths are latent {widths[0]}, rope {widths[1]}, cache {tuple(cache.shape)} with strides "
        f"{cache.stride()}; they must be {LATENT}, {WIDTH - LATENT} and [P, {PAGE_SIZE}, {WIDTH}] contiguous; take "
        "backend='triton'",
    )
    require(
        q_latent.dtype in _DTYPES and q_rope.dtype == q_latent.dtype == cache.dtype,
        f"flash_mla: q_latent is {q_latent.dtype}, q_rope {q_rope.dtype}, cache {cache.dtype}; all must be bf16 or "
        "fp16, alike",
    )
    tokens = q_latent.shape[0]
    require(
        len(plan.page_table) == tokens, f"flash_mla: {tokens} tokens and a plan for {len(plan.page_table)}; plan anew"
    )
    if not tokens:
        return torch.empty_like(q_latent)
    query = torch.cat((q_latent, q_rope), dim=-1).unsqueeze(1)
    # The softmax scale is always the model's: FlashMLA's default is 576^-0.5.
    out, _ = _library().flash_mla_with_kvcache(
        query,
        cache.unsqueeze(2),
        plan.page_table,
        plan.lengths,
        LATENT,
        plan.metadata,
        softmax_scale=scale,
        causal=False,
    )
    result: Tensor = out.squeeze(1).masked_fill(plan.empty, 0.0)
    return result


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _library() -> Any:
    """The `flash_mla` module. Raises KernelError where it is not installed or is another package of that name."""
    try:
        module = import_module("flash_mla")
    except ImportError as error:
        raise KernelError(
            "flash_mla is not installed; build github.com/deepseek-ai/FlashMLA (nvcc 12.8 or newer), or take "
            "backend='triton'"
        ) from error
    for name in ("get_mla_metadata", "flash_mla_with_kvcache"):
        require(
            hasattr(module, name), f"flash_mla has no {name}: not DeepSeek's package, or too old; build the current one"
        )
    return module
