"""Oracle of the gate: fp64 scores, plain Python choice. T tokens, E experts, K top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_kernels.gate import GateRule


def _best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def gate_reference(logits: Tensor, rule: GateRule, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`logits [T, E]` -> `(expert_ids [T, K] int64, weights [T, K] fp64)`."""
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for row in logits.double():
        scores = torch.softmax(row, 0) if rule.scoring == "softmax" else torch.sigmoid(row)
        choice = (scores if bias is None else scores + bias.double()).tolist()
        size = len(choice) // rule.num_groups
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(rule.num_groups)]
        kept = _best([g[0] if rule.group_score == "max" else sum(g[:2]) for g in groups], rule.top_groups)
        masked = [c if i // size in kept else rule.masked_score for i, c in enumerate(choice)]
        chosen = _best(masked, rule.top_k)
        values = [float(scores[i]) if i // size in kept else rule.masked_score for i in chosen]
        total = sum(values) + 1e-20 if rule.normalise else 1.0
        ids.append(chosen)
        weights.append([v / total * rule.scale for v in values])
    return torch.tensor(ids).view(-1, rule.top_k), torch.tensor(weights, dtype=torch.float64).view(-1, rule.top_k)
