"""Permutation in torch. T tokens, K top-k, H hidden, R rows, E slots."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.quant.eager import FP8, empty_scale, quantize_rows
from moe_kernels.scaled import BlockScaled


def permute(
    x: Tensor, slots: Tensor, num_slots: int, *, alignment: int, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(data [R, H], psum [E] int32, row_of [T, K])`."""
    tokens, k = slots.shape
    device = x.device
    # An absent assignment becomes slot E and sorts last.
    flat = slots.reshape(-1)
    by_slot, order = torch.where((flat >= 0) & (flat < num_slots), flat, num_slots).sort(stable=True)
    bounds = torch.searchsorted(by_slot, torch.arange(num_slots + 1, device=device))
    position = torch.arange(tokens * k, device=device)
    if alignment > 1:
        spans = bounds.diff().add_(alignment - 1).div_(alignment, rounding_mode="floor").mul_(alignment)
        starts = spans.cumsum(0).sub_(spans)
        shift = torch.cat((starts - bounds[:-1], starts.new_zeros(1)))
        position = position + shift.index_select(0, by_slot)
        ends, rows = bounds[1:] + shift[:-1], tokens * k + (alignment - 1) * num_slots
        total = int(spans.sum()) if device.type == "cpu" else rows
    else:
        ends, rows = bounds[1:], tokens * k
        total = int(bounds[-1]) if device.type == "cpu" else rows
    if num_rows is not None and device.type != "cpu":
        total = num_rows
    position = torch.where(by_slot < num_slots, position, -1)
    row_of = torch.empty_like(order).scatter_(0, order, position).view(tokens, k)
    return _rows(x, order, position, total, k, contiguous=alignment == 1), ends.to(torch.int32), row_of


def permute_scaled(
    x: Tensor | BlockScaled,
    slots: Tensor,
    num_slots: int,
    alignment: int,
    ue8m0: bool,
    layout: str,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(data [R, H] fp8, psum [E] int32, row_of [T, K], scale [R, G])`; x is quantised first where it is plain."""
    scaled = quantize_rows(x, 128, ue8m0, "row") if isinstance(x, Tensor) else x
    data, psum, row_of = permute(
        scaled.data.view(torch.uint8), slots, num_slots, alignment=alignment, num_rows=num_rows
    )
    scale, _, _ = permute(scaled.scale, slots, num_slots, alignment=alignment, num_rows=num_rows)
    return data.view(FP8), psum, row_of, empty_scale(scale.shape[0], scale.shape[1], layout, scale.device).copy_(scale)


def _rows(x: Tensor, order: Tensor, position: Tensor, total: int, k: int, *, contiguous: bool) -> Tensor:
    token_of = order if k == 1 else order.div(k, rounding_mode="floor")
    if contiguous:
        return x.index_select(0, token_of[:total])
    data = x.new_zeros(total + 1, x.shape[1])
    target = torch.where(position < 0, total, position)
    return data.index_copy_(0, target, x.index_select(0, token_of))[:total]


def unpermute(y: Tensor, row_of: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`[T, H]` in `dtype`."""
    if y.shape[0] == 0 or row_of.numel() == 0:
        return y.new_zeros(row_of.shape[0], y.shape[1], dtype=dtype)
    absent = row_of < 0
    if y.device.type != "cpu":
        return _sum_in_order(y, row_of, weights, absent).to(dtype)
    wide = y.float()
    if not bool(absent.any()):
        return F.embedding_bag(row_of, wide, per_sample_weights=weights, mode="sum").to(dtype)
    present = ~absent
    per_token = present.sum(dim=1)
    return F.embedding_bag(
        row_of[present],
        wide,
        per_token.cumsum(0).sub_(per_token),
        per_sample_weights=weights[present],
        mode="sum",
    ).to(dtype)


def _sum_in_order(y: Tensor, row_of: Tensor, weights: Tensor, absent: Tensor) -> Tensor:
    out = torch.zeros(row_of.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    for rows, weight, gone in zip(row_of.clamp(min=0).unbind(1), weights.unbind(1), absent.unbind(1), strict=True):
        term = y.index_select(0, rows).float() * weight.unsqueeze(1)
        out += term.masked_fill_(gone.unsqueeze(1), 0.0)
    return out
