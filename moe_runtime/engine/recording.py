"""Recording: after each step a rank notes what was counted; at the end of a window all ranks put it together.

L MoE layers, E logical experts, K top-k, P slots, r rows of an open window, n tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moe_runtime.balance.load import PHASES, LoadRecorder
from moe_runtime.balance.trace import Change, Window
from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.plan import ChunkKind, StepPlan
from moe_runtime.engine.runner import GroupStep
from moe_runtime.engine.trace_thread import TraceThread

_MARKS: Final = ("request", "position", "step", "is_prompt", "window", "micro_batch")
"""What is known of a token beside its routes; int64 each."""
_MARK_BYTES: Final = len(_MARKS) * 8

Rows = Sequence[tuple[int, ...]]
"""[L][P] logical ids: phy2log"""


@dataclass(frozen=True, slots=True, eq=False)
class LoadWindow:
    """The loads of all ranks in one window, phases together."""

    number: int
    """Windows before it, since the start"""
    first_step: int
    last_step: int
    num_steps: int
    """Idle ones are no part of it"""
    num_tokens: int
    expert_load: Tensor
    """[L, E] int64 on the CPU"""
    rank_load: Tensor
    """[L, ep] int64 on the CPU: rows received"""
    trace_error: str | None = None
    """Why the trace ended before the run did; told with the windows after"""
    trace_dropped: int = 0
    """Windows, of one phase each, that the trace lacks so far because the disk was slower"""


@dataclass(slots=True)
class _Row:
    """Steps of one phase, counted together."""

    phase: Phase
    first_step: int
    last_step: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    counts: tuple[Tensor, Tensor] | None = None
    """[L, E] and [L], of this rank, where they were taken already"""


class Recording:
    """One rank's part. All ranks of `ep` call `after` for the same steps, and close their windows at the same ones.

    `per_step`: a row for each step, else one for each phase. A window ends after `window_steps` steps with tokens, or
    earlier where what a rank keeps for it may pass `most_bytes`. `trace`: on ep rank 0 only, if at all. `placed`: where
    experts move, the placement of the next step, equal on all ranks.
    """

    def __init__(
        self,
        ep: Communicator,
        recorder: LoadRecorder,
        *,
        tp: int,
        window_steps: int,
        most_bytes: int,
        per_step: bool = False,
        trace: TraceThread | None = None,
        placed: Callable[[], Rows] = tuple,
    ) -> None:
        self._ep = ep
        self._recorder = recorder
        self._tp = tp
        self._window_steps = window_steps
        self._most_bytes = most_bytes
        self._per_step = per_step
        self._trace = trace
        self._placed = placed
        self._phy2log = placed()
        self._changes: list[Change] = []
        self._number = 0
        self._rows: list[_Row] = []
        self._num_steps = 0
        self._num_bytes = 0
        self._tokens: list[tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], Tensor]] = []
        self._counts, self._received = recorder.counts_by_phase(), recorder.received_by_phase()
        self._row_bytes = self._counts[0].nbytes + self._received[0].nbytes

    def after(self, step: GroupStep, plan: StepPlan, *, number: int, num_tokens: int, last: bool) -> LoadWindow | None:
        """Note step `number`, with `num_tokens` of all groups as far as this rank knows; `last`: none will follow.

        The window that ended with it, on ep rank 0. Called before experts move after this step.
        """
        self._note_changes(number)
        if step.phase is not Phase.IDLE:
            self._note(step, plan, number, num_tokens)
        full = self._num_steps >= self._window_steps or self._num_bytes >= self._most_bytes
        window = self._close_window() if self._num_steps and (full or last) else None
        if last and self._trace is not None:
            self._trace.end(complete=True)
        return window

    def close(self) -> None:
        """Wait until the trace is on disk, for as long as it may; communicates nothing. Call it where no other rank
        waits for this one. Idempotent."""
        if self._trace is not None:
            self._trace.close()

    # A step

    def _note_changes(self, number: int) -> None:
        """What has moved since the step before, so that step `number` was the first to run under it."""
        placed = self._placed()
        for layer, (old, new) in enumerate(zip(self._phy2log, placed, strict=True)):
            if new is not old:
                self._changes.append(Change(number, layer, new))
                self._num_bytes += 2 * len(new)
        self._phy2log = placed

    def _note(self, step: GroupStep, plan: StepPlan, number: int, num_tokens: int) -> None:
        row = next((row for row in self._rows if row.phase is step.phase), None)
        if row is None or self._per_step:
            row = _Row(step.phase, number)
            self._rows.append(row)
        row.last_step, row.num_steps, row.num_tokens = number, row.num_steps + 1, row.num_tokens + num_tokens
        self._num_steps += 1
        if self._per_step:
            row.counts = self._taken(step.phase)
            self._num_bytes += self._row_bytes
        routes = self._recorder.routes
        if routes is not None:
            self._num_bytes += step.capacity * step.num_micro_batches * (_MARK_BYTES + routes.token_bytes)
            marks = _marks(plan, number, self._rows.index(row))
            first = 0
            for micro_batch, rows in enumerate(step.rows(self._tp)):
                local = rows // self._tp
                begin = first + self._ep.rank % self._tp * local
                own = marks[begin : min(begin + local, first + rows)]
                own[:, _MARKS.index("micro_batch")] = micro_batch
                if len(own):
                    self._tokens.append((own, routes.take(len(own), micro_batch)))
                first += rows

    def _taken(self, phase: Phase) -> tuple[Tensor, Tensor]:
        """What was counted in a phase since this was asked last, of this rank."""
        index = PHASES.index(phase)
        counts, received = self._recorder.counts_by_phase()[index], self._recorder.received_by_phase()[index]
        fresh = counts - self._counts[index], received - self._received[index]
        self._counts[index], self._received[index] = counts, received
        return fresh

    # A window

    def _close_window(self) -> LoadWindow | None:
        rows = self._rows
        taken = [row.counts or self._taken(row.phase) for row in rows]
        loads = self._ep.all_reduce(torch.stack([counts for counts, _ in taken]))
        received = self._ep.all_gather(torch.stack([received for _, received in taken]).unsqueeze(0))
        tokens = self._gather_tokens()
        changes, self._changes = self._changes, []
        self._rows, self._num_steps, self._num_bytes = [], 0, 0
        if self._ep.rank:
            return None
        loads, rank_loads = loads.cpu(), received.permute(1, 2, 0).contiguous().cpu()
        windows = [
            Window(
                phase=str(row.phase),
                first_step=row.first_step,
                last_step=row.last_step,
                num_steps=row.num_steps,
                num_tokens=row.num_tokens,
                loads=loads[index],
                rank_loads=rank_loads[index],
            )
            for index, row in enumerate(rows)
        ]
        trace = self._trace
        if trace is not None:
            trace.add(windows, tokens or None, changes)
        self._number += 1
        return LoadWindow(
            self._number - 1,
            min(row.first_step for row in rows),
            max(row.last_step for row in rows),
            sum(row.num_steps for row in rows),
            sum(row.num_tokens for row in rows),
            loads.sum(0),
            rank_loads.sum(0),
            None if trace is None else trace.error,
            0 if trace is None else trace.num_dropped,
        )

    def _gather_tokens(self) -> dict[str, Tensor]:
        """The tokens of all ranks with their routes, on ep rank 0; elsewhere nothing."""
        routes = self._recorder.routes
        if routes is None:
            return {}
        kept, self._tokens = self._tokens, []
        own = torch.empty(0, _MARK_BYTES + routes.token_bytes, dtype=torch.uint8, device=routes.device)
        if kept:
            marks = torch.from_numpy(np.concatenate([marks for marks, _ in kept])).to(routes.device)
            ids = torch.cat([ids for _, ids in kept])
            # Bytes: int16 is no type that NCCL or gloo carry.
            own = torch.cat([marks.view(torch.uint8), ids.flatten(1).view(torch.uint8)], dim=1)
        counts = [row[0] for row in self._ep.exchange((len(own),))]
        if self._ep.rank:
            if len(own):
                self._ep.send(own, 0)
            return {}
        # One rank after the other, and to rank 0 alone: a gather to all would take ep times the memory.
        parts = [own.cpu()]
        for rank, count in enumerate(counts[1:], start=1):
            like = own.new_empty(count, own.shape[1])
            parts.append(self._ep.recv(like, rank).cpu() if count else like.cpu())
        return _columns(torch.cat(parts), counts, routes.shape)


def _marks(plan: StepPlan, step: int, window: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[n, MARKS] of the group's tokens, in the order of their rows."""
    parts = []
    for chunk in plan.chunks:
        marks = np.empty((len(chunk.token_ids), len(_MARKS)), dtype=np.int64)
        marks[:, 0] = chunk.request_id
        marks[:, 1] = np.arange(chunk.start, chunk.start + len(marks))
        marks[:, 2:] = step, chunk.kind is ChunkKind.PREFILL, window, 0
        parts.append(marks)
    return np.concatenate(parts) if parts else np.empty((0, len(_MARKS)), dtype=np.int64)


def _columns(tokens: Tensor, counts: list[int], shape: tuple[int, int]) -> dict[str, Tensor]:
    """A trace's columns of `tokens [n, bytes]` on the CPU, of which rank i sent `counts[i]`."""
    # Flat first: a single row counts as contiguous whatever its stride, and could not be viewed in other units.
    marks = tokens[:, :_MARK_BYTES].flatten().view(torch.int64).view(-1, len(_MARKS))
    found = {name: marks[:, index].contiguous() for index, name in enumerate(_MARKS)}
    found["is_prompt"] = found["is_prompt"].bool()
    found["micro_batch"] = found["micro_batch"].to(torch.uint8)
    found["home"] = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    found["routes"] = tokens[:, _MARK_BYTES:].flatten().view(torch.int16).view(-1, *shape)
    return found
