"""RequestOwner: world rank 0's side of the requests. Any thread submits; the engine's thread takes and reports."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from moe_runtime.engine.detokenizer import Detokenizer, TokenDecoder
from moe_runtime.engine.engine import LoadReport, StepReport
from moe_runtime.engine.lockstep import GroupBalancer
from moe_runtime.engine.messages import Commands, TokenResult
from moe_runtime.engine.request import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from moe_runtime.engine.sampler import TokenLogprobs
from moe_runtime.errors import EngineClosedError

IDLE_WAIT_S = 1.0
"""How long rank 0 waits for work before it takes an idle step, which tells the other ranks that it lives."""


@dataclass(slots=True)
class Completion:
    """One sequence of a request."""

    index: int
    request: Request
    group: int
    text: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def output(self) -> CompletionOutput:
        chosen = None
        if self.logprobs is not None:
            chosen = sum(row[token].logprob for row, token in zip(self.logprobs, self.token_ids, strict=True))
        return CompletionOutput(
            index=self.index,
            text="" if self.text is None else self.text.text,
            token_ids=tuple(self.token_ids),
            logprobs=None if self.logprobs is None else list(self.logprobs),
            cumulative_logprob=chosen,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestHandle:
    """A submitted request, for the thread that waits for it."""

    def __init__(self, number: int, prompt: str | None, prompt_token_ids: Sequence[int], *, stream: bool) -> None:
        self.number = number
        self.stream = stream
        """Whether every token makes an update, or the end alone."""
        self.prompt = prompt
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.completions: list[Completion] = []
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.error: BaseException | None = None
        self.updates: queue.SimpleQueue[RequestOutput | None] = queue.SimpleQueue()

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.number,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            outputs=[completion.output() for completion in self.completions],
            metrics=self.metrics,
            finished=self.finished,
        )


class RequestOwner:
    """Implements the engine's `Owner`. `check` refuses a request that could never run (RequestError)."""

    def __init__(self, *, num_groups: int, check: Callable[[Request], None], decoder: TokenDecoder | None) -> None:
        self._check = check
        self._decoder = decoder
        self._balancer = GroupBalancer(num_groups)
        self._wake = threading.Condition()
        self._commands = Commands()
        self._live: dict[int, tuple[RequestHandle, Completion]] = {}
        self._next_id = 0
        self._load_waiters: list[queue.SimpleQueue[LoadReport | None]] = []
        self._failure: BaseException | None = None
        self._closed = False
        self.num_steps = 0
        self.busy_s = 0.0
        """Time in steps that ran the model."""

    # Any thread

    def submit(
        self,
        prompt: str | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        stream: bool = False,
    ) -> RequestHandle:
        """Queue one prompt (params.n completions of it); RequestError where it could never run."""
        with self._wake:
            self._raise_if_ended()
            handle = RequestHandle(self._next_id, prompt, token_ids, stream=stream)
            requests = [
                Request(self._next_id + index, tuple(token_ids), own, cache_salt)
                for index, own in enumerate(params.completions())
            ]
            for request in requests:
                self._check(request)
            self._next_id += len(requests)
            if params.prompt_logprobs is not None:
                handle.prompt_logprobs = [None]
            add = {group: list(queued) for group, queued in self._commands.add.items()}
            for index, request in enumerate(requests):
                group = self._balancer.assign(len(request.prompt_token_ids) + (request.params.max_tokens or 0))
                text = None if self._decoder is None else Detokenizer(self._decoder, request.params, token_ids)
                logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
                completion = Completion(index, request, group, text, logprobs=logprobs)
                handle.completions.append(completion)
                self._live[request.id] = (handle, completion)
                add.setdefault(group, []).append(request)
            self._commands = replace(self._commands, add=add)
            self._wake.notify()
        return handle

    def abort(self, handle: RequestHandle) -> None:
        """End a request; its completions finish with "abort". Nothing happens where it has finished."""
        with self._wake:
            for completion in handle.completions:
                if completion.finish_reason is None:
                    self._abort(completion)
                    completion.finish_reason = "abort"
            self._publish(handle)
            self._wake.notify()

    def load(self) -> LoadReport:
        """The load counters of all ranks."""
        waiter: queue.SimpleQueue[LoadReport | None] = queue.SimpleQueue()
        with self._wake:
            self._raise_if_ended()
            self._load_waiters.append(waiter)
            self._commands = replace(self._commands, report=True)
            self._wake.notify()
        report = waiter.get()
        if report is None:
            self._raise_if_ended()
            raise EngineClosedError("the engine was closed while its load was asked for.")
        return report

    def close(self) -> None:
        """Let the engine take its last step. Requests that still run finish with "abort"."""
        with self._wake:
            if not self._closed:
                self._closed = True
                for _, completion in self._live.values():
                    self._abort(completion)
                self._commands = replace(self._commands, stop=True)
                self._wake.notify()

    # The engine's thread

    def commands(self, *, idle: bool) -> bytes:
        with self._wake:
            if idle and self._commands.empty:
                self._wake.wait(IDLE_WAIT_S)
            commands, self._commands = self._commands, Commands()
        return commands.encode()

    def report(self, step: StepReport) -> None:
        now = time.monotonic()
        with self._wake:
            self.num_steps += 1
            if step.agreed.num_tokens:
                self.busy_s += step.elapsed_s
            if not self._commands.add:
                self._balancer.report(step.agreed.outstanding)
            touched: dict[int, RequestHandle] = {}
            for result in step.results:
                found = self._live.get(result.request_id)
                if found is not None:
                    self._apply(*found, result, now)
                    touched[found[0].number] = found[0]
            for handle in touched.values():
                self._publish(handle)
            if step.load is not None:
                for waiter in self._load_waiters:
                    waiter.put(step.load)
                self._load_waiters.clear()

    def end(self, failure: BaseException | None) -> None:
        """The engine has stopped: every waiting thread is released, with the failure if there was one."""
        with self._wake:
            self._failure = failure
            self._closed = True
            for handle, completion in list(self._live.values()):
                handle.error = failure
                completion.finish_reason = "abort"
                handle.updates.put(None if failure is not None else handle.output())
            self._live.clear()
            for waiter in self._load_waiters:
                waiter.put(None)
            self._load_waiters.clear()

    # Under the lock

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            raise EngineClosedError(f"the engine has failed: {self._failure}") from self._failure
        if self._closed:
            raise EngineClosedError("this engine is closed. Make a new LLM.")

    def _abort(self, completion: Completion) -> None:
        abort = {group: list(ids) for group, ids in self._commands.abort.items()}
        abort.setdefault(completion.group, []).append(completion.request.id)
        self._commands = replace(self._commands, abort=abort)

    def _apply(self, handle: RequestHandle, completion: Completion, result: TokenResult, now: float) -> None:
        metrics = handle.metrics
        if metrics.scheduled_time is None:
            metrics = replace(metrics, scheduled_time=now)
        if handle.prompt_logprobs is not None and completion.index == 0:
            handle.prompt_logprobs += [self._named(row) for row in result.prompt_logprobs]
        if result.token_id is not None:
            self._append(completion, result.token_id, result)
            metrics = replace(
                metrics,
                first_token_time=now if metrics.first_token_time is None else metrics.first_token_time,
                num_output_tokens=metrics.num_output_tokens + 1,
            )
        if result.finish_reason is not None and completion.finish_reason is None:
            completion.finish_reason = result.finish_reason
            completion.stop_reason = result.stop_reason if result.error is None else result.error
            if completion.text is not None:
                completion.text.finish()
        if completion.finish_reason is not None:
            metrics = replace(
                metrics,
                finish_time=now,
                num_cached_tokens=result.num_cached_tokens,
                num_preemptions=metrics.num_preemptions + result.num_preemptions,
            )
        handle.metrics = metrics

    def _append(self, completion: Completion, token: int, result: TokenResult) -> None:
        """A token, its text and log probabilities; a stop text ends the completion and tells its group."""
        if completion.text is not None:
            if completion.text.stopped:
                return
            completion.text.append(token, is_stop_token=result.stop_reason == token)
        completion.token_ids.append(token)
        if completion.logprobs is not None and result.logprobs is not None:
            completion.logprobs.append(self._named(result.logprobs))
        if completion.text is not None and completion.text.stopped:
            completion.finish_reason = "stop"
            completion.stop_reason = completion.text.stop_reason
            if result.finish_reason is None:
                self._abort(completion)

    def _named(self, row: TokenLogprobs) -> PositionLogprobs:
        decoder = self._decoder
        texts = {} if decoder is None else {token: decoder.decode([token], False) for token in row.token_ids}
        return row.named(texts)

    def _publish(self, handle: RequestHandle) -> None:
        for completion in handle.completions:
            if completion.finish_reason is not None:
                self._live.pop(completion.request.id, None)
        if handle.stream or handle.finished:
            handle.updates.put(handle.output())
