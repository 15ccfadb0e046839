"""The gate in torch. T tokens, E experts, G groups, K top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_kernels.gate import GateRule


def _top(scores: Tensor, k: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def gate(logits: Tensor, rule: GateRule, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if rule.scoring == "softmax":
        scores = torch.softmax(logits, dim=-1)
    else:
        scores = logits.neg().exp_().add_(1.0).reciprocal_()
    choice = scores if bias is None else scores + bias
    tokens, experts = scores.shape
    if rule.num_groups > 1:
        grouped = choice.view(tokens, rule.num_groups, experts // rule.num_groups)
        if rule.group_score == "max":
            group_scores = grouped.amax(dim=-1)
        else:
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        mask = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, _top(group_scores, rule.top_groups), False)
        choice = grouped.masked_fill(mask.unsqueeze(-1), rule.masked_score).view(tokens, experts)
    ids = _top(choice, rule.top_k)
    weights = scores.gather(1, ids)
    if rule.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * rule.scale
