"""Vocabulary-parallel embedding and head.

N padded group tokens, S wanted rows, V vocab, v = ceil(V/tp) rows per rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator
from moe_runtime.layers.linear import Linear


def vocab_shard(vocab_size: int, *, tp: int, tp_rank: int) -> tuple[int, int]:
    """(first, last) vocabulary rows of a tp rank; the last ranks' shards may be shorter or empty."""
    rows = -(-vocab_size // tp)
    return min(tp_rank * rows, vocab_size), min((tp_rank + 1) * rows, vocab_size)


@dataclass(frozen=True, slots=True)
class VocabEmbedding:
    """`weight [v, H]`: rows first … of the table."""

    weight: Tensor
    first: int
    tp: Communicator

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`token_ids [N]` of the group to this rank's rows `[N/tp, H]`; exact: one rank has a row, the rest 0."""
        if self.tp.size == 1:
            return self.weight[token_ids]
        return self.tp.reduce_scatter(_rows_or_zero(self.weight, token_ids - self.first))


@dataclass(frozen=True, slots=True)
class VocabHead:
    """`linear.weight [v, H]`, zero-padded on the last ranks so that v is equal."""

    linear: Linear
    vocab_size: int
    tp: Communicator

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x [N/tp, H]` (this rank's tokens), `rows [S]` group rows to these rows `[S, H]`, on every tp rank."""
        if self.tp.size == 1:
            return x[rows]
        if not rows.shape[0]:
            return x.new_zeros(0, x.shape[1])
        return self.tp.all_reduce(_rows_or_zero(x, rows - self.tp.rank * x.shape[0]))

    def __call__(self, picked: Tensor) -> Tensor:
        """Gathered rows `[S, H]` to `logits [S, V] fp32`, on every tp rank."""
        if self.tp.size == 1:
            return self.linear(picked).float()
        if not picked.shape[0]:
            return picked.new_zeros(0, self.vocab_size, dtype=torch.float32)
        logits = self.linear(picked)
        shards = self.tp.all_gather(logits).view(self.tp.size, *logits.shape)
        return shards.transpose(0, 1).flatten(1)[:, : self.vocab_size].float()


def _rows_or_zero(table: Tensor, index: Tensor) -> Tensor:
    """`table [v, H]` at `index [n]`, zeros where the index lies outside: summed over ranks, the row itself, exactly.

    Filled, not multiplied by 0: the clamped index may hit a row that is not finite.
    """
    if not table.shape[0]:
        return table.new_zeros(index.shape[0], table.shape[1])
    inside = index.clamp(0, table.shape[0] - 1)
    return table[inside].masked_fill_((inside != index).unsqueeze(1), 0.0)
