"""DeepSeek-V2/V3 assembled from layers for one rank. N padded group tokens, H hidden, S wanted rows, V vocab.

The residual stream is scattered over tp between attention blocks: a rank holds N/tp rows, so each token enters the
dispatch on exactly one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moe_kernels.mla import LatentCache
from moe_kernels.norm import add_rms_norm, rms_norm
from torch import Tensor

from moe_runtime.comm.base import Location
from moe_runtime.dispatch.overlap import OnStage, Stages, interleave
from moe_runtime.layers.embedding import VocabEmbedding, VocabHead
from moe_runtime.layers.experts import MLP
from moe_runtime.layers.mla import MLA
from moe_runtime.layers.moe import MoELayer
from moe_runtime.layers.rope import RotaryTable
from moe_runtime.layers.step import StepInputs


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer."""

    attention_norm: Tensor
    attention: MLA
    ffn_norm: Tensor
    ffn: MoELayer[Any] | MLP


@dataclass(frozen=True, slots=True)
class DeepseekModel:
    """The decoder on one rank."""

    embedding: VocabEmbedding
    blocks: tuple[Block, ...]
    norm: Tensor
    head: VocabHead
    rotary: RotaryTable
    eps: float
    location: Location
    on_stage: OnStage | None = None
    """Sees the order in which micro-batches take turns."""

    def __call__(self, steps: Sequence[StepInputs], caches: tuple[LatentCache, ...]) -> Tensor:
        """`steps`: the micro-batches of one step, in the order of their tokens; they take turns layer by layer.
        `caches`: the rows `[pages, page, C+R]` of each layer, written in place. Returns `logits [S, V] fp32`, the rows
        of all micro-batches, one after the other."""
        rows = interleave([self._stages(step, caches) for step in steps], self.on_stage)
        return self.head(rows[0] if len(rows) == 1 else torch.cat(rows))

    def _stages(self, step: StepInputs, caches: tuple[LatentCache, ...]) -> Stages[Tensor]:
        """`[S, H]`: the normed rows whose logits are wanted."""
        residual = self.embedding(step.token_ids)
        x = self._norm(residual, self.blocks[0].attention_norm)
        for layer, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            self.location.layer = layer
            x, residual = self._add_norm(block.attention(x, step, cache), residual, block.ffn_norm)
            y = (yield from block.ffn.stages(x, step.moe)) if isinstance(block.ffn, MoELayer) else block.ffn(x)
            last = layer + 1 == len(self.blocks)
            weight = self.norm if last else self.blocks[layer + 1].attention_norm
            x, residual = self._add_norm(y, residual, weight)
        self.location.layer = None
        return self.head.gather(x, step.logit_rows)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps)

    def _add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, self.eps)
