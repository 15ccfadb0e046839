"""StepPlan: what one DP group runs in one step. Integers only, so that it crosses the control plane as one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

PENDING = -1
"""In `SequenceChunk.token_ids`: the token that this request's previous planned chunk samples.

It appears only where step n+1 is planned before step n is committed, which the engine does not do yet: the runner
refuses it. The tests plan ahead, so that the scheduler stays fit for it.
"""


class ChunkKind(IntEnum):
    """Which tokens a chunk holds, never both; it selects the form of attention."""

    DECODE = 0
    """Generated tokens: one, or several where a preempted request is recomputed."""
    PREFILL = 1
    """Prompt tokens."""


class SequenceChunk(NamedTuple):
    """Tokens `start .. start + len(token_ids) - 1` of one request; the cache holds the `start` tokens before them.

    `pages` holds the request's tokens in order, page_size to a page, with room for this chunk. Logits are needed of the
    tokens `logit_start ..` of the chunk (an index into `token_ids`; its length = of none): the last of them is sampled
    where `sample` is true, the others are prompt positions whose log probabilities were asked for.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    pages: tuple[int, ...]
    kind: ChunkKind
    sample: bool
    logit_start: int

    @property
    def num_logits(self) -> int:
        return len(self.token_ids) - self.logit_start

    def part(self, first: int, end: int) -> SequenceChunk:
        """Tokens `first .. end - 1`, with the logits that are wanted of them."""
        length = end - first
        return self._replace(
            start=self.start + first,
            token_ids=self.token_ids[first:end],
            sample=self.sample and end == len(self.token_ids),
            logit_start=min(max(self.logit_start - first, 0), length),
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Chunks in the order of their token rows: all of kind DECODE, then all of kind PREFILL. One chunk a request."""

    chunks: tuple[SequenceChunk, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([len(chunk.token_ids) for chunk in self.chunks])

    @property
    def num_decode_tokens(self) -> int:
        """Tokens of sequences that take a single generated token each; recomputed ones do not count."""
        return sum([chunk.kind == ChunkKind.DECODE and len(chunk.token_ids) == 1 for chunk in self.chunks])

    def cut(self, num_tokens: int) -> tuple[StepPlan, StepPlan]:
        """The first `num_tokens` tokens, and the rest; a chunk that lies across is cut."""
        first: list[SequenceChunk] = []
        rest: list[SequenceChunk] = []
        for chunk in self.chunks:
            length = len(chunk.token_ids)
            taken = min(length, num_tokens)
            num_tokens -= taken
            if taken == length:
                first.append(chunk)
            elif not taken:
                rest.append(chunk)
            else:
                first.append(chunk.part(0, taken))
                rest.append(chunk.part(taken, length))
        return StepPlan(tuple(first)), StepPlan(tuple(rest))

    def to_ints(self) -> list[int]:
        """`[num_chunks, (id, start, kind + 2*sample, logit_start, num_tokens, num_pages, tokens…, pages…)…]`"""
        row = [len(self.chunks)]
        for request_id, start, token_ids, pages, kind, sample, logit_start in self.chunks:
            row += (request_id, start, kind + 2 * sample, logit_start, len(token_ids), len(pages))
            row += token_ids
            row += pages
        return row

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> StepPlan:
        """The inverse of `to_ints`. ValueError where the row is not one."""
        at = 1
        chunks: list[SequenceChunk] = []
        for _ in range(row[0] if row else 0):
            request_id, start, flags, logit_start, num_tokens, num_pages = row[at : at + 6]
            middle = at + 6 + num_tokens
            end = middle + num_pages
            chunks.append(
                SequenceChunk(
                    request_id,
                    start,
                    tuple(row[at + 6 : middle]),
                    tuple(row[middle:end]),
                    _KINDS[flags & 1],
                    flags >= 2,
                    logit_start,
                )
            )
            at = end
        if at != len(row):
            raise ValueError(f"a step plan of {len(row)} integers was read as {at}")
        return cls(tuple(chunks))


_KINDS = (ChunkKind.DECODE, ChunkKind.PREFILL)
