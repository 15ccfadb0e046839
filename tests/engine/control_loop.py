"""The whole control loop without tensors: balancer, schedulers, agreement and a fake model under random traffic.

The fake model keeps, in the cache row of every token, a hash of the history up to it, and checks every row that a chunk
would attend to. So a page shared wrongly, freed too early, or recomputed wrongly changes tokens or fails at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_runtime.cache.pages import PagePool
from moe_runtime.engine.lockstep import GroupBalancer, LockstepLimits, Padding, Wish, agree
from moe_runtime.engine.plan import PENDING, ChunkKind, StepPlan
from moe_runtime.engine.request import Request
from moe_runtime.engine.scheduler import Finished, Scheduler
from moe_runtime.engine.sequence import SchedulerLimits
from moe_runtime.errors import RequestError

VOCAB = 5
EOS = 0
MASK = (1 << 61) - 1


def mix(state: int, token: int) -> int:
    return (state * 6364136223846793005 + (token + 11) * 1442695040888963407) & MASK


def next_token(state: int) -> int:
    return (state >> 23) % VOCAB


def oracle(request: Request) -> list[int]:
    """The request alone, one token after the other."""
    params = request.params
    state, output = 1, list[int]()
    for token in request.prompt_token_ids:
        state = mix(state, token)
    while params.max_tokens is None or len(output) < params.max_tokens:
        token = next_token(state)
        output.append(token)
        state = mix(state, token)
        stops = set(params.stop_ids) | (set() if params.ignore_eos else {EOS})
        if token in stops and len(output) >= params.min_tokens:
            break
    return output


@dataclass
class FakeRunner:
    """Runs plans on one group's cache rows; `rows[page][slot]` is the hash of the history up to that token."""

    page_size: int
    num_pages: int
    rows: list[list[int | None]] = field(init=False)
    last: dict[int, int] = field(default_factory=dict)
    logit_positions: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = [[None] * self.page_size for _ in range(self.num_pages)]

    def run(self, plan: StepPlan, histories: dict[int, list[int]], prompt_lens: dict[int, int]) -> dict[int, int]:
        sampled: dict[int, int] = {}
        seen: set[int] = set()
        for chunk in plan.chunks:
            assert chunk.request_id not in seen, "two chunks of one request in a step"
            seen.add(chunk.request_id)
            tokens = [self.last[chunk.request_id] if token == PENDING else token for token in chunk.token_ids]
            history = histories[chunk.request_id]
            state = 1
            for position in range(chunk.start):
                state = mix(state, history[position])
                page = chunk.pages[position // self.page_size]
                assert self.rows[page][position % self.page_size] == state, "attends to a row of another history"
            for position, token in enumerate(tokens, start=chunk.start):
                state = mix(state, token)
                self.rows[chunk.pages[position // self.page_size]][position % self.page_size] = state
                assert (position < prompt_lens[chunk.request_id]) == (chunk.kind == ChunkKind.PREFILL)
            wanted = range(chunk.start + chunk.logit_start, chunk.start + len(tokens) - chunk.sample)
            self.logit_positions.setdefault(chunk.request_id, []).extend(wanted)
            if chunk.sample:
                sampled[chunk.request_id] = self.last[chunk.request_id] = next_token(state)
        return sampled


@dataclass
class Group:
    scheduler: Scheduler
    runner: FakeRunner
    in_flight: deque[StepPlan] = field(default_factory=deque)


@dataclass
class Traffic:
    """`arrivals[i]`: the step at which request i comes; `aborts[i]`: the step at which it is taken back, if ever."""

    requests: list[Request]
    arrivals: list[int]
    aborts: list[int | None]
    num_groups: int
    num_pages: int
    page_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    prefix_caching: bool
    depth: int
    """Plans in flight: 1 = serial, 2 = step n+1 is planned before step n is committed."""


class Loop:
    """World rank 0's requests over `num_groups` schedulers in lockstep."""

    def __init__(self, traffic: Traffic, make_scheduler: Callable[[SchedulerLimits, PagePool], Scheduler]) -> None:
        self.traffic = traffic
        limits = SchedulerLimits(
            max_num_batched_tokens=traffic.max_num_batched_tokens,
            max_num_seqs=traffic.max_num_seqs,
            max_model_len=64,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
        )
        self.groups = [
            Group(
                make_scheduler(
                    limits, PagePool(traffic.num_pages, traffic.page_size, prefix_caching=traffic.prefix_caching)
                ),
                FakeRunner(traffic.page_size, traffic.num_pages),
            )
            for _ in range(traffic.num_groups)
        ]
        self.lockstep = LockstepLimits(tp=2, padding=Padding.AUTO, max_tokens=2, max_decode_tokens=2)
        self.balancer = GroupBalancer(traffic.num_groups)
        self.home: dict[int, Group] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ended: dict[int, Finished] = {}
        self.refused: set[int] = set()

    def run(self) -> None:
        work = sum(
            len(request.prompt_token_ids) + (request.params.max_tokens or 0) for request in self.traffic.requests
        )
        # Alone, a request takes a step per token; preemption repeats at most what a longer-lived one outlasts.
        for step in range(20 + 4 * work):
            self._arrivals_and_aborts(step)
            if self._step(step):
                return
        raise AssertionError("deadlock or livelock: the loop does not end")

    def _arrivals_and_aborts(self, step: int) -> None:
        for request, arrival, abort in zip(
            self.traffic.requests, self.traffic.arrivals, self.traffic.aborts, strict=True
        ):
            if arrival == step:
                group = self.groups[
                    self.balancer.assign(len(request.prompt_token_ids) + (request.params.max_tokens or 0))
                ]
                try:
                    group.scheduler.add(request)
                except RequestError:
                    self.refused.add(request.id)
                    continue
                self.home[request.id] = group
                self.outputs[request.id] = []
            if abort == step and request.id in self.home and self.home[request.id].scheduler.abort(request.id):
                self.ended[request.id] = Finished(request.id, "abort")

    def _step(self, step: int) -> bool:
        plans = [group.scheduler.plan() for group in self.groups]
        rows = [
            Wish(step, plan.num_tokens, plan.num_decode_tokens, group.scheduler.outstanding_tokens)
            for plan, group in zip(plans, self.groups, strict=True)
        ]
        agreed = agree(rows, limits=self.lockstep)
        assert agreed.num_tokens == sum(plan.num_tokens for plan in plans)
        self.balancer.report(agreed.outstanding, [0] * len(self.groups))
        for group, plan in zip(self.groups, plans, strict=True):
            self._check_plan(plan)
            group.in_flight.append(StepPlan.from_ints(plan.to_ints()))
            if len(group.in_flight) >= self.traffic.depth:
                self._finish_one(group)
        finished = step > max(self.traffic.arrivals, default=0) and not any(agreed.outstanding)
        if finished:
            for group in self.groups:
                while group.in_flight:
                    self._finish_one(group)
        return finished

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.traffic.max_num_batched_tokens
        assert len(plan.chunks) <= self.traffic.max_num_seqs
        assert [chunk.kind for chunk in plan.chunks] == sorted(chunk.kind for chunk in plan.chunks)
        written = [
            (chunk.pages[position // self.traffic.page_size], position)
            for chunk in plan.chunks
            for position in range(chunk.start, chunk.start + len(chunk.token_ids))
        ]
        assert len(written) == len(set(written)), "two tokens share a cache row"

    def _finish_one(self, group: Group) -> None:
        plan = group.in_flight.popleft()
        by_id = {request.id: request for request in self.traffic.requests}
        histories = {key: [*by_id[key].prompt_token_ids, *output] for key, output in self.outputs.items()}
        lens = {key: len(by_id[key].prompt_token_ids) for key in histories}
        sampled = group.runner.run(plan, histories, lens)
        for key, token in sampled.items():
            if key not in self.ended:
                self.outputs[key].append(token)
        for end in group.scheduler.commit(plan, sampled):
            assert end.request_id not in self.ended, "ended twice"
            self.ended[end.request_id] = end

    def check(self) -> None:
        for request in self.traffic.requests:
            if request.id in self.refused or request.id not in self.home:
                continue
            expected, got = oracle(request), self.outputs[request.id]
            if self.ended[request.id].reason == "abort":
                assert got == expected[: len(got)]
                continue
            assert got == expected, f"request {request.id}"
            if request.params.prompt_logprobs is not None:
                positions = self.home[request.id].runner.logit_positions[request.id]
                assert positions == list(range(len(request.prompt_token_ids) - 1)), "prompt logits once, in order"
        for group in self.groups:
            assert group.scheduler.outstanding_tokens == 0
            assert group.scheduler.pool.num_free == self.traffic.num_pages, "a page leaked"


def run_and_check(loop: Loop) -> None:
    loop.run()
    loop.check()
