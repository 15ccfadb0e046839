"""The whole control loop without tensors, under random traffic: no deadlock, nothing lost, nothing shared wrongly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.engine.request import Request, SamplingParams
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.sequence import SequenceState
from tests.engine.control_loop import VOCAB, Loop, Traffic, run_and_check


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    count = draw(st.integers(1, 8))
    shared = draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=12))  # so that prefixes meet
    requests: list[Request] = []
    for key in range(count):
        own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
        max_tokens = draw(st.integers(1, 20))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, max_tokens)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([None, None, [2]])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        )
        prompt = shared[: draw(st.integers(0, len(shared)))] + own
        requests.append(Request(key, tuple(prompt), params, draw(st.sampled_from(["", "", "", "salt"]))))
    page_size = draw(st.integers(1, 4))
    # A pool that the longest request just fits, or just not: whatever runs beside it gets preempted.
    longest = max(len(request.prompt_token_ids) + (request.params.max_tokens or 0) - 1 for request in requests)
    max_num_seqs = draw(st.integers(1, 5))
    return Traffic(
        requests,
        arrivals=sorted(draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))),
        aborts=draw(st.lists(st.sampled_from([None, None, 3, 8, 15, 30]), min_size=count, max_size=count)),
        num_groups=draw(st.integers(1, 3)),
        num_pages=max(1, -(-longest // page_size) + draw(st.integers(-1, 4))),
        page_size=page_size,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 12)),
        max_num_seqs=max_num_seqs,
        prefix_caching=draw(st.booleans()),
        depth=draw(st.integers(1, 3)),
    )


@settings(deadline=None, derandomize=True, max_examples=400)
@given(traffic=traffics())
def test_no_deadlock_and_the_tokens_of_a_request_alone(traffic: Traffic) -> None:
    run_and_check(Loop(traffic, Scheduler))


def crowded(depth: int) -> Traffic:
    """Six requests of one prefix whose outputs outgrow the pool together: preemptions and prefix hits for certain."""
    requests = [
        Request(key, (1, 2, 3, 4, 1, 2, 3, 4, key % 4 + 1), SamplingParams(max_tokens=16, ignore_eos=True))
        for key in range(6)
    ]
    return Traffic(
        requests,
        arrivals=[0, 0, 1, 1, 2, 9],
        aborts=[None] * 6,
        num_groups=1,
        num_pages=13,
        page_size=4,
        max_num_batched_tokens=12,
        max_num_seqs=4,
        prefix_caching=True,
        depth=depth,
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preemption_loses_nothing(depth: int) -> None:
    loop = Loop(crowded(depth), Scheduler)
    run_and_check(loop)
    stats = loop.groups[0].scheduler.stats
    assert stats.num_preemptions > 0
    assert stats.prefix_hit_tokens > 0


class DropsLastTokenAtPreemption(Scheduler):
    def _preempt(self, state: SequenceState) -> None:
        super()._preempt(state)
        if state.num_output:
            state.tokens.pop()


class KeepsPagesAtPreemption(Scheduler):
    def _preempt(self, state: SequenceState) -> None:
        pages = list(state.pages)
        super()._preempt(state)
        self.pool.acquire(pages[:1])


class ServesOneTokenTooManyFromTheCache(Scheduler):
    def _admit_next(self) -> bool:
        admitted = super()._admit_next()
        if admitted and self._running[-1].planned:
            self._running[-1].planned += 1
        return admitted


@pytest.mark.parametrize(
    "mutant", [DropsLastTokenAtPreemption, KeepsPagesAtPreemption, ServesOneTokenTooManyFromTheCache]
)
def test_the_simulation_notices(mutant: type[Scheduler]) -> None:
    with pytest.raises((AssertionError, IndexError, KeyError)):
        run_and_check(Loop(crowded(1), mutant))
