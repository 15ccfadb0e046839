"""Bytes of DeepEP V2's buffer, as csrc/elastic/buffer.hpp:586-686 counts them. T tokens, S ranks, K top-k."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a buffer reach one another: `nodes` is 1 too where all send to all directly."""

    nodes: int
    per_node: int
    joined: bool
    """Whether NVLink joins the ranks that send to one another directly."""

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


def dispatch_bytes(ranks: Ranks, tokens: int, row: int, packs: int, top_k: int) -> int:
    """Rows of `row` bytes, scales and, per token, ids, weights, its source and a list entry per choice."""
    each = up(row, 32) + up(4 * packs, 32) + up(4 * (3 * top_k + 1), 32)
    if ranks.nodes == 1:
        return each * tokens * (ranks.size + (not ranks.joined))
    return each * (ranks.size * tokens + tokens + ranks.nodes * (tokens + 1280))


def combine_bytes(ranks: Ranks, tokens: int, hidden: int, top_k: int) -> int:
    """Rows in bf16, ids and weights."""
    each = up(2 * hidden, 32) + up(8 * top_k, 32)
    if ranks.nodes == 1:
        return each * tokens * (min(ranks.size, top_k) + (not ranks.joined) * ranks.size)
    within = min(ranks.per_node, top_k) * ranks.nodes * tokens
    return each * (within + min(ranks.nodes, top_k) * tokens + ranks.nodes * (tokens + 1280))


def hint(ranks: Ranks, tokens: int, hidden: int, top_k: int, fp8: bool) -> int:
    row, packs = (hidden, -(-hidden // 32)) if fp8 else (2 * hidden, 0)
    most = max(
        dispatch_bytes(ranks, tokens, row, packs, top_k or 32), combine_bytes(ranks, tokens, hidden, top_k or 32)
    )
    return up(most, 2 << 20)


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
