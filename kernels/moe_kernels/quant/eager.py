"""Quantisation in torch. R rows, E slots, N x K a weight, G scales of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.scaled import BlockScaled

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-4


def empty_scale(rows: int, groups: int, layout: str, device: torch.device) -> Tensor:
    """Uninitialised `[R, G] fp32`; `mn`: strides (1, R rounded up to 4)."""
    if layout == "row":
        return torch.empty(rows, groups, dtype=torch.float32, device=device)
    return torch.empty(groups, (rows + 3) // 4 * 4, dtype=torch.float32, device=device).t()[:rows]


def scale_of(amax: Tensor, ue8m0: bool) -> Tensor:
    """The scale of a block whose largest magnitude is `amax fp32`, NaN included."""
    scale = torch.where(amax.isnan(), torch.inf, amax).clamp_(min=SMALLEST_AMAX)
    # CUDA multiplies by the reciprocal of a host number, which is off in the last bit; a device's number divides.
    scale.div_(FP8_MAX if scale.device.type == "cpu" else scale.new_full((), FP8_MAX))
    if ue8m0:
        # Adding all mantissa bits carries into the exponent unless they are 0 already; infinity stays.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) >> 23 << 23).view(torch.float32)
    return scale


def quantize_rows(x: Tensor, group: int, ue8m0: bool, layout: str) -> BlockScaled:
    rows, width = x.shape
    groups = -(-width // group)
    wide = F.pad(x.float(), (0, groups * group - width)).view(rows, groups, group)
    scale = scale_of(wide.abs().amax(dim=-1) if rows and groups else wide.new_empty(rows, groups), ue8m0)
    data = (wide * scale.reciprocal().unsqueeze(-1)).view(rows, groups * group)[:, :width].to(FP8)
    return BlockScaled(data.contiguous(), empty_scale(rows, groups, layout, x.device).copy_(scale))


def quantize_blocks(w: Tensor, block: int, ue8m0: bool) -> BlockScaled:
    """`w [E, N, K]`; slot by slot, so that one slot at a time is held in fp32."""
    slots, rows, columns = w.shape
    edges = (-(-rows // block), -(-columns // block))
    data = torch.empty(w.shape, dtype=FP8, device=w.device)
    scale = torch.empty(slots, *edges, dtype=torch.float32, device=w.device)
    for slot in range(slots):
        wide = F.pad(w[slot].float(), (0, edges[1] * block - columns, 0, edges[0] * block - rows))
        tiles = wide.view(edges[0], block, edges[1], block)
        if tiles.numel():
            scale[slot] = scale_of(tiles.abs().amax(dim=(1, 3)), ue8m0)
        tiles.mul_(scale[slot].reciprocal()[:, None, :, None])
        data[slot] = wide[:rows, :columns].to(FP8)
    return BlockScaled(data, scale)


def dequantize(data: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    rows, columns = data.shape[-2:]
    spread = scale.repeat_interleave(block[1], dim=-1)[..., :columns]
    if block[0] > 1:
        spread = spread.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return (data.float() * spread).to(dtype)
