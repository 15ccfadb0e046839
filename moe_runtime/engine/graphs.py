"""Decode steps as captured graphs, one per padded size: the same shapes and addresses each time, new numbers in them.

N rows of the step and of each DP group, n of them real tokens, M the largest size, P pages of the longest sequence,
V vocab. A graph holds the step of all ranks of its process: each rank fills its own buffers, then one of them replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from moe_kernels.mla import plan_absorbed
from torch import Tensor

from moe_runtime.comm.together import Together
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.cuda_graph import Graph, GraphApi
from moe_runtime.engine.plan import PENDING, ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.layers.moe import MoEStep
from moe_runtime.layers.step import AbsorbedTokens, StepInputs

_ALIGN = 16
"""Numbers of 8 bytes: every field begins at a multiple of 128 bytes, as its own allocation would."""
_NUMBER_BYTES = 8


class GraphCounts(NamedTuple):
    """Of one process since its start."""

    captures: int = 0
    replays: int = 0


NO_GRAPHS = GraphCounts()


@dataclass(slots=True)
class ProcessGraphs:
    """The captured steps of one process, shared by its ranks. `sizes`: N of each, ascending."""

    api: GraphApi
    sizes: tuple[int, ...]
    on_captured: Callable[[int], None] = lambda _: None
    """Called with N after each capture."""
    counts: GraphCounts = NO_GRAPHS
    _graphs: dict[int, Graph] = field(default_factory=dict)

    def keep(self, size: int) -> None:
        """End the capture of a step of `size` rows."""
        self._graphs[size] = self.api.end()
        self.counts = self.counts._replace(captures=self.counts.captures + 1)
        self.on_captured(size)

    def replay(self, size: int) -> None:
        self._graphs[size].replay()
        self.counts = self.counts._replace(replays=self.counts.replays + 1)

    def close(self) -> None:
        """Release all graphs. Idempotent."""
        for graph in self._graphs.values():
            graph.release()
        self._graphs.clear()


class RankGraphs:
    """One rank's part of its process's captured steps: its buffers, filled from plans, and its model on them."""

    def __init__(
        self, process: ProcessGraphs, together: Together, runner: Runner, *, max_model_len: int, keeps_logits: bool
    ) -> None:
        """`keeps_logits`: this rank samples. Its logits `[M, V]` stay allocated, those of other ranks do not."""
        self._process = process
        self._together = together
        self._runner = runner
        self._keeps_logits = keeps_logits
        self._buffers = StepBuffers(
            process.sizes[-1],
            max_pages=-(-max_model_len // runner.cache.page_size),
            page_size=runner.cache.page_size,
            device=runner.device,
        )
        self._logits: Tensor | None = None

    @property
    def counts(self) -> GraphCounts:
        return self._process.counts

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._process.sizes

    def capture(self) -> None:
        """Capture every size, the largest first: its memory then serves the others. Collective over all ranks.

        Steps of padding alone run and are captured: nothing is written to the cache and nothing is counted.
        """
        process, meet = self._process, self._together.once
        try:
            for size in reversed(process.sizes):
                self._buffers.fill((), size, num_real=0)
                meet(f"warm-up of a step of {size} rows", process.api.warm)
                self._forward(size)
                meet(f"capture of a step of {size} rows", process.api.begin)
                self._forward(size)
                meet(f"end of the capture of {size} rows", partial(process.keep, size))
        except BaseException:
            process.api.abandon()
            raise

    def run(self, plan: StepPlan, step: GroupStep) -> Tensor:
        """`logits [S, V] fp32` as `Runner.run`'s, valid until the next step; no rows where this rank keeps none.

        Collective over all ranks, for a step that was agreed on as one of the captured sizes.
        """
        size, local = step.padded_tokens, step.padded_tokens // self._runner.tp
        real = min(max(plan.num_tokens - self._runner.tp_rank * local, 0), local)
        self._buffers.fill(plan.chunks, size, num_real=real)
        self._replay(size)
        if self._logits is None:
            return torch.empty(0, 0, device=self._runner.device)
        wanted = [row for row, chunk in enumerate(plan.chunks) if chunk.num_logits]
        if len(wanted) == len(plan.chunks):
            return self._logits[: len(wanted)]
        return self._logits.index_select(0, torch.tensor(wanted, dtype=torch.int64, device=self._logits.device))

    def _replay(self, size: int) -> None:
        self._together.once(f"replay of a step of {size} rows", partial(self._process.replay, size))

    def close(self) -> None:
        """Release the process's graphs and this rank's buffers. Idempotent."""
        self._process.close()
        self._together.close()
        self._logits = None

    def _forward(self, size: int) -> None:
        """What is captured: the model on the buffers, its logits copied out of the pool."""
        logits = self._runner.model(self._inputs(size), self._runner.cache.layers)
        if self._keeps_logits:
            if self._logits is None:  # in the warm-up of the largest size, so outside of every capture
                self._logits = torch.empty_like(logits)
            self._logits[:size].copy_(logits)

    def _inputs(self, size: int) -> StepInputs:
        runner, fields = self._runner, self._buffers.fields(size)
        cos, sin = runner.model.rotary(fields.positions)
        plan = plan_absorbed(
            fields.page_table,
            fields.kv_lens,
            page_size=runner.cache.page_size,
            batch_invariant=runner.one_form,
            num_heads=runner.num_heads,
        )
        capacity = size // runner.tp
        return StepInputs(
            token_ids=fields.token_ids,
            num_tokens=size,
            cos=cos,
            sin=sin,
            cache_rows=fields.cache_rows,
            absorbed=AbsorbedTokens(size, fields.page_table, fields.kv_lens, plan),
            expanded=(),
            logit_rows=fields.logit_rows,
            moe=MoEStep(fields.num_real, capacity, capacity, 1, Phase.DECODE),
        )


class StepFields(NamedTuple):
    """Views of a rank's buffers for a step of N rows; int64."""

    token_ids: Tensor
    """[N], 0 on padding"""
    positions: Tensor
    """[N], 0 on padding"""
    cache_rows: Tensor
    """[N], -1 on padding"""
    kv_lens: Tensor
    """[N], 0 on padding"""
    num_real: Tensor
    """[1]"""
    page_table: Tensor
    """[N, P], columns of pages: what lies past a token's pages is left over from other steps"""
    logit_rows: Tensor
    """[N]: 0, 1, …"""


class StepBuffers:
    """The numbers of a decode step at fixed addresses, written on the host and sent in one copy.

    The page table is stored by columns, so that the columns in use lie together: a step sends those alone.
    """

    def __init__(self, most: int, *, max_pages: int, page_size: int, device: torch.device) -> None:
        """For steps of up to `most` rows (M) and sequences of up to `max_pages` pages (P)."""
        self._most = most
        self._stride, self._table = _places(most)
        self._max_pages = max_pages
        self._page_size = page_size
        count = self._table + max_pages * most
        pinned = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=pinned)
        self._device = torch.zeros(count, dtype=torch.int64, device=device)
        self._rows = torch.arange(most, device=device)
        self._sent = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    @staticmethod
    def num_bytes(most: int, max_pages: int) -> int:
        """Device memory of such buffers."""
        return (_places(most)[1] + (max_pages + 1) * most) * _NUMBER_BYTES

    def fields(self, size: int) -> StepFields:
        """What a step of `size` rows reads."""
        data, stride, table = self._device, self._stride, self._table
        tokens, positions, cache_rows, kv_lens = (data[i * stride : i * stride + size] for i in range(4))
        pages = data[table : table + self._max_pages * size].view(self._max_pages, size).t()
        return StepFields(
            tokens, positions, cache_rows, kv_lens, data[4 * stride : 4 * stride + 1], pages, self._rows[:size]
        )

    def fill(self, chunks: Sequence[SequenceChunk], size: int, *, num_real: int) -> None:
        """The step of `chunks`, one token each, padded to `size` rows; `num_real` of this rank's own rows are tokens.

        Asynchronous on a GPU: what runs on its current stream afterwards sees the new numbers.
        """
        n = len(chunks)
        width = max([len(chunk.pages) for chunk in chunks], default=1)
        assert n <= size <= self._most and width <= self._max_pages, f"{n} tokens, {width} pages in {size} rows"
        for chunk in chunks:
            assert len(chunk.token_ids) == 1 and chunk.kind is ChunkKind.DECODE, "a captured step decodes"
            assert chunk.token_ids[0] != PENDING, "a plan made before the last step was committed"
        if self._sent is not None:
            self._sent.synchronize()  # the last step's copy has long left; the device may not have come to it
        host, stride = self._host.numpy(), self._stride
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        table = host[self._table : self._table + width * size].reshape(width, size)
        table[:] = 0
        for row, chunk in enumerate(chunks):
            table[: len(chunk.pages), row] = chunk.pages
        pages = table[starts // self._page_size, np.arange(n)]
        for i, (values, padding) in enumerate(
            (
                ([chunk.token_ids[0] for chunk in chunks], 0),
                (starts, 0),
                (pages * self._page_size + starts % self._page_size, -1),
                (starts + 1, 0),
            )
        ):
            host[i * stride : i * stride + n] = values
            host[i * stride + n : i * stride + size] = padding
        host[4 * stride] = num_real
        used = self._table + width * size
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def _places(most: int) -> tuple[int, int]:
    """Of steps of up to `most` rows: numbers from one field to the next, and where the page table begins."""
    stride = -(-most // _ALIGN) * _ALIGN
    return stride, 4 * stride + _ALIGN
