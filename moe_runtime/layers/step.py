"""StepInputs: the tensors of one step on one rank, the only thing handed down through model, block and attention.

n real tokens of this rank's DP group, N the same padded to a multiple of tp, D absorbed tokens, G sequences, L cached
rows. Tokens stand in plan order: absorbed ones first, then expanded chunks. Rank i of a tp group owns rows
i·N/tp … (i+1)·N/tp of the residual stream, so its real rows are a prefix of its rows.

A decode step of fixed shapes, which the Triton kernels run without a wait of the host, has n = N = D = S: rows of
padding have token 0, cache row -1 (written nowhere) and length 0 (attention gives zeros); `moe.num_real` is a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_kernels.mla import AbsorbedPlan
from torch import Tensor

from moe_runtime.layers.moe import MoEStep


@dataclass(frozen=True, slots=True)
class AbsorbedTokens:
    """The first `count` tokens: each attends, in latent space, to the first `kv_lens[t]` rows of its pages."""

    count: int
    page_table: Tensor
    """[D, pages] int64"""
    kv_lens: Tensor
    """[D] int64"""
    plan: AbsorbedPlan
    """What the kernel made of both, for all layers."""


@dataclass(frozen=True, slots=True)
class ExpandedChunk:
    """`num_sequences` prompt chunks of equal `length` and `start`, stored one after the other from token `first`."""

    first: int
    num_sequences: int
    length: int
    start: int
    """Rows that are in the cache before this chunk."""
    cache_rows: Tensor | None
    """[G, start + length] int64 flat cache rows; None where start is 0 and the cache holds rows as they are computed
    (the chunk is its own context)."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One rank's tensors of one step."""

    token_ids: Tensor
    """[N] int64, 0 on padding"""
    num_tokens: int
    """n: real tokens of the DP group"""
    cos: Tensor
    """[n, rope/2] fp32"""
    sin: Tensor
    cache_rows: Tensor
    """[n] int64: flat cache row that each token's latent is written to; on Triton -1 writes nowhere"""
    absorbed: AbsorbedTokens | None
    expanded: tuple[ExpandedChunk, ...]
    logit_rows: Tensor
    """[S] int64: tokens whose logits are wanted"""
    moe: MoEStep

    @property
    def num_rows(self) -> int:
        """N."""
        return self.token_ids.shape[0]
