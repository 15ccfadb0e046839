"""RequestHandle: a submitted request, between the engine's thread, which fills it, and the thread that waits for it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moe_runtime.comm.waiting import SIGNAL_POLL_S
from moe_runtime.engine.detokenizer import CONTEXT_TOKENS, Detokenizer, TokenDecoder
from moe_runtime.engine.messages import TokenResult
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

Deliver = Callable[[RequestOutput | None], None]
"""Called by the engine's thread. None: look at the handle, which has finished or failed. One that raises loses its
request."""

T = TypeVar("T")


def wait_for(updates: queue.SimpleQueue[T]) -> T:
    """The next item, however long it takes; signals are seen meanwhile."""
    while True:
        try:
            return updates.get(timeout=SIGNAL_POLL_S)
        except queue.Empty:
            continue  # a signal that came just before the wait is seen now


def engine_failed(failure: BaseException) -> EngineClosedError:
    """What every caller of an engine that has failed is told."""
    return EngineClosedError(f"the engine has failed: {failure}")


class NamedLogprobs:
    """Log probabilities of successive positions, given their tokens' texts when somebody reads them."""

    def __init__(self, decoder: TokenDecoder | None) -> None:
        self._decoder = decoder
        self._rows: list[TokenLogprobs] = []
        self._named: list[PositionLogprobs] = []

    def add(self, *rows: TokenLogprobs) -> None:
        self._rows += rows

    def read(self) -> list[PositionLogprobs]:
        for row in self._rows[len(self._named) :]:
            decoder = self._decoder
            texts = {} if decoder is None else {token: decoder.decode([token], False) for token in row.token_ids}
            self._named.append(row.named(texts))
        return list(self._named)


class Completion:
    """One sequence of a request, as it grows.

    Text is made on the way only where somebody reads it then: for a stream, and to find stop texts. Otherwise the
    thread that waits makes it in the end, at a fraction of the cost and beside the engine's thread.
    """

    def __init__(self, index: int, request: Request, group: int, decoder: TokenDecoder | None, *, stream: bool) -> None:
        self.index = index
        self.request = request
        self.group = group
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self._decoder = decoder
        self._eager: Detokenizer | None = None
        if decoder is not None and (stream or request.params.stop_strings):
            self._eager = Detokenizer(decoder, request.params, request.prompt_token_ids)
        self._logprobs = None if request.params.logprobs is None else NamedLogprobs(decoder)
        self._cumulative = 0.0

    def append(self, token: int, result: TokenResult) -> None:
        """A token of the output; a stop text in it ends the completion."""
        self.token_ids.append(token)
        if self._logprobs is not None and result.logprobs is not None:
            self._logprobs.add(result.logprobs)
            self._cumulative += result.logprobs.logprobs[0]
        if self._eager is not None:
            self._eager.append(token, is_stop_token=result.finish_reason == "stop")
            if self._eager.stopped:
                self.finish("stop", self._eager.stop_reason)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """Close the completion. A stop text may still come out of characters that were held back."""
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        if self._eager is not None:
            self._eager.finish()
            if self._eager.stopped and reason != "abort":
                self.finish_reason, self.stop_reason = "stop", self._eager.stop_reason

    @property
    def text(self) -> str:
        if self._eager is not None:
            return self._eager.text
        if self._decoder is None:
            return ""
        params = self.request.params
        written = self.token_ids
        if self.finish_reason == "stop" and not params.include_stop_str_in_output:
            written = written[:-1]  # the token that stopped it; stop texts are the detokenizer's
        context = self.request.prompt_token_ids[-CONTEXT_TOKENS:]
        before = self._decoder.decode(context, params.skip_special_tokens)
        return self._decoder.decode([*context, *written], params.skip_special_tokens)[len(before) :]

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=None if self._logprobs is None else self._logprobs.read(),
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )


@dataclass(slots=True)
class _Times:
    """RequestMetrics in the making."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finish: float | None = None


class RequestHandle:
    """`stream`: whether every token makes an update, or the end alone. `deliver`: None = into `wait`'s queue."""

    def __init__(
        self,
        number: int,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = False,
        decoder: TokenDecoder | None = None,
        deliver: Deliver | None = None,
    ) -> None:
        self.number = number
        self.stream = stream
        self.completions: list[Completion] = []
        self.error: BaseException | None = None
        self._prompt = prompt
        self._prompt_token_ids = tuple(prompt_token_ids)
        self._prompt_logprobs = None if params.prompt_logprobs is None else NamedLogprobs(decoder)
        self._times = _Times(time.monotonic())
        self._updates: queue.SimpleQueue[RequestOutput | None] = queue.SimpleQueue()
        self._deliver = self._updates.put if deliver is None else deliver

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    # The thread that waits

    def wait(self) -> RequestOutput:
        """The next update; for handles that do not stream, the end. EngineClosedError where the engine failed."""
        return self.read(wait_for(self._updates))

    def read(self, update: RequestOutput | None) -> RequestOutput:
        """What an update says."""
        if update is not None:
            return update
        if self.error is not None:
            raise engine_failed(self.error) from self.error
        return self.output()

    def output(self) -> RequestOutput:
        """As it stands: for the engine's thread, or for any once it has finished."""
        times = self._times
        lengths = [len(completion.token_ids) for completion in self.completions]
        return RequestOutput(
            request_id=self.number,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=None if self._prompt_logprobs is None else [None, *self._prompt_logprobs.read()],
            outputs=[completion.output() for completion in self.completions],
            metrics=RequestMetrics(
                times.arrival,
                times.scheduled,
                times.first_token,
                times.finish,
                num_output_tokens=sum(lengths),
                num_longest_output_tokens=max(lengths),
                num_cached_tokens=max(completion.num_cached_tokens for completion in self.completions),
                num_preemptions=sum(completion.num_preemptions for completion in self.completions),
            ),
            finished=self.finished,
        )

    # The engine's thread, under the owner's lock

    def apply(self, completion: Completion, result: TokenResult, *, began: float, now: float) -> None:
        """One step's result; the step ran from `began` to `now`."""
        times = self._times
        if times.scheduled is None:
            times.scheduled = began
        if self._prompt_logprobs is not None and result.prompt_logprobs:
            self._prompt_logprobs.add(*result.prompt_logprobs)
        if result.token_id is not None:
            completion.append(result.token_id, result)
            if times.first_token is None:
                times.first_token = now
        if result.finish_reason is not None and completion.finish_reason is None:
            completion.finish(result.finish_reason, result.stop_reason, result.error)
        completion.num_cached_tokens = result.num_cached_tokens
        completion.num_preemptions = result.num_preemptions
        if self.finished:
            times.finish = now

    def abort(self, now: float, error: str | None = None) -> None:
        """End what still runs. `error`: why, where it was not the caller's wish."""
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish("abort", error=error)
                self._times.finish = now

    def publish(self) -> None:
        """Tell the thread that waits, where there is something that it waits for."""
        if self.stream and self.error is None:
            self._deliver(self.output())
        elif self.finished:
            self.release()

    def release(self) -> None:
        """Tell the thread that waits that it is over."""
        self._deliver(None)
