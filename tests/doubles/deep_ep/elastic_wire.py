"""What DeepEP V2's kernels move, without their rules.

T tokens, S ranks, K top-k, E slots per rank, R received rows, H hidden.
A token goes once to every rank that has some of its slots. R rows come in blocks by source rank, in any order within.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.doubles.fabric_group import FabricGroup


@dataclass(frozen=True)
class Arrived:
    """The tokens that a rank received."""

    x: Tensor
    """[R, H]"""
    scales: Tensor | None
    """[R, packs]"""
    ids: Tensor
    """[R, K] int64, of all ranks' experts."""
    weights: Tensor | None
    """[R, K] fp32"""
    source: Tensor
    """[R] int64: source rank (upper 32 bits) and token."""
    counts: list[int]
    """[S]: rows per source rank."""


def send(
    group: FabricGroup,
    x: Tensor,
    scales: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    *,
    slots: int,
    shuffle: torch.Generator | None,
) -> Arrived:
    """Collective. `shuffle`: rows of a source rank come in the order that it draws."""
    tokens, ranks = x.shape[0], group.size()
    there = torch.zeros(tokens, ranks + 1, dtype=torch.bool)
    there.scatter_(1, torch.where(ids >= 0, ids // slots, ranks).clamp(max=ranks), True)
    there = there[:, :ranks]
    source = (group.rank() << 32) + torch.arange(tokens)
    fields = [x, scales, ids, weights, source.unsqueeze(1)]
    widths = [0 if field is None else field.shape[1] * field.element_size() for field in fields]
    packet = torch.cat([as_bytes(field) for field in fields if field is not None], dim=1)
    sent = packet[there.t().nonzero()[:, 1]]
    blocks = group.scatter_rows(list(torch.split(sent, there.sum(0).tolist())))
    counts, came = [len(block) for block in blocks], torch.cat(blocks)
    if shuffle is not None:
        block_of = torch.repeat_interleave(torch.arange(ranks), torch.tensor(counts))
        came = came[(block_of + torch.rand(len(came), generator=shuffle, dtype=torch.float64)).argsort()]
    parts = torch.split(came, widths, dim=1)

    def field(index: int) -> Tensor | None:
        like = fields[index]
        return None if like is None else parts[index].clone(memory_format=torch.contiguous_format).view(like.dtype)

    data, routes, stamps = field(0), field(2), field(4)
    assert data is not None and routes is not None and stamps is not None
    return Arrived(data, field(1), routes, field(3), stamps.flatten(), counts)


def expand(ids: Tensor, starts: Sequence[int], shuffle: torch.Generator | None) -> Tensor:
    """`ids [R, K]` of this rank's experts, -1 elsewhere -> [R, K] the row of each, from `starts [E]` on, else -1."""
    chosen = (ids >= 0).nonzero()
    if shuffle is not None:
        chosen = chosen[torch.randperm(len(chosen), generator=shuffle)]
    experts, order = ids[chosen[:, 0], chosen[:, 1]].sort(stable=True)
    chosen = chosen[order]
    first = torch.searchsorted(experts, torch.arange(len(starts)))
    row = torch.tensor(starts, dtype=torch.int64)[experts] + torch.arange(len(experts)) - first[experts]
    place = torch.full_like(ids, -1)
    place[chosen[:, 0], chosen[:, 1]] = row
    return place


def add_up(terms: Tensor, present: Tensor) -> Tensor:
    """`terms [N, K, H]`, those that are `present [N, K]`, in fp32 and top-k order -> [N, H] fp32.

    Up to two terms the kernels add in bf16: the same bits, since either way the sum is rounded to bf16 but once.
    """
    total = torch.zeros(terms.shape[0], terms.shape[2])
    for k in range(terms.shape[1]):
        total += torch.where(present[:, k, None], terms[:, k].float(), 0.0)
    return total


def send_back(
    group: FabricGroup, partial: Tensor, arrived: Arrived, master: Tensor, home: Tensor, node_of: Tensor | None
) -> Tensor:
    """`partial [R, H]` to where its tokens came from, added up there in the order of `master [R]` -> [T, H] fp32.

    `home [T, K]`: the ids that this rank sent; a rank's sum stands in the place of its last choice. `node_of [T, K]`:
    with it, sums of a node's ranks are rounded first (on the way, in truth: the numbers are the same). Collective.
    """
    keys = torch.stack([arrived.source & 0xFFFFFFFF, master], dim=1)
    packet = torch.cat([as_bytes(partial), as_bytes(keys)], dim=1)
    came = torch.cat(group.scatter_rows(list(torch.split(packet, arrived.counts))))
    width = partial.shape[1] * partial.element_size()
    values = came[:, :width].clone(memory_format=torch.contiguous_format).view(partial.dtype)
    token, k = came[:, width:].clone(memory_format=torch.contiguous_format).view(torch.int64).unbind(1)
    terms = torch.zeros(*home.shape, partial.shape[1], dtype=partial.dtype)
    terms[token, k] = values
    present = torch.zeros(home.shape, dtype=torch.bool)
    present[token, k] = True
    if node_of is None:
        return add_up(terms, present)
    last = torch.arange(home.shape[1])
    sums, leads = torch.zeros_like(terms), torch.zeros_like(present)
    for node in torch.unique(node_of[present]).tolist():
        of_node = present & (node_of == node)
        of, lead = of_node.any(1).nonzero().flatten(), torch.where(of_node, last, -1).amax(1)
        sums[of, lead[of]] = add_up(terms, of_node)[of].bfloat16().to(terms.dtype)
        leads[of, lead[of]] = True
    return add_up(sums, leads)


def as_bytes(x: Tensor) -> Tensor:
    """`x [n, m]` as `[n, bytes] uint8`."""
    return x.contiguous().view(torch.uint8).view(x.shape[0], x.shape[1] * x.element_size())
