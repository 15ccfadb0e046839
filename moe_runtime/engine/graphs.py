"""Decode steps as captured graphs, one per padded size: the same shapes and addresses each time, new numbers in them.

N rows of the step and of each DP group, M the largest size, V vocab. A graph holds the step of all ranks of its
process: each rank fills its own buffers, then one of them replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from moe_kernels.mla import plan_absorbed
from torch import Tensor

from moe_runtime.comm.together import Together
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.cuda_graph import Graph, GraphApi
from moe_runtime.engine.lockstep import cut_rows
from moe_runtime.engine.plan import StepPlan
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.engine.step_buffers import StepBuffers, StepFields
from moe_runtime.layers.moe import MoEStep
from moe_runtime.layers.step import AbsorbedTokens, StepInputs


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
        self,
        process: ProcessGraphs,
        together: Together,
        runner: Runner,
        *,
        max_model_len: int,
        keeps_logits: bool,
        num_micro_batches: Callable[[int], int] = lambda _: 1,
    ) -> None:
        """`keeps_logits`: this rank samples. Its logits `[M, V]` stay allocated, those of other ranks do not.
        `num_micro_batches` of a step of so many rows: what the lockstep will agree on."""
        self._process = process
        self._together = together
        self._runner = runner
        self._keeps_logits = keeps_logits
        self._num_micro_batches = num_micro_batches
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
                self._buffers.fill((), size, num_real=[0] * self._num_micro_batches(size))
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
        size, tp, tp_rank = step.padded_tokens, self._runner.tp, self._runner.tp_rank
        assert step.num_micro_batches == self._num_micro_batches(size), "agreed otherwise than captured"
        first, real = 0, []
        for rows in step.rows(tp):
            local = rows // tp
            real.append(min(max(plan.num_tokens - first - tp_rank * local, 0), local))
            first += rows
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
        logits = self._runner.model(self._micro_batches(size), self._runner.cache.layers)
        if self._keeps_logits:
            if self._logits is None:  # in the warm-up of the largest size, so outside of every capture
                self._logits = torch.empty_like(logits)
            self._logits[:size].copy_(logits)

    def _micro_batches(self, size: int) -> list[StepInputs]:
        rows = cut_rows(size, self._num_micro_batches(size), tp=self._runner.tp)
        fields = self._buffers.fields(size)
        return [
            self._inputs(fields.part(sum(rows[:number]), count, number), count, rows[0] // self._runner.tp, number)
            for number, count in enumerate(rows)
        ]

    def _inputs(self, fields: StepFields, size: int, capacity: int, micro_batch: int) -> StepInputs:
        runner = self._runner
        cos, sin = runner.model.rotary(fields.positions)
        plan = plan_absorbed(
            fields.page_table,
            fields.kv_lens,
            page_size=runner.cache.page_size,
            batch_invariant=runner.one_form,
            num_heads=runner.num_heads,
        )
        return StepInputs(
            token_ids=fields.token_ids,
            num_tokens=size,
            cos=cos,
            sin=sin,
            cache_rows=fields.cache_rows,
            absorbed=AbsorbedTokens(size, fields.page_table, fields.kv_lens, plan),
            expanded=(),
            logit_rows=fields.logit_rows,
            moe=MoEStep(fields.num_real, capacity, capacity, 1, Phase.DECODE, micro_batch),
        )
