"""Absorbed form: queries live in the latent space, keys and values are the cache rows themselves.

T query tokens, h heads, C latent width, R rotary width, D = C + R, P pages, S rows per page, L rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.errors import KernelError
from moe_kernels.mla.latent import LatentCache, ScaledLatent
from moe_kernels.mla.plan import GROUP, AbsorbedPart, AbsorbedPlan, BlockedPart, plan_absorbed

_FP32_ELEMENTS = 1 << 18
"""Up to this many gathered values CPU products run in fp32: a bf16 one costs 15 us however small."""


def mla_absorbed(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
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
    `plan_absorbed` made of the same table, lengths and mode, to be shared by the layers of a step. Scores are fp32 in
    every dtype; fp8 rows are brought to the query's first. With `batch_invariant` a token's bits depend on its query
    and its rows alone. Raises KernelError where shapes differ.
    """
    rows: LatentCache
    if isinstance(cache, ScaledLatent):
        rows, size, width = cache, cache.page_size, cache.width
    else:
        rows, size, width = cache.flatten(0, 1), cache.shape[1], cache.shape[2]
    if q_latent.shape[-1] + q_rope.shape[-1] != width or page_table.shape[0] != q_latent.shape[0]:
        raise KernelError(
            f"mla_absorbed got q_latent {tuple(q_latent.shape)}, q_rope {tuple(q_rope.shape)}, "
            f"cached rows of {width}, page_table {tuple(page_table.shape)}; widths must add up, "
            f"one table row per token"
        )
    if plan is None:
        plan = plan_absorbed(page_table, kv_lens, page_size=size, batch_invariant=batch_invariant)
    if plan.blocked != batch_invariant:
        raise KernelError(f"mla_absorbed got batch_invariant={batch_invariant} and a plan made for {plan.blocked}")
    if not plan.parts:
        return torch.zeros_like(q_latent)
    query = torch.cat((q_latent, q_rope), dim=-1)
    if plan.order is not None:
        query = query.index_select(0, plan.order)
    outs = []
    for part in plan.parts:
        some = query[part.first : part.first + part.count]
        outs.append(
            _blocked(some, rows, part, scale) if isinstance(part, BlockedPart) else _whole(some, rows, part, scale)
        )
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if plan.empty is not None:
        out = out.masked_fill(plan.empty, 0.0)
    if plan.back is not None:
        out = out.index_select(0, plan.back)
    return out[..., : q_latent.shape[-1]]


def _gather(cache: LatentCache, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows [t, L]` of a plain cache `[P·S, D]`, as they are, or of one in fp8, in `dtype` -> `[t, L, D]`."""
    if isinstance(cache, ScaledLatent):
        return cache.read(rows, dtype)
    return cache.index_select(0, rows.view(-1)).view(*rows.shape, cache.shape[1])


def _whole(query: Tensor, cache: LatentCache, part: AbsorbedPart, scale: float) -> Tensor:
    """`query [t, h, D]` -> `[t, h, D]`, each token's rows side by side."""
    rows = _gather(cache, part.rows, query.dtype)
    if query.dtype == torch.float32 or (query.device.type == "cpu" and rows.numel() <= _FP32_ELEMENTS):
        wide = rows.float()
        scores = torch.baddbmm(part.bias, query.float(), wide.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), wide).to(query.dtype)
    scores = _fp32_product(query, rows.transpose(1, 2)).mul_(scale).add_(part.bias)
    return torch.bmm(scores.softmax(dim=-1).to(query.dtype), rows)


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """`a [t, h, D] @ b [t, D, L]`, both 16-bit -> `[t, h, L] fp32`."""
    if a.device.type != "cpu":
        return torch.bmm(a, b, out_dtype=torch.float32)
    # CPU products sum in fp32 and round to the inputs' dtype: a second one brings what the first has rounded away.
    # 1.4 times the time of one in all; copies of `b` in fp32 take 1.4 to 4 times.
    rounded = torch.bmm(a, b)
    return rounded.float().add_(torch.baddbmm(rounded, a, b, beta=-1))


def _blocked(query: Tensor, cache: LatentCache, part: BlockedPart, scale: float) -> Tensor:
    """As `_whole` in fp32, BLOCK rows at a time of GROUP tokens, each product of one shape and aligned alike.

    A block past a token's length leaves its maximum, sum and output as they are, bit for bit.
    """
    count, _, width = query.shape
    extra = -width % 16  # a row of 16 floats is one aligned cache line
    wide = F.pad(query.float(), (0, extra, 0, 0, 0, GROUP - count))
    peak = wide.new_full((GROUP, wide.shape[1], 1), -torch.inf)
    total, out = torch.zeros_like(peak), torch.zeros_like(wide)
    for places in part.blocks:
        rows, past = part.rows(places)
        block = _gather(cache, rows, query.dtype).float()
        if extra:
            block = F.pad(block, (0, extra))
        scores = torch.bmm(wide, block.transpose(1, 2)).mul_(scale)
        if past is not None:
            scores.masked_fill_(past.unsqueeze(1), -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        probs = scores.sub_(new_peak).exp_()
        decay = peak.sub_(new_peak).exp_()
        total = total.mul_(decay).add_(probs.sum(dim=-1, keepdim=True))
        out = out.mul_(decay).add_(torch.bmm(probs, block))
        peak = new_peak
    out = out.div_(total).add_(0.0)  # -0.0 becomes 0.0, as one more block would make it
    return out[:count, :, :width].to(query.dtype)
