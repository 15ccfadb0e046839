"""RankEngine: the SPMD program of one rank. Every rank enters every step; nothing about its shape is decided locally.

Who decides: tp rank 0 of each DP group (its leader) schedules and samples; world rank 0 owns the requests. Leaders meet
on the dp axis, each hands the agreed step and its plan to its group on the tp axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.comm.base import Groups
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.deferred import DeferredDispatcher
from moe_runtime.engine.graphs import NO_GRAPHS, GraphCounts, RankGraphs
from moe_runtime.engine.lockstep import AgreedStep, LockstepLimits, Wish, agree
from moe_runtime.engine.messages import GroupCommands, TokenResult, decode_results, encode_results
from moe_runtime.engine.plan import StepPlan
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import REBALANCE_OFF, RebalanceState
from moe_runtime.engine.recording import LoadWindow, Recording
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.engine.sampler import NOT_FINITE, Sampled, Sampler, TokenLogprobs, prompt_logprobs
from moe_runtime.engine.scheduler import Finished, Scheduler, SchedulerStats
from moe_runtime.engine.sequence import SequenceState
from moe_runtime.engine.step_header import decode_step, encode_step
from moe_runtime.errors import CommunicationError


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Counters of all ranks since the start."""

    expert_load: Tensor
    """[L, E'] int64: tokens per MoE layer and logical expert"""
    rank_load: Tensor
    """[L, ep] int64: rows received per MoE layer and rank"""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the owner learns of one step."""

    results: Sequence[TokenResult]
    agreed: AgreedStep
    groups: tuple[SchedulerStats, ...]
    """Per DP group, when the step was planned"""
    load: LoadReport | None = None
    graphs: GraphCounts = NO_GRAPHS
    """Of world rank 0's process"""
    rebalance: RebalanceState = REBALANCE_OFF
    window: LoadWindow | None = None
    """That ended with this step"""


class Owner(Protocol):
    """World rank 0's side of the requests; called on the engine's thread."""

    def commands(self, *, idle: bool) -> bytes:
        """The encoded commands for the next step. Where `idle`, waits a moment for some."""

    def report(self, step: StepReport) -> None: ...


@dataclass(frozen=True, slots=True)
class Leader:
    """What tp rank 0 of a DP group has beside the others. `owner` on world rank 0 only."""

    scheduler: Scheduler
    sampler: Sampler
    owner: Owner | None


@dataclass(slots=True)
class RankEngine:
    """One rank: `serve` runs steps until the owner stops. `graphs`: where decode steps are captured; `fabric`: where
    the dispatcher has buffers of its own; `rebalancer`: where experts move while it serves; `recording`:
    where windows of loads are shown."""

    groups: Groups
    runner: Runner
    recorder: LoadRecorder | None
    limits: LockstepLimits
    leader: Leader | None
    graphs: RankGraphs | None = None
    fabric: DeferredDispatcher | None = None
    rebalancer: Rebalancer | None = None
    recording: Recording | None = None
    _step: int = 0
    _idle: bool = True
    _groups: tuple[SchedulerStats, ...] = ()

    def prepare(self) -> None:
        """Before `serve`, on all ranks: make the fabric's buffers, capture decode steps that are to run as graphs."""
        if self.fabric is not None:
            self.fabric.open()
            safe = self.graphs is None or self.fabric.capabilities.graph_safe
            assert safe, "captured, though its dispatcher is not graph-safe"
        if self.graphs is not None:
            self.graphs.capture()

    def close(self) -> None:
        """Release what was captured, before the communicators go, and write what was recorded and where experts are;
        each also where another one raises. Not collective, and after the last collective: it may wait for a disk.
        Idempotent."""
        with ExitStack() as last_first:
            for part in (self.rebalancer, self.graphs, self.recording):
                if part is not None:
                    last_first.callback(part.close)

    def serve(self) -> None:
        """Steps until the owner says stop."""
        while self.step():
            pass
        if self.fabric is not None:
            self.fabric.close()  # all ranks are here

    def step(self) -> bool:
        """Agree, plan, run, sample, commit. False after the last step."""
        self.groups.location.step = self._step
        if self.leader is None:
            step, plan, stop, report = decode_step(self.groups.tp.share(None, 0))
            agreed, commands = None, GroupCommands(report=report, stop=stop)
        else:
            commands = self._commands(self.leader)
            plan = self.leader.scheduler.plan()
            agreed = self._agree(self.leader, plan)
            step = GroupStep.of(agreed, self.groups.dp.rank)
            self.groups.tp.share(encode_step(step, plan, stop=commands.stop, report=commands.report), 0)
        results: list[TokenResult] = []
        if step.phase is not Phase.IDLE:
            runner = self.graphs if step.graph else self.runner
            assert runner is not None, "only captured sizes are agreed on as graphs"
            logits = runner.run(plan, step)
            if self.leader is not None:
                results = self._sample(self.leader, plan, logits)
        window = None
        if self.recording is not None:
            tokens = 0 if agreed is None else agreed.num_tokens
            window = self.recording.after(step, plan, number=self._step, num_tokens=tokens, last=commands.stop)
        if self.rebalancer is not None and not commands.stop:
            self.rebalancer.advance(self._step, worked=step.phase is not Phase.IDLE)
        load = self._load() if commands.report else None
        if self.leader is not None and agreed is not None:
            self._tell(self.leader, results, agreed, load, window)
        self._step += 1
        return not commands.stop

    # Agree

    def _commands(self, leader: Leader) -> GroupCommands:
        """The owner's commands for this group, applied to its scheduler."""
        dp = self.groups.dp
        idle = self._idle and not (self.rebalancer is not None and self.rebalancer.moving)
        mine = leader.owner.commands(idle=idle) if leader.owner is not None else None
        commands = GroupCommands.decode(dp.share(mine, 0), dp.rank)
        for request in commands.add:
            leader.scheduler.add(request)
        for request_id in commands.abort:
            leader.scheduler.abort(request_id)
        return commands

    def _agree(self, leader: Leader, plan: StepPlan) -> AgreedStep:
        wish = Wish(
            step=self._step,
            num_tokens=plan.num_tokens,
            num_decode_tokens=plan.num_decode_tokens,
            outstanding=leader.scheduler.outstanding_tokens,
        )
        rows = self.groups.dp.exchange((*wish, *leader.scheduler.stats))
        width = len(wish)
        agreed = agree([row[:width] for row in rows], limits=self.limits)
        if leader.owner is not None:
            self._groups = tuple([SchedulerStats(*row[width:]) for row in rows])
        self._idle = not any(agreed.outstanding)
        if not self._idle and not agreed.num_tokens:
            raise CommunicationError(
                f"step {self._step}: {sum(agreed.outstanding)} tokens are outstanding but no group planned any"
            )
        return agreed

    # Sample and commit

    def _sample(self, leader: Leader, plan: StepPlan, logits: Tensor) -> list[TokenResult]:
        prompts, sample_at = _split_rows(plan)
        rows = leader.scheduler.sample_rows(plan)
        picked = logits if len(sample_at) == logits.shape[0] else logits[torch.tensor(sample_at, dtype=torch.int64)]
        sampled = leader.sampler.sample(picked, rows)
        scored = {
            chunk_id: self._prompt_logprobs(leader, chunk_id, logits[first:last], position)
            for chunk_id, first, last, position in prompts
        }
        tokens = {row.request_id: token for row, token in zip(rows, sampled, strict=True)}
        failed = {key: token.error for key, token in tokens.items() if token.error is not None}
        failed |= {key: NOT_FINITE for key, scores in scored.items() if scores is None}
        states = [leader.scheduler.sequence(chunk.request_id) for chunk in plan.chunks]  # gone once they have ended
        ended = {
            done.request_id: done
            for done in leader.scheduler.commit(
                plan,
                {key: token.token_id for key, token in tokens.items() if token.token_id is not None},
                failed=failed,
            )
        }
        results = []
        for chunk, state in zip(plan.chunks, states, strict=True):
            key = chunk.request_id
            if state is not None and (key in tokens or key in scored or state.begins_with(chunk)):
                results.append(_result(state, tokens.get(key), scored.get(key) or (), ended.get(key)))
        return results

    @staticmethod
    def _prompt_logprobs(
        leader: Leader, request_id: int, logits: Tensor, position: int
    ) -> tuple[TokenLogprobs, ...] | None:
        """Of the prompt tokens that follow `position …`; None where the logits are not finite."""
        state = leader.scheduler.sequence(request_id)
        if state is None or state.request.params.prompt_logprobs is None:
            return ()
        targets = state.tokens[position + 1 : position + 1 + logits.shape[0]]
        scores = prompt_logprobs(logits, targets, state.request.params.prompt_logprobs)
        return None if scores is None else tuple(scores)

    # Tell the owner

    def _load(self) -> LoadReport:
        assert self.recorder is not None, "asked for where loads are counted only"
        experts = self.groups.ep.all_reduce(self.recorder.counts())
        ranks = self.groups.ep.all_gather(self.recorder.received().unsqueeze(0))
        return LoadReport(experts, ranks.t())

    def _tell(
        self,
        leader: Leader,
        results: list[TokenResult],
        agreed: AgreedStep,
        load: LoadReport | None,
        window: LoadWindow | None,
    ) -> None:
        everybody: list[TokenResult] = results
        if agreed.phase is not Phase.IDLE and self.groups.dp.size > 1:
            payloads = self.groups.dp.collect(encode_results(results))
            if leader.owner is not None:
                everybody = [result for payload in payloads for result in decode_results(payload)]
        if leader.owner is not None:
            graphs = NO_GRAPHS if self.graphs is None else self.graphs.counts
            state = REBALANCE_OFF if self.rebalancer is None else self.rebalancer.state
            leader.owner.report(StepReport(everybody, agreed, self._groups, load, graphs, state, window))


def _split_rows(plan: StepPlan) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """The logits' rows that score prompt tokens, as (request, first row, last row, position), and those to sample."""
    prompts: list[tuple[int, int, int, int]] = []
    samples: list[int] = []
    row = 0
    for chunk in plan.chunks:
        scores = chunk.num_logits - chunk.sample
        if scores:
            prompts.append((chunk.request_id, row, row + scores, chunk.start + chunk.logit_start))
        row += chunk.num_logits
        if chunk.sample:
            samples.append(row - 1)
    return prompts, samples


def _result(
    state: SequenceState, sampled: Sampled | None, scores: tuple[TokenLogprobs, ...], ended: Finished | None
) -> TokenResult:
    return TokenResult(
        state.request.id,
        token_id=None if sampled is None else sampled.token_id,
        logprobs=None if sampled is None else sampled.logprobs,
        prompt_logprobs=scores,
        finish_reason=None if ended is None else ended.reason,
        stop_reason=None if ended is None else ended.stop_reason,
        num_cached_tokens=state.num_cached_tokens,
        num_preemptions=state.num_preemptions,
        error=None if ended is None else ended.error,
    )
