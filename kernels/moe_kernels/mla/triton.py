"""Launches of absorbed attention in Triton, and its configurations. Legend and kernels: triton_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require
from moe_kernels.mla.latent import GROUP, ScaledLatent
from moe_kernels.mla.triton_kernels import absorbed_kernel, merge_kernel
from moe_kernels.mla.work import Config, WorkChunk, WorkPlan, configure

LOG2_E: Final = 1.4426950408889634
MERGE_HEADS: Final = 8
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def mla_absorbed(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor | ScaledLatent, plan: WorkPlan, *, scale: float
) -> Tensor:
    """See `moe_kernels.mla.mla_absorbed`. Two launches per chunk of the plan; nothing is read back from the device."""
    latent, factors, rope = _views(cache, q_latent.shape[2])
    _check(q_latent, q_rope, latent, rope, plan)
    tokens, heads, width = q_latent.shape
    config = configure(heads, width, itemsize=q_latent.element_size(), scaled=factors is not None)
    out = torch.empty(tokens, heads, width, dtype=q_latent.dtype, device=q_latent.device)
    for chunk in plan.chunks:
        _launch(q_latent, q_rope, (latent, factors, rope), plan, chunk, out, scale, config)
    return out


def _views(cache: Tensor | ScaledLatent, width: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(latent `[P, S, C]`, its scales or None, rotary part `[P, S, R]`)."""
    if isinstance(cache, ScaledLatent):
        return cache.data, cache.scale, cache.rope
    return cache[..., :width], None, cache[..., width:]


def _check(q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, plan: WorkPlan) -> None:
    tokens, heads, width = q_latent.shape
    require(
        q_rope.shape == (tokens, heads, rope.shape[2]) and latent.shape[2] == width and len(plan.page_table) == tokens,
        f"mla_absorbed: q_latent is {tuple(q_latent.shape)}, q_rope {tuple(q_rope.shape)}, the cache's latent "
        f"{tuple(latent.shape)}, its rope {tuple(rope.shape)}, the plan for {len(plan.page_table)} tokens; widths must "
        "be equal and there must be one table row per token",
    )
    require(
        plan.page_size == latent.shape[1],
        f"mla_absorbed: the plan is for pages of {plan.page_size} rows, the cache has {latent.shape[1]}; plan with "
        "page_size=cache.shape[1]",
    )
    require(
        q_latent.dtype in _DTYPES and q_rope.dtype == q_latent.dtype,
        f"mla_absorbed: q_latent is {q_latent.dtype}, q_rope {q_rope.dtype}; both must be fp32, bf16 or fp16, alike",
    )
    for name, x in (("q_latent", q_latent), ("q_rope", q_rope), ("cache", latent), ("cache's rope", rope)):
        require(
            x.stride(2) == 1 or x.shape[2] == 1,
            f"mla_absorbed: {name} has strides {x.stride()}; the last must be 1; call .contiguous()",
        )
    for name, x in (("cache", latent), ("cache's rope", rope)):
        require(
            x.stride(0) == x.shape[1] * x.stride(1) or len(x) < 2,
            f"mla_absorbed: {name} is {tuple(x.shape)} with strides {x.stride()}; pages must lie side by side; "
            "make the cache contiguous",
        )


def _launch(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: tuple[Tensor, Tensor | None, Tensor],
    plan: WorkPlan,
    chunk: WorkChunk,
    out: Tensor,
    scale: float,
    config: Config,
) -> None:
    latent, factors, rope = cache
    here = slice(chunk.first, chunk.first + chunk.count)
    heads, width = out.shape[1:]
    mine, table = out[here], plan.page_table[here]
    partial = out.new_empty(chunk.num_partials, heads, width, dtype=torch.float32)
    lse = out.new_empty(chunk.num_partials, heads, dtype=torch.float32)
    absorbed_kernel[(triton.cdiv(heads, config.head_block), len(chunk.items))](
        q_latent[here],
        q_rope[here],
        latent,
        latent if factors is None else factors,
        rope,
        table,
        chunk.tokens,
        chunk.items,
        mine,
        partial,
        lse,
        q_latent.stride(0),
        q_latent.stride(1),
        q_rope.stride(0),
        q_rope.stride(1),
        table.stride(0),
        chunk.count,
        scale * LOG2_E,
        **_constants(
            heads,
            width,
            rope.shape[2],
            plan.page_size,
            latent.stride(1),
            rope.stride(1),
            config,
            scaled=factors is not None,
        ),
        num_warps=config.num_warps,
    )
    block = triton.next_power_of_2(width)
    merge_kernel[(chunk.count, triton.cdiv(heads, MERGE_HEADS))](
        chunk.tokens, mine, partial, lse, H=heads, C=width, BC=block, BH=MERGE_HEADS, num_warps=4
    )


def _constants(
    heads: int,
    width: int,
    rope: int,
    page: int,
    latent_row: int,
    rope_row: int,
    config: Config,
    *,
    scaled: bool,
) -> dict[str, Any]:
    """Compile-time arguments of `absorbed_kernel`: strides of cached rows; products take at least 16 columns."""
    block = max(16, triton.next_power_of_2(width))
    return {
        "H": heads,
        "C": width,
        "R": rope,
        "BC": block,
        "BR": max(16, triton.next_power_of_2(rope)),
        "PAGE": page,
        "LATENT_ROW": latent_row,
        "ROPE_ROW": rope_row,
        "GROUP_WIDTH": min(GROUP, block) if scaled else 0,
        "BH": config.head_block,
        "BN": config.row_block,
        "STAGES": config.num_stages,
        "SPLIT_WARPS": config.split_warps,
    }


_POINTERS: Final = ("q_latent_ptr", "q_rope_ptr", "latent_ptr", "scale_ptr", "rope_ptr", "table_ptr", "tokens_ptr")
_OUTPUTS: Final = ("items_ptr", "out_ptr", "partial_ptr", "lse_ptr")
_STRIDES: Final = ("q_latent_token", "q_latent_head", "q_rope_token", "q_rope_head")


def aot_cases() -> Iterator[AotCase]:
    """DeepSeek-V3's widths with 128, 64, 32 (tp 4) and 16 (tp 8) local heads, the demo model's, and fp8 latents."""
    for heads in (128, 64, 32, 16):
        yield _case("bf16", heads, 512, 64, 64, quick=heads in (128, 16))
    for heads in (128, 16):
        for page in (16, 32):
            yield _case("bf16", heads, 512, 64, page)
        yield _case("fp16", heads, 512, 64, 64)
        yield _case("bf16", heads, 512, 64, 64, scaled=True, quick=heads == 128)
    yield _case("bf16", 32, 512, 64, 64, scaled=True)
    yield _case("fp32", 16, 512, 64, 64, scaled=True)
    for dtype in ("fp32", "bf16"):
        yield _case(dtype, 8, 64, 16, 64, scaled=True)
    for dtype in ("fp32", "bf16"):
        for heads in (2, 8):
            yield _case(dtype, heads, 64, 16, 16)
    yield _case("bf16", 32, 64, 16, 16)
    yield _case("fp32", 16, 512, 64, 64)
    for heads, width, dtype in ((128, 512, "bf16"), (16, 512, "bf16"), (8, 64, "fp32")):
        yield AotCase(
            op="mla",
            name=f"merge {dtype} h{heads} C{width}",
            kernel=merge_kernel,
            signature={"tokens_ptr": "*i32", "out_ptr": f"*{dtype}", "partial_ptr": "*fp32", "lse_ptr": "*fp32"},
            constants={"H": heads, "C": width, "BC": width, "BH": MERGE_HEADS},
            num_warps=4,
            aligned=("tokens_ptr", "out_ptr", "partial_ptr", "lse_ptr"),
            quick=heads == 128,
        )


def _case(
    dtype: str, heads: int, width: int, rope: int, page: int, *, scaled: bool = False, quick: bool = False
) -> AotCase:
    config = configure(heads, width, itemsize=4 if dtype == "fp32" else 2, scaled=scaled)
    latent_row, rope_row = (width, rope) if scaled else (width + rope,) * 2
    signature = dict.fromkeys((*_POINTERS, *_OUTPUTS), f"*{dtype}")
    signature |= dict.fromkeys(("table_ptr", "tokens_ptr", "items_ptr"), "*i32")
    signature |= {"scale_ptr": "*fp32" if scaled else f"*{dtype}", "partial_ptr": "*fp32", "lse_ptr": "*fp32"}
    if scaled:
        signature["latent_ptr"] = "*fp8e4nv"
    signature |= dict.fromkeys((*_STRIDES, "table_stride", "num_tokens"), "i32") | {"scale": "fp32"}
    return AotCase(
        op="mla",
        name=f"absorbed {'fp8 latent, ' if scaled else ''}{dtype} h{heads} C{width}+{rope} page {page}",
        kernel=absorbed_kernel,
        signature=signature,
        constants=_constants(heads, width, rope, page, latent_row, rope_row, config, scaled=scaled),
        num_warps=config.num_warps,
        aligned=(*_POINTERS, *_OUTPUTS, *_STRIDES),
        quick=quick,
    )
