"""Runner: a plan's integers to StepInputs, and the model's logits.

n group tokens, N padded, D absorbed, G sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from moe_kernels.mla import LatentCache, plan_absorbed
from torch import Tensor

from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.lockstep import AgreedStep, cut_rows
from moe_runtime.engine.plan import PENDING, ChunkKind, SequenceChunk, StepPlan
from moe_runtime.layers.moe import MoEStep
from moe_runtime.layers.step import AbsorbedTokens, ExpandedChunk, StepInputs

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Model(Protocol):
    """What the engine needs of a model."""

    @property
    def rotary(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]: ...

    def __call__(self, steps: Sequence[StepInputs], caches: tuple[LatentCache, ...]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class GroupStep:
    """The agreed step as one DP group sees it."""

    phase: Phase
    padded_tokens: int
    """N: rows of this group, a multiple of tp"""
    capacity: int
    num_chunks: int
    chunk_tokens: int
    graph: bool = False
    """All ranks have captured a step of so many rows."""
    num_micro_batches: int = 1
    split_combine: bool = False

    @classmethod
    def of(cls, agreed: AgreedStep, group: int) -> GroupStep:
        """As the DP group of this number sees it."""
        return cls(
            agreed.phase,
            agreed.padded_tokens[group],
            agreed.capacity,
            agreed.num_chunks,
            agreed.chunk_tokens,
            agreed.graph,
            agreed.num_micro_batches,
            agreed.split_combine,
        )

    def rows(self, tp: int) -> tuple[int, ...]:
        """N of each micro-batch."""
        return cut_rows(self.padded_tokens, self.num_micro_batches, tp=tp)


@dataclass(frozen=True, slots=True)
class Runner:
    """One rank's model with its cache. `one_form`: every token takes the absorbed form (batch-invariant mode)."""

    model: Model
    cache: LatentKVCache
    tp: int
    tp_rank: int
    one_form: bool
    device: torch.device
    num_heads: int
    """of this rank: the decode kernel cuts sequences by it"""

    def run(self, plan: StepPlan, step: GroupStep) -> Tensor:
        """`logits [S, V] fp32` of the rows that the plan's chunks ask for, in the plan's order."""
        return self.model(self.micro_batches(plan, step), self.cache.layers)

    def micro_batches(self, plan: StepPlan, step: GroupStep) -> list[StepInputs]:
        """The tensors of each micro-batch."""
        if step.num_micro_batches == 1:
            return [self.inputs(plan, step)]
        rows = step.rows(self.tp)
        plans = plan.cut(rows[0])
        return [
            self.inputs(part, replace(step, padded_tokens=count), micro_batch=number)
            for number, (part, count) in enumerate(zip(plans, rows, strict=True))
        ]

    def inputs(self, plan: StepPlan, step: GroupStep, *, micro_batch: int = 0) -> StepInputs:
        """The tensors of a step that is one micro-batch, or of one of its micro-batches."""
        chunks = plan.chunks
        num_tokens = plan.num_tokens
        positions = _positions(chunks, num_tokens)
        token_ids = np.zeros(step.padded_tokens, dtype=np.int64)
        token_ids[:num_tokens] = [token for chunk in chunks for token in chunk.token_ids]
        assert (token_ids != PENDING).all(), "a plan made before the last step was committed: the runner cannot fill it"
        table, sequence = _page_table(chunks)
        size = self.cache.page_size
        rows = table[sequence, positions // size] * size + positions % size
        cos, sin = self.model.rotary(self._tensor(positions))
        absorbed_count = num_tokens if self.one_form else _num_absorbed(chunks)
        return StepInputs(
            token_ids=self._tensor(token_ids),
            num_tokens=num_tokens,
            cos=cos,
            sin=sin,
            cache_rows=self._tensor(rows),
            absorbed=self._absorbed(table, sequence, positions, absorbed_count),
            expanded=() if self.one_form else self._expanded(chunks, table),
            logit_rows=self._tensor(_logit_rows(chunks)),
            moe=self._moe(step, num_tokens, micro_batch),
        )

    def _moe(self, step: GroupStep, num_tokens: int, micro_batch: int) -> MoEStep:
        local = step.padded_tokens // self.tp
        real = min(max(num_tokens - self.tp_rank * local, 0), local)
        return MoEStep(
            real, step.capacity, step.chunk_tokens, step.num_chunks, step.phase, micro_batch, step.split_combine
        )

    def _absorbed(self, table: IntArray, sequence: IntArray, positions: IntArray, count: int) -> AbsorbedTokens | None:
        if not count:
            return None
        lengths = positions[:count] + 1
        pages, lens = self._tensor(table[sequence[:count]]), self._tensor(lengths)
        plan = plan_absorbed(
            pages,
            lens,
            page_size=self.cache.page_size,
            batch_invariant=self.one_form,
            lengths=lengths.tolist(),
            num_heads=self.num_heads,
        )
        return AbsorbedTokens(count, pages, lens, plan)

    def _expanded(self, chunks: Sequence[SequenceChunk], table: IntArray) -> tuple[ExpandedChunk, ...]:
        """Neighbouring prompt chunks of equal start and length run as one batch."""
        found: list[ExpandedChunk] = []
        first, at = 0, 0
        while at < len(chunks):
            chunk = chunks[at]
            length = len(chunk.token_ids)
            if chunk.kind is ChunkKind.DECODE:
                first, at = first + length, at + 1
                continue
            end = at + 1
            while end < len(chunks) and _alike(chunks[end], chunk):
                end += 1
            rows = None
            if chunk.start or self.cache.fp8:  # fp8 rows are read as they were rounded, however a prompt is cut
                position = np.arange(chunk.start + length)
                size = self.cache.page_size
                rows = self._tensor(table[at:end, position // size] * size + position % size)
            found.append(ExpandedChunk(first, end - at, length, chunk.start, rows))
            first, at = first + (end - at) * length, end
        return tuple(found)

    def _tensor(self, values: IntArray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the device
        return tensor.to(self.device, non_blocking=True)


def _positions(chunks: Sequence[SequenceChunk], num_tokens: int) -> IntArray:
    if len(chunks) == num_tokens:
        return np.array([chunk.start for chunk in chunks], dtype=np.int64)
    parts = [np.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _page_table(chunks: Sequence[SequenceChunk]) -> tuple[IntArray, IntArray]:
    """`[chunks, max pages]`, 0 past a chunk's pages, and each token's row in it `[n]`."""
    width = max([len(chunk.pages) for chunk in chunks], default=1)
    table = np.zeros((max(len(chunks), 1), width), dtype=np.int64)
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.pages)] = chunk.pages
    sequence = np.repeat(np.arange(len(chunks)), [len(chunk.token_ids) for chunk in chunks])
    return table, sequence.astype(np.int64)


def _num_absorbed(chunks: Sequence[SequenceChunk]) -> int:
    """Tokens of the leading decode chunks; decode chunks behind prompts are an error of the plan."""
    count, prompts = 0, False
    for chunk in chunks:
        if chunk.kind is ChunkKind.DECODE:
            assert not prompts, "a plan has its decode chunks first"
            count += len(chunk.token_ids)
        else:
            prompts = True
    return count


def _logit_rows(chunks: Sequence[SequenceChunk]) -> IntArray:
    rows: list[int] = []
    first = 0
    for chunk in chunks:
        end = first + len(chunk.token_ids)
        rows += range(first + chunk.logit_start, end)
        first = end
    return np.array(rows, dtype=np.int64)


def _alike(chunk: SequenceChunk, other: SequenceChunk) -> bool:
    return chunk.kind is other.kind and chunk.start == other.start and len(chunk.token_ids) == len(other.token_ids)
