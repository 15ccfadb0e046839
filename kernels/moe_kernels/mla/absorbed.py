"""Absorbed form: queries live in the latent space, keys and values are the cache rows themselves.

T query tokens, h heads, C latent width, R rotary width, D = C + R, P pages, S rows per page, L rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.errors import KernelError
from moe_kernels.mla.plan import BLOCK, GROUP, AbsorbedPart, AbsorbedPlan, plan_absorbed

_FP32_ELEMENTS = 1 << 18
"""Up to this many gathered values CPU products run in fp32: a bf16 one costs 15 us however small."""


def mla_absorbed(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    batch_invariant: bool = False,
    plan: AbsorbedPlan | None = None,
) -> Tensor:
    """`q_latent [T, h, C]`, `q_rope [T, h, R]`, `cache [P, S, C+R]`, `page_table [T, max_pages]`, `kv_lens [T]`
    -> `[T, h, C]`: token t attends to the first `kv_lens[t]` rows of its pages; `kv_lens[t] = 0` gives zeros.

    Only those rows are read: what else the pages hold, and the table's entries past them, do not matter. `plan` is what
    `plan_absorbed` made of the same table, lengths and mode, to be shared by the layers of a step. With
    `batch_invariant` a token's bits depend on its query and its rows alone. Raises KernelError where shapes differ.
    """
    if q_latent.shape[-1] + q_rope.shape[-1] != cache.shape[-1] or page_table.shape[0] != q_latent.shape[0]:
        raise KernelError(
            f"mla_absorbed got q_latent {tuple(q_latent.shape)}, q_rope {tuple(q_rope.shape)}, "
            f"cache {tuple(cache.shape)}, page_table {tuple(page_table.shape)}; widths must add up, "
            f"one table row per token"
        )
    if plan is None:
        plan = plan_absorbed(page_table, kv_lens, page_size=cache.shape[1], batch_invariant=batch_invariant)
    if plan.blocked != batch_invariant:
        raise KernelError(f"mla_absorbed got batch_invariant={batch_invariant} and a plan made for {plan.blocked}")
    if not plan.parts:
        return torch.zeros_like(q_latent)
    query = torch.cat((q_latent, q_rope), dim=-1)
    if plan.order is not None:
        query = query.index_select(0, plan.order)
    core, rows = (_blocked if batch_invariant else _whole), cache.flatten(0, 1)
    outs = [core(query[part.first : part.first + part.count], rows, part, scale) for part in plan.parts]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if plan.empty is not None:
        out = out.masked_fill(plan.empty, 0.0)
    if plan.back is not None:
        out = out.index_select(0, plan.back)
    return out[..., : q_latent.shape[-1]]


def _whole(query: Tensor, cache: Tensor, part: AbsorbedPart, scale: float) -> Tensor:
    """`query [t, h, D]` -> `[t, h, D]`, each token's rows side by side."""
    rows = cache.index_select(0, part.rows.view(-1)).view(*part.rows.shape, cache.shape[1])
    if query.device.type == "cpu" and rows.numel() <= _FP32_ELEMENTS:
        wide = rows.float()
        scores = torch.baddbmm(part.bias, query.float(), wide.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), wide).to(query.dtype)
    scores = torch.baddbmm(part.bias.to(query.dtype), query, rows.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), rows)


def _blocked(query: Tensor, cache: Tensor, part: AbsorbedPart, scale: float) -> Tensor:
    """As `_whole` in fp32, BLOCK rows at a time of GROUP tokens, each product of one shape and aligned alike.

    A block past a token's length leaves its maximum, sum and output as they are, bit for bit.
    """
    count, _, width = query.shape
    extra = -width % 16  # a row of 16 floats is one aligned cache line
    wide = F.pad(query.float(), (0, extra, 0, 0, 0, GROUP - count))
    peak = wide.new_full((GROUP, wide.shape[1], 1), -torch.inf)
    total, out = torch.zeros_like(peak), torch.zeros_like(wide)
    for start in range(0, part.rows.shape[1], BLOCK):
        here = slice(start, start + BLOCK)
        block = cache.index_select(0, part.rows[:, here].reshape(-1)).float().view(GROUP, BLOCK, width)
        if extra:
            block = F.pad(block, (0, extra))
        scores = torch.bmm(wide, block.transpose(1, 2)).mul_(scale).add_(part.bias[..., here])
        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        probs = scores.sub_(new_peak).exp_()
        decay = peak.sub_(new_peak).exp_()
        total = total.mul_(decay).add_(probs.sum(dim=-1, keepdim=True))
        out = out.mul_(decay).add_(torch.bmm(probs, block))
        peak = new_peak
    out = out.div_(total).add_(0.0)  # -0.0 becomes 0.0, as one more block would make it
    return out[:count, :, :width].to(query.dtype)
