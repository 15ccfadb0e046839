"""Vocabulary-parallel table and head on virtual tp ranks. N group tokens, H hidden, V vocab."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.layers.embedding import VocabEmbedding, VocabHead, vocab_shard
from moe_runtime.layers.linear import Linear

TP, HIDDEN, VOCAB = 2, 4, 6


def on_tp_ranks(table: Tensor, x: Tensor, ids: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per rank: its rows of the embedded `ids [N]`, and the logits of `rows` of the group's `x [N, H]`."""
    with VirtualCluster(TP, num_threads=1) as cluster:
        groups = virtual_groups(cluster, tp=TP)

        def program(rank: int) -> tuple[Tensor, Tensor]:
            first, last = vocab_shard(VOCAB, tp=TP, tp_rank=rank)
            tp, mine = groups[rank].tp, x.chunk(TP)[rank]
            embedding = VocabEmbedding(table[first:last], first, tp)
            head = VocabHead(Linear.of(table[first:last]), VOCAB, tp)
            return embedding(ids), head(head.gather(mine, rows))

        return cluster.run(program)


def test_rows_are_exact_and_one_that_is_not_finite_stays_where_it_is() -> None:
    table, x = torch.randn(VOCAB, HIDDEN), torch.randn(4, HIDDEN)
    # Clamping an index of the other rank hits a rank's first or last row.
    table[[0, 2, 3, 5]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).unsqueeze(1)
    x[[0, 3]] = torch.nan
    embedded, logits = zip(*on_tp_ranks(table, x, torch.tensor([1, 4, 4, 1]), torch.tensor([1, 2])), strict=True)
    assert torch.equal(torch.cat(embedded), table[[1, 4, 4, 1]])
    for mine in logits:
        torch.testing.assert_close(mine[:, [1, 4]], x[[1, 2]] @ table[[1, 4]].T)
