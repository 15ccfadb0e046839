"""The gate in torch. T tokens, E experts, G groups, K top-k.

Every step is elementwise and correctly rounded (or `exp`, a maximum, a sort), or a sum over one token's last dim, so a
token's bits do not depend on its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_kernels.gate import GateRule, Placed, Replicas


def top(scores: Tensor, k: int) -> Tensor:
    """Indices `[T, k]` of the largest of `scores [T, E] fp32`, descending, ties to the lowest index.

    Top-k alone breaks ties as it likes. Few CPU tokens: look for ties, which are rare. Else: make the keys unique.
    """
    tokens, experts = scores.shape
    if experts <= max(k, 16):
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    if tokens <= 32 and scores.device.type == "cpu":
        values, indices = scores.topk(k + 1, dim=-1)
        if bool((values[:, 1:] < values[:, :-1]).all()):
            return indices[:, :k].contiguous()
    bits = scores.view(torch.int32)
    # Integers in the order of the floats: negative ones have their magnitude bits flipped. The low half breaks ties.
    ordered = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = ordered.long().mul_(1 << 32).sub_(torch.arange(experts, device=scores.device))
    return keys.topk(k, dim=-1).indices


def top2_sum(grouped: Tensor) -> Tensor:
    """`grouped [T, G, E/G]` -> `[T, G]`, the sum of each group's two largest."""
    if grouped.shape[-1] == 1:
        return grouped.squeeze(-1)
    if grouped.shape[0] <= 32:
        return grouped.topk(2, dim=-1).values.sum(dim=-1)
    # The same two values by two maxima: 0.4 ms against 2.6 ms for 1024 tokens of 256 experts.
    first = grouped.amax(dim=-1, keepdim=True)
    largest = grouped == first
    second = grouped.masked_fill(largest, -torch.inf).amax(dim=-1)
    first = first.squeeze(-1)
    return first + torch.where(largest.sum(dim=-1) > 1, first, second)


def gate(logits: Tensor, rule: GateRule, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if rule.scoring == "softmax":
        scores = torch.softmax(logits, dim=-1)
    else:
        scores = logits.neg().exp_().add_(1.0).reciprocal_()
    choice = scores if bias is None else scores + bias
    tokens, experts = scores.shape
    if rule.top_groups < rule.num_groups:
        grouped = choice.view(tokens, rule.num_groups, experts // rule.num_groups)
        group_scores = grouped.amax(dim=-1) if rule.group_score == "max" else top2_sum(grouped)
        masked = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, top(group_scores, rule.top_groups), False)
        choice = grouped.masked_fill(masked.unsqueeze(-1), rule.masked_score).view(tokens, experts)
    ids = top(choice, rule.top_k)
    # Without a bias a token's weights are its choice scores, masked ones included (DeepSeek-V2 where scores underflow).
    weights = (choice if bias is None else scores).gather(1, ids)
    if rule.normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).add_(1e-20)
    return ids, weights if rule.scale == 1.0 else weights * rule.scale


def gate_and_place(
    logits: Tensor,
    rule: GateRule,
    bias: Tensor | None,
    num_shared: int,
    num_real: int | Tensor | None,
    replicas: Replicas | None,
    counts: Tensor | None,
) -> Placed:
    from moe_kernels.gate import Placed

    ids, weights = gate(logits, rule, bias)
    tokens, experts = logits.shape
    if num_shared:
        shared = torch.arange(experts, experts + num_shared, device=ids.device).expand(tokens, -1)
        ids = torch.cat([ids, shared], dim=1)
        weights = torch.cat([weights, torch.ones_like(shared, dtype=torch.float32)], dim=1)
    real = torch.arange(tokens, device=ids.device) < (tokens if num_real is None else num_real)
    real = real.unsqueeze(1).expand_as(ids)
    if counts is not None:
        counts.index_add_(0, ids.flatten(), real.flatten().long())
    slots = ids if replicas is None else _slots(ids, replicas).masked_fill(~real, -1)
    ids = ids.masked_fill(~real, -1)
    return Placed(ids, ids if replicas is None else slots, weights.masked_fill(~real, 0.0))


def _slots(ids: Tensor, replicas: Replicas) -> Tensor:
    """`ids [T, K+S]`, all of experts -> their slots."""
    if replicas.counts is None:
        return replicas.slots[ids, 0]
    tokens, k = ids.shape
    turn = torch.arange(tokens, device=ids.device).unsqueeze(1) + torch.arange(k, device=ids.device) + replicas.turn
    return replicas.slots[ids, turn % replicas.counts[ids]]
