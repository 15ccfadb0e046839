"""RequestOwner: world rank 0's side of the requests. Any thread submits; the engine's thread takes and reports."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.detokenizer import TokenDecoder
from moe_runtime.engine.engine import LoadReport, StepReport
from moe_runtime.engine.handle import Completion, Deliver, RequestHandle, engine_failed, wait_for
from moe_runtime.engine.lockstep import GroupBalancer
from moe_runtime.engine.messages import Commands
from moe_runtime.engine.request import Request
from moe_runtime.engine.scheduler import SchedulerStats
from moe_runtime.engine.snapshot import EngineSnapshot, EngineState, StepCounts, TokenRate
from moe_runtime.engine.snapshot_file import SnapshotFile
from moe_runtime.engine.submission import Check, Prepared, Submission, prepare
from moe_runtime.errors import EngineClosedError
from moe_runtime.parallel.mesh import ProcessMesh

IDLE_WAIT_S = 1.0
"""How long rank 0 waits for work before it takes an idle step, which tells the other ranks that it lives."""


@dataclass(slots=True)
class _Queued:
    """Commands for the next step. Grown in place: a finalizer may add to it between any two lines of this module."""

    add: dict[int, list[Request]] = field(default_factory=dict)
    add_tokens: dict[int, int] = field(default_factory=dict)
    """Of `add`, per group, at their longest"""
    abort: dict[int, list[int]] = field(default_factory=dict)
    report: bool = False


class RequestOwner:
    """Implements the engine's `Owner`.

    `idle_wait_s` must be well below the time after which the other ranks give rank 0 up.
    """

    def __init__(
        self,
        *,
        mesh: ProcessMesh,
        num_pages: int,
        check: Check,
        decoder: TokenDecoder | None,
        idle_wait_s: float = IDLE_WAIT_S,
        snapshot_file: SnapshotFile | None = None,
    ) -> None:
        self._mesh = mesh
        self._num_pages = num_pages
        self._check = check
        self._decoder = decoder
        self._idle_wait_s = idle_wait_s
        self._snapshot_file = snapshot_file
        self._balancer = GroupBalancer(mesh.dp)
        self._wake = threading.Condition()
        self._queued = _Queued()
        self._live: dict[int, tuple[RequestHandle, Completion]] = {}
        self._next_id = 0
        self._load_waiters: list[queue.SimpleQueue[LoadReport | None]] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._started = self._step_began = time.monotonic()
        self._counts = StepCounts(groups=(SchedulerStats(0, 0, 0, num_pages, 0, 0, 0),) * mesh.dp)
        self._rate = TokenRate()

    # Any thread

    def submit(
        self, submissions: Sequence[Submission], *, stream: bool = False, deliver: Deliver | None = None
    ) -> list[RequestHandle]:
        """Queue all of them for the same step, or none: RequestError where one could never run."""
        prepared = prepare(submissions, self._check, has_decoder=self._decoder is not None)
        with self._wake:
            self._raise_if_ended()
            handles = [self._enqueue(own, stream, deliver) for own in prepared]
            self._wake.notify()
        return handles

    def abort(self, handle: RequestHandle) -> None:
        """End a request; its completions finish with "abort". Nothing happens where it has finished."""
        with self._wake:
            if handle.finished:
                return
            self._cut(handle)
            self._publish(handle)
            self._wake.notify()

    def load(self) -> LoadReport:
        """The load counters of all ranks, in memory of the caller's own."""
        waiter: queue.SimpleQueue[LoadReport | None] = queue.SimpleQueue()
        with self._wake:
            self._raise_if_ended()
            self._load_waiters.append(waiter)
            self._queued.report = True
            self._wake.notify()
        report = wait_for(waiter)
        if report is None:
            self._raise_if_ended()
        assert report is not None, "only an engine that has ended answers nothing"
        with torch.inference_mode(False):  # the engine's tensors cannot be written to outside of that mode
            return LoadReport(report.expert_load.cpu().clone(), report.rank_load.cpu().clone())

    def snapshot(self) -> EngineSnapshot:
        """The engine as it is now; also after its end."""
        with self._wake:
            now, counts = time.monotonic(), self._counts
            state: EngineState = "failed" if self._failure else "closed" if self._closed else "running"
            return EngineSnapshot(
                mesh=self._mesh,
                state=state,
                step=counts.steps,
                phase=counts.phase,
                groups=counts.groups,
                num_pages=self._num_pages,
                num_live_requests=len({handle.number for handle, _ in self._live.values()}),
                num_finished_requests=counts.finished,
                num_prompt_tokens=counts.prompt_tokens,
                num_output_tokens=counts.output_tokens,
                uptime_s=now - self._started,
                busy_s=counts.busy_s,
                last_step_s=counts.last_step_s,
                output_tokens_per_s=self._rate.per_second(now),
                graphs=counts.graphs,
                num_eager_decode_steps=counts.eager_decode_steps,
                num_two_batch_steps=counts.two_batch_steps,
                num_split_steps=counts.split_steps,
                rebalance=counts.rebalance,
                window=counts.window,
            )

    @property
    def num_steps(self) -> int:
        return self._counts.steps

    def close(self) -> None:
        """Let the engine take its last step. Requests that still run finish with "abort"."""
        self._closed = True  # before the lock: enough by itself, at the latest after the idle wait
        with self._wake:
            self._wake.notify()

    # The engine's thread

    def commands(self, *, idle: bool) -> bytes:
        with self._wake:
            queued = self._queued
            if idle and not (queued.add or queued.abort or queued.report or self._closed):
                self._wake.wait(self._idle_wait_s)
            queued, self._queued = self._queued, _Queued()
            stop = self._closed
            self._step_began = time.monotonic()  # the wait is no part of the step
            if stop:  # nobody hears of another step: end what would run in it
                for _, completion in self._live.values():
                    queued.abort.setdefault(completion.group, []).append(completion.request.id)
        return Commands(queued.add, queued.abort, queued.report, stop).encode()

    def report(self, step: StepReport) -> None:
        now = time.monotonic()
        began = self._step_began
        tokens = 0
        with self._wake:
            streams: dict[int, RequestHandle] = {}
            for result in step.results:
                found = self._live.get(result.request_id)
                if found is None:
                    continue
                handle, completion = found
                if result.token_id is not None:
                    if not completion.token_ids:
                        self._counts.prompt_tokens += len(completion.request.prompt_token_ids)
                    tokens += 1
                handle.apply(completion, result, began=began, now=now)
                if completion.finish_reason is not None:
                    self._finish(handle, completion, known=result.finish_reason is not None)
                if handle.stream and (result.token_id is not None or completion.finish_reason is not None):
                    streams[handle.number] = handle
            for handle in streams.values():
                self._publish(handle)
            late = self._queued.add_tokens
            self._balancer.report(step.agreed.outstanding, [late.get(group, 0) for group in range(self._mesh.dp)])
            self._count(step, tokens, began=began, now=now)
            if step.load is not None:
                for waiter in self._load_waiters:
                    waiter.put(step.load)
                self._load_waiters.clear()
        if self._snapshot_file is not None:
            self._snapshot_file.offer(self.snapshot)

    def end(self, failure: BaseException | None) -> None:
        """The engine has stopped: every waiting thread is released, with the failure if there was one."""
        now = time.monotonic()
        with self._wake:
            self._failure = failure
            self._closed = True
            ended = {handle.number: handle for handle, _ in self._live.values()}
            self._live.clear()
            for waiter in self._load_waiters:
                waiter.put(None)
            self._load_waiters.clear()
            for handle in ended.values():
                handle.error = failure
                with suppress(Exception):  # a text that cannot be made is no reason to leave the others waiting
                    handle.abort(now)
                self._publish(handle)
        if self._snapshot_file is not None:
            self._snapshot_file.close(self.snapshot())

    # Under the lock

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            raise engine_failed(self._failure) from self._failure
        if self._closed:
            raise EngineClosedError("this engine is closed. Make a new LLM.")

    def _enqueue(self, prepared: Prepared, stream: bool, deliver: Deliver | None) -> RequestHandle:
        submission, number = prepared.submission, self._next_id
        self._next_id += len(prepared.requests)
        handle = RequestHandle(
            number,
            submission.prompt,
            prepared.requests[0].prompt_token_ids,
            submission.params,
            stream=stream,
            decoder=self._decoder,
            deliver=deliver,
        )
        queued = self._queued
        for index, request in enumerate(prepared.requests):
            request = replace(request, id=number + index)
            group = self._balancer.assign(prepared.num_tokens)
            completion = Completion(index, request, group, self._decoder, stream=stream)
            handle.completions.append(completion)
            self._live[request.id] = (handle, completion)
            queued.add.setdefault(group, []).append(request)
            queued.add_tokens[group] = queued.add_tokens.get(group, 0) + prepared.num_tokens
        return handle

    def _publish(self, handle: RequestHandle) -> None:
        """Tell the caller. One that cannot be told loses its request, and nobody else does."""
        try:
            handle.publish()
        except Exception as error:  # noqa: BLE001 - raised by the caller's own code
            if not handle.finished:
                self._cut(handle, f"its output could not be delivered: {error!r}")
            with suppress(Exception):
                handle.release()

    def _tell_group_to_abort(self, completion: Completion) -> None:
        self._queued.abort.setdefault(completion.group, []).append(completion.request.id)

    def _finish(self, handle: RequestHandle, completion: Completion, *, known: bool) -> None:
        """`known`: its group ended it; else a stop text did, of which the group does not know."""
        self._live.pop(completion.request.id, None)
        if not known:
            self._tell_group_to_abort(completion)
        if handle.finished:
            self._counts.finished += 1
            if not handle.stream:
                self._publish(handle)

    def _cut(self, handle: RequestHandle, error: str | None = None) -> None:
        """End a request that still runs."""
        for completion in handle.completions:
            if completion.finish_reason is None:
                self._live.pop(completion.request.id, None)
                self._tell_group_to_abort(completion)
        handle.abort(time.monotonic(), error)
        self._counts.finished += 1

    def _count(self, step: StepReport, tokens: int, *, began: float, now: float) -> None:
        counts = self._counts
        counts.steps += 1
        counts.phase = step.agreed.phase
        counts.groups = step.groups
        counts.output_tokens += tokens
        counts.graphs = step.graphs
        counts.rebalance = step.rebalance
        counts.window = step.window or counts.window
        counts.eager_decode_steps += step.agreed.phase is Phase.DECODE and not step.agreed.graph
        counts.two_batch_steps += step.agreed.num_micro_batches > 1
        counts.split_steps += step.agreed.split_combine
        if step.agreed.num_tokens:
            counts.last_step_s = now - began
            counts.busy_s += counts.last_step_s
            self._rate.add(began, now, tokens)
