"""Absorbed form: queries live in the latent space, keys and values are the cache rows themselves.

T query tokens, h heads, C latent width, R rotary width, D = C + R, P pages, S rows per page, L rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.errors import KernelError
from moe_kernels.mla.plan import BLOCK, GROUP, AbsorbedPlan, plan_absorbed


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
    if plan.rows.shape[1] == 0 or not plan.lengths:
        return torch.zeros_like(q_latent)
    query = torch.cat((q_latent, q_rope), dim=-1)
    core = _blocked if batch_invariant else _whole
    out = core(query, cache.flatten(0, 1), plan, scale)[..., : q_latent.shape[-1]]
    if min(plan.lengths) > 0:
        return out
    return out.masked_fill(plan.hidden[: out.shape[0], :1].unsqueeze(-1), 0.0)


def _whole(query: Tensor, cache: Tensor, plan: AbsorbedPlan, scale: float) -> Tensor:
    """`query [T, h, D]` -> `[T, h, D]`, each token's rows side by side."""
    tokens, length = plan.rows.shape
    rows = cache.index_select(0, plan.rows.view(-1)).view(tokens, length, cache.shape[1])
    scores = torch.bmm(query, rows.transpose(1, 2)).float()
    scores = scores.mul_(scale).masked_fill_(plan.hidden.unsqueeze(1), -torch.inf)
    return torch.bmm(torch.softmax(scores, dim=-1).to(rows.dtype), rows)


def _blocked(query: Tensor, cache: Tensor, plan: AbsorbedPlan, scale: float) -> Tensor:
    """As `_whole` in fp32, GROUP tokens and BLOCK rows at a time, each product of one shape and aligned alike.

    A block past a token's length leaves its maximum, sum and output as they are, bit for bit.
    """
    tokens, _, width = query.shape
    extra = -width % 16  # a row of 16 floats is one aligned cache line
    padded = F.pad(query.float(), (0, extra, 0, 0, 0, plan.rows.shape[0] - tokens))
    out = torch.empty_like(padded)
    for first in range(0, tokens, GROUP):
        group = slice(first, first + GROUP)
        longest = max(plan.lengths[group])
        out[group] = _attend_group(padded[group], cache, plan.rows[group], plan.hidden[group], longest, scale)
    return out[:tokens].to(query.dtype)


def _attend_group(query: Tensor, cache: Tensor, rows: Tensor, hidden: Tensor, longest: int, scale: float) -> Tensor:
    """`query [GROUP, h, D'] fp32`, `rows, hidden [GROUP, L]` -> `[GROUP, h, D'] fp32`."""
    peak = query.new_full((*query.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(peak)
    out = torch.zeros_like(query)
    for start in range(0, max(longest, 1), BLOCK):
        here = slice(start, start + BLOCK)
        block = cache.index_select(0, rows[:, here].reshape(-1)).float().view(GROUP, BLOCK, cache.shape[1])
        if block.shape[2] < query.shape[2]:
            block = F.pad(block, (0, query.shape[2] - block.shape[2]))
        scores = torch.bmm(query, block.transpose(1, 2)).mul_(scale)
        # The first row of the first block always counts, so that an empty sequence has a finite maximum.
        mask = hidden[:, here].clone()
        if start == 0:
            mask[:, 0] = False
        scores = scores.masked_fill_(mask.unsqueeze(1), -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        probs = scores.sub_(new_peak).exp_()
        decay = peak.sub_(new_peak).exp_()
        total = total.mul_(decay).add_(probs.sum(dim=-1, keepdim=True))
        out = out.mul_(decay).add_(torch.bmm(probs, block))
        peak = new_peak
    return out.div_(total).add_(0.0)  # -0.0 becomes 0.0, as an extra block would make it
