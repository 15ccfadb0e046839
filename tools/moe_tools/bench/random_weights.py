"""Random weights in the forms that checkpoints bring, of magnitudes like theirs. n output width, k input width."""

from __future__ import annotations

import torch
from moe_kernels.experts import ExpertWeights
from moe_kernels.scaled import BlockScaled

HIDDEN, INTERMEDIATE = 7168, 2048
FP8 = torch.float8_e4m3fn


def fp8_weights(slots: int, device: str) -> ExpertWeights:
    """Random weights as a block-scaled checkpoint has them."""
    return ExpertWeights(
        scaled_slots(slots, 2 * INTERMEDIATE, HIDDEN, device),
        scaled_slots(slots, HIDDEN, INTERMEDIATE, device),
    )


def scaled_slots(slots: int, n: int, k: int, device: str) -> BlockScaled:
    """Random `[slots, n, k]` with 128×128 scales; n and k are multiples."""
    data = torch.empty(slots, n, k, dtype=FP8, device=device)
    for slot in data:  # one slot at a time: no fp32 copy of all
        slot.copy_(torch.randn(n, k, device=device).mul_(64))
    scale = torch.rand(slots, n // 128, k // 128, device=device).add_(0.5).mul_(k**-0.5 / 64)
    return BlockScaled(data, scale)


def scaled_matrix(n: int, k: int, device: str) -> BlockScaled:
    """One random matrix `[n, k]` with 128×128 scales; n and k need not be multiples."""
    data = torch.randn(n, k, device=device).mul_(64).to(FP8)
    scale = torch.rand(-(-n // 128), -(-k // 128), device=device).add_(0.5).mul_(k**-0.5 / 64)
    return BlockScaled(data, scale)


def bf16_weights(slots: int, device: str) -> ExpertWeights:
    """Random weights in bf16."""
    w13 = torch.randn(slots, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=device).mul_(HIDDEN**-0.5)
    w2 = torch.randn(slots, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16, device=device).mul_(INTERMEDIATE**-0.5)
    return ExpertWeights(w13, w2)
