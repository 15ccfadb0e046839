"""Continuous batching for one DP group: which tokens run next, in which pages. Runs at the group's tp rank 0.

First come, first served. A step holds every decoding sequence, then prompt chunks up to the token budget. A prompt's
pages are taken at admission, decoding takes one page at a time; where none is left the sequence that came last is
preempted: it gives its pages back, keeps its tokens and is computed again (from the prefix cache where that still has
it). The sequence that came first is never preempted while another runs, and `add` refused what cannot fit alone, so
every step makes progress.

`plan` needs token counts only, never values: step n+1 may be planned before step n is committed. Its decode chunks then
hold PENDING in place of the token still being sampled, and commits follow in the order of the plans. A request that
ends meanwhile leaves a chunk behind that `commit` ignores; its pages may be reused at once, because steps run in order.
The runner takes no PENDING tokens yet, so the engine commits each step before it plans the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from moe_runtime.cache.pages import PagePool
from moe_runtime.engine.plan import PENDING, ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.request import FinishReason, Request, SamplingParams
from moe_runtime.engine.sequence import SampleRow, SchedulerLimits, SequenceState, check_request


class Finished(NamedTuple):
    """`stop_reason`: the stop token id, None for anything else. `error`: why the request failed."""

    request_id: int
    reason: FinishReason
    stop_reason: int | None = None
    error: str | None = None


class SchedulerStats(NamedTuple):
    """`prefix_*_tokens`: of requests at their first admission, where the prefix cache was asked."""

    num_running: int
    num_waiting: int
    outstanding_tokens: int
    num_free_pages: int
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int


class Scheduler:
    """Owns the group's waiting and running requests and the pages they hold. Not thread-safe."""

    def __init__(self, limits: SchedulerLimits, pool: PagePool) -> None:
        self.limits = limits
        self.pool = pool
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._live: dict[int, SequenceState] = {}
        self._outstanding = 0
        self._num_preemptions = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0

    @property
    def outstanding_tokens(self) -> int:
        """Tokens still to compute for the live requests, at their longest."""
        return self._outstanding

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            len(self._running),
            len(self._waiting),
            self._outstanding,
            self.pool.num_free,
            self._num_preemptions,
            self._prefix_query_tokens,
            self._prefix_hit_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request. RequestError where it could never run."""
        pool = self.pool
        max_tokens = check_request(request, self.limits, num_pages=pool.num_pages, page_size=pool.page_size)
        assert request.id not in self._live, f"request {request.id} was added twice"
        params, length = request.params, len(request.prompt_token_ids)
        state = SequenceState(
            request,
            list(request.prompt_token_ids),
            length,
            max_tokens,
            stop_ids=frozenset(params.stop_ids),
            eos_ids=frozenset() if params.ignore_eos else frozenset(self.limits.eos_token_ids),
            chain=pool.new_chain(request.cache_salt.encode(errors="surrogatepass")),
        )
        self._live[request.id] = state
        self._waiting.append(state)
        self._outstanding += length + max_tokens

    def sequence(self, request_id: int) -> SequenceState | None:
        """The live state of a request (for the sampler and for metrics), None where it is not here."""
        return self._live.get(request_id)

    def abort(self, request_id: int) -> bool:
        """End a request now; its pages are free for the next plan. False where it is not here (any more)."""
        state = self._live.get(request_id)
        if state is None:
            return False
        self._remove(state)
        return True

    # -- planning

    def plan(self) -> StepPlan:
        """The next step. Deterministic; takes pages and preempts, but leaves token histories alone."""
        self._reserve_decode_pages()
        by_kind: tuple[list[SequenceChunk], list[SequenceChunk]] = ([], [])
        budget = self.limits.max_num_batched_tokens
        unfinished: list[SequenceState] = []
        for state in self._running:
            if len(state.tokens) > state.planned + 1 or state.planned < state.prompt_len:
                unfinished.append(state)
            elif self._wants_decode(state):
                budget -= 1
                by_kind[ChunkKind.DECODE].append(self._decode_chunk(state))
        for state in unfinished:
            if budget <= 0:
                break
            chunk = self._chunk(state, budget)
            budget -= len(chunk.token_ids)
            by_kind[chunk.kind].append(chunk)
        while budget > 0 and self._admit_next():
            chunk = self._chunk(self._running[-1], budget)
            budget -= len(chunk.token_ids)
            by_kind[chunk.kind].append(chunk)
        return StepPlan((*by_kind[ChunkKind.DECODE], *by_kind[ChunkKind.PREFILL]))

    def _reserve_decode_pages(self) -> None:
        """A page for every decoding sequence at a page border, preempting from the back where none is left."""
        size, running = self.pool.page_size, self._running
        at = 0
        while at < len(running):
            state = running[at]
            if state.planned >= len(state.pages) * size and self._wants_decode(state):
                pages = self.pool.allocate(1)
                if pages is None:
                    self._preempt(running[-1])
                    continue
                state.pages += pages
            at += 1

    @staticmethod
    def _wants_decode(state: SequenceState) -> bool:
        return len(state.tokens) + state.pending > state.planned and state.num_output + state.pending < state.max_tokens

    def _decode_chunk(self, state: SequenceState) -> SequenceChunk:
        start = state.planned
        token = state.tokens[start] if start < len(state.tokens) else PENDING
        state.planned = start + 1
        state.pending += 1
        state.in_flight += 1
        return SequenceChunk(state.request.id, start, (token,), tuple(state.pages), ChunkKind.DECODE, True, 0)

    def _chunk(self, state: SequenceState, budget: int) -> SequenceChunk:
        """The next at most `budget` tokens of a prompt, or of generated tokens that are computed again."""
        start, known = state.planned, len(state.tokens)
        prefill = start < state.prompt_len
        end = min(start + budget, state.prompt_len if prefill else known)
        sample = end == known
        # Positions whose logits were delivered before a preemption are not asked for again.
        logit_start = (
            min(max(state.prompt_logits - start, 0), end - start) if state.logprobs_due else end - start - sample
        )
        state.planned = end
        state.pending += sample
        state.in_flight += 1
        kind = ChunkKind.PREFILL if prefill else ChunkKind.DECODE
        tokens, pages = tuple(state.tokens[start:end]), tuple(state.pages)
        return SequenceChunk(state.request.id, start, tokens, pages, kind, sample, logit_start)

    def _admit_next(self) -> bool:
        """Move the first waiting sequence to running, with pages for all its tokens. False where it must wait."""
        if not self._waiting or len(self._running) >= self.limits.max_num_seqs:
            return False
        state, pool = self._waiting[0], self.pool
        if state.stale:
            return False  # a sample planned before its preemption is still to come
        # Log probabilities of the prompt need the logits of every position, so nothing may be skipped.
        found = [] if state.logprobs_due else pool.match_prefix(state.tokens, state.chain)
        pool.acquire(found)
        # One page is left to every running sequence, or the newcomer would soon be preempted again. So a sequence
        # that was preempted in this very step does not come back in it either.
        needed = pool.pages_for(len(state.tokens)) - len(found)
        fresh = pool.allocate(needed) if needed + len(self._running) <= pool.num_free or not self._running else None
        if fresh is None:
            pool.release(found)
            return False
        self._waiting.popleft()
        self._running.append(state)
        state.pages = found + fresh
        state.published_pages = len(found)
        state.planned = state.computed = len(found) * pool.page_size
        self._outstanding -= state.computed
        if not state.scheduled:
            state.scheduled = True
            state.num_cached_tokens = state.computed
            if pool.prefix_caching and not state.logprobs_due:
                self._prefix_query_tokens += len(state.tokens)
                self._prefix_hit_tokens += state.computed
        return True

    def _preempt(self, state: SequenceState) -> None:
        assert self._running[-1] is state
        assert len(self._running) > 1, f"request {state.request.id} alone outgrew the cache that `add` measured"
        self._running.pop()
        self._waiting.appendleft(state)
        self.pool.release(state.pages)
        self._outstanding += state.computed
        self._num_preemptions += 1
        state.num_preemptions += 1
        state.stale = state.in_flight
        state.pages = []
        state.planned = state.computed = state.published_pages = 0

    # -- results

    def sample_rows(self, plan: StepPlan) -> list[SampleRow]:
        """One row per chunk with `sample`, in the plan's order; ended requests get a greedy stand-in."""
        rows: list[SampleRow] = []
        for chunk in plan.chunks:
            if chunk.sample:
                state = self._live.get(chunk.request_id)
                if state is None:
                    rows.append(SampleRow(chunk.request_id, _STAND_IN, [], 0))
                else:
                    rows.append(SampleRow(chunk.request_id, state.request.params, state.tokens, state.prompt_len))
        return rows

    def commit(
        self, plan: StepPlan, sampled: Mapping[int, int], *, failed: Mapping[int, str] | None = None
    ) -> list[Finished]:
        """Record that `plan` ran: `sampled` has the token of every chunk with `sample` (by request id).

        `failed` requests (id → why) end with "abort"; nothing they computed is found again. Plans are committed in the
        order in which they were planned. Chunks of requests that ended meanwhile are ignored.
        """
        failed = failed or {}
        finished: list[Finished] = []
        for chunk in plan.chunks:
            state = self._live.get(chunk.request_id)
            if state is None:
                continue
            state.in_flight -= 1
            if chunk.num_logits > chunk.sample:
                state.prompt_logits = chunk.start + len(chunk.token_ids)
            if state.stale:
                state.stale -= 1
            else:
                self._advance(state, chunk)
            if chunk.request_id in failed:
                self.pool.forget(state.pages)
                finished.append(Finished(chunk.request_id, "abort", error=failed[chunk.request_id]))
            elif chunk.sample:
                state.pending -= 1
                if (end := self._append(state, sampled[chunk.request_id])) is None:
                    continue
                finished.append(end)
            else:
                continue
            self._remove(state)
        return finished

    def _advance(self, state: SequenceState, chunk: SequenceChunk) -> None:
        count = len(chunk.token_ids)
        state.computed += count
        self._outstanding -= count
        full = state.computed // self.pool.page_size
        if full > state.published_pages:
            self.pool.commit(state.pages, state.tokens, state.chain, first=state.published_pages, last=full)
            state.published_pages = full

    def _append(self, state: SequenceState, token: int) -> Finished | None:
        state.tokens.append(token)
        request = state.request
        if state.num_output >= request.params.min_tokens:
            if token in state.eos_ids:
                return Finished(request.id, "stop")
            if token in state.stop_ids:
                return Finished(request.id, "stop", token)
        return Finished(request.id, "length") if state.num_output >= state.max_tokens else None

    def _remove(self, state: SequenceState) -> None:
        del self._live[state.request.id]
        (self._running if state.pages else self._waiting).remove(state)
        self.pool.release(state.pages)
        self._outstanding -= state.prompt_len + state.max_tokens - state.computed


_STAND_IN = SamplingParams(temperature=0.0)
