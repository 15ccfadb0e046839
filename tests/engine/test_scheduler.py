"""Scheduler: what a step holds, who waits, who is preempted, what ends a request."""

from __future__ import annotations

import pytest

from moe_runtime.cache.pages import PagePool
from moe_runtime.engine.plan import PENDING, ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.request import Request, SamplingParams
from moe_runtime.engine.scheduler import Finished, Scheduler
from moe_runtime.engine.sequence import SchedulerLimits
from moe_runtime.errors import ConfigError, RequestError

EOS = 0


def make(
    *, pages: int = 64, page_size: int = 4, tokens: int = 32, seqs: int = 8, length: int = 128, caching: bool = True
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=length, vocab_size=100, eos_token_ids=(EOS,)
    )
    return Scheduler(limits, PagePool(pages, page_size, prefix_caching=caching))


def request(key: int, length: int, max_tokens: int = 8, **params: object) -> Request:
    return Request(
        key,
        tuple((key * 31 + i) % 99 + 1 for i in range(length)),
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )


def run(scheduler: Scheduler, token: int = 50) -> tuple[StepPlan, list[Finished]]:
    plan = scheduler.plan()
    return plan, scheduler.commit(plan, {chunk.request_id: token for chunk in plan.chunks if chunk.sample})


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(chunk.request_id, chunk.start, len(chunk.token_ids), chunk.sample) for chunk in plan.chunks]


def test_chunked_prefill_and_mixed_steps() -> None:
    scheduler = make(tokens=10)
    scheduler.add(request(1, 6))
    scheduler.add(request(2, 12))
    assert shape(run(scheduler)[0]) == [(1, 0, 6, True), (2, 0, 4, False)]
    scheduler.add(request(3, 3))
    plan, _ = run(scheduler)
    assert shape(plan) == [(1, 6, 1, True), (2, 4, 8, True), (3, 0, 1, False)]
    assert [chunk.kind for chunk in plan.chunks] == [ChunkKind.DECODE, ChunkKind.PREFILL, ChunkKind.PREFILL]
    assert [chunk.logit_start for chunk in plan.chunks] == [0, 7, 1]
    assert (plan.num_tokens, plan.num_decode_tokens) == (10, 1)
    assert shape(run(scheduler)[0]) == [(1, 7, 1, True), (2, 12, 1, True), (3, 1, 2, True)]


def test_max_num_seqs() -> None:
    scheduler = make(seqs=2)
    for key in range(3):
        scheduler.add(request(key, 3, max_tokens=2))
    assert [row[0] for row in shape(run(scheduler)[0])] == [0, 1]
    _, finished = run(scheduler)
    assert finished == [Finished(0, "length"), Finished(1, "length")]
    assert shape(run(scheduler)[0]) == [(2, 0, 3, True)]


def test_prefix_hits_skip_full_pages() -> None:
    scheduler = make()
    scheduler.add(Request(1, tuple(range(1, 11)), SamplingParams(max_tokens=1)))
    run(scheduler)
    scheduler.add(Request(2, tuple(range(1, 11)), SamplingParams(max_tokens=1)))
    scheduler.add(Request(3, tuple(range(1, 11)), SamplingParams(max_tokens=1, prompt_logprobs=1)))
    scheduler.add(Request(4, tuple(range(1, 11)), SamplingParams(max_tokens=1), cache_salt="mine"))
    plan, _ = run(scheduler)
    assert shape(plan) == [(2, 8, 2, True), (3, 0, 10, True), (4, 0, 10, True)]
    assert [chunk.num_logits for chunk in plan.chunks] == [1, 10, 1]
    stats = scheduler.stats
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (30, 8), "3 was not looked up"


def test_prompt_logprobs_cover_every_position_once() -> None:
    scheduler = make(tokens=4, seqs=4)
    scheduler.add(request(1, 10, prompt_logprobs=0))
    rows = [(chunk.start + chunk.logit_start, chunk.start + len(chunk.token_ids)) for chunk in _prefill(scheduler)]
    assert rows == [(0, 4), (4, 8), (8, 10)]


def test_prompt_logprobs_cover_every_position_once_after_a_preemption_among_them() -> None:
    scheduler = make(pages=12, tokens=5, seqs=2, caching=False)
    scheduler.add(request(1, 3, max_tokens=9))
    scheduler.add(request(2, 40, max_tokens=1, prompt_logprobs=0))
    chunks: list[SequenceChunk] = []
    while scheduler.outstanding_tokens:
        chunks += [chunk for chunk in run(scheduler)[0].chunks if chunk.request_id == 2]
    assert scheduler.stats.num_preemptions == 1
    assert sum(chunk.start == 0 for chunk in chunks) == 2, "computed again from its beginning"
    wanted = [range(chunk.start + chunk.logit_start, chunk.start + len(chunk.token_ids)) for chunk in chunks]
    assert [len(positions) for positions in wanted] == [chunk.num_logits for chunk in chunks]
    assert [position for positions in wanted for position in positions] == list(range(40))


def test_preempted_sequences_do_not_count_as_prefix_hits() -> None:
    scheduler = make(pages=4)
    scheduler.add(request(1, 4, max_tokens=12))
    scheduler.add(request(2, 4, max_tokens=8))
    while scheduler.outstanding_tokens:
        run(scheduler)
    stats = scheduler.stats
    assert stats.num_preemptions > 0
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (8, 0)


def _prefill(scheduler: Scheduler) -> list[SequenceChunk]:
    chunks: list[SequenceChunk] = []
    while not chunks or not chunks[-1].sample:
        chunks += run(scheduler)[0].chunks
    return chunks


def test_preemption_keeps_tokens_and_recomputes_prompt_and_output_apart() -> None:
    scheduler = make(pages=4, caching=False)
    scheduler.add(request(1, 4, max_tokens=12))
    scheduler.add(request(2, 4, max_tokens=8))
    for token in (11, 12, 13, 14, 15):
        run(scheduler, token)
    plan, _ = run(scheduler, 16)  # both need a third page, none is left: the later one goes
    assert shape(plan) == [(1, 8, 1, True)]
    assert scheduler.stats.num_preemptions == 1
    state = scheduler.sequence(2)
    assert state is not None
    assert state.tokens[state.prompt_len :] == [11, 12, 13, 14, 15]
    while (plan := run(scheduler, 17)[0]).chunks[-1].request_id == 1:
        assert len(plan.chunks) == 1
    assert shape(plan) == [(2, 0, 4, False)]
    plan, _ = run(scheduler, 18)
    assert shape(plan) == [(2, 4, 5, True)]
    assert plan.chunks[0].kind == ChunkKind.DECODE
    assert plan.chunks[0].token_ids == (11, 12, 13, 14, 15)
    assert plan.num_decode_tokens == 0, "a recomputed sequence does not make a step a decode step"


def test_the_preempted_one_comes_back_before_those_that_wait() -> None:
    scheduler = make(pages=4, page_size=4, seqs=2, caching=False)
    for key in (1, 2, 3):
        scheduler.add(request(key, 4, max_tokens=12 if key == 1 else 6))
    order: list[int] = []
    while scheduler.outstanding_tokens:
        order += [chunk.request_id for chunk in run(scheduler)[0].chunks if chunk.kind == ChunkKind.PREFILL]
    assert order == [1, 2, 2, 3]


def test_a_newcomer_leaves_a_page_to_everyone_who_runs() -> None:
    scheduler = make(pages=4, page_size=4, caching=False)
    scheduler.add(request(1, 8))
    scheduler.add(request(2, 8))
    assert [row[0] for row in shape(run(scheduler)[0])] == [1], "the two pages left would not let 1 grow"
    scheduler.add(request(3, 1))
    assert [row[0] for row in shape(run(scheduler)[0])] == [1], "3 would fit, but 2 came first"


def test_a_preempted_sequence_waits_for_its_sample_in_flight() -> None:
    scheduler = make(pages=6, page_size=1, caching=False)
    scheduler.add(request(1, 2, max_tokens=4))
    scheduler.add(request(2, 1, max_tokens=5))
    plans = [scheduler.plan() for _ in range(3)]
    assert [shape(plan) for plan in plans[1:]] == [[(1, 2, 1, True), (2, 1, 1, True)], [(1, 3, 1, True)]]
    scheduler.abort(1)
    assert scheduler.plan() == StepPlan(), "two samples of 2 are still to come"
    assert scheduler.commit(plans[0], {1: 7, 2: 7}) == []
    assert scheduler.plan() == StepPlan()
    assert scheduler.commit(plans[1], {1: 8, 2: 8}) == []
    assert shape(scheduler.plan()) == [(2, 0, 1, False)]


def test_what_ends_a_request() -> None:
    scheduler = make()
    scheduler.add(request(1, 2))
    scheduler.add(request(2, 2, ignore_eos=True, max_tokens=2))
    scheduler.add(request(3, 2, stop_token_ids=[EOS], ignore_eos=True))
    scheduler.add(request(4, 2, min_tokens=2))
    assert run(scheduler, EOS)[1] == [Finished(1, "stop"), Finished(3, "stop", EOS)]
    assert run(scheduler, EOS)[1] == [Finished(2, "length"), Finished(4, "stop")]
    assert scheduler.outstanding_tokens == 0
    assert scheduler.plan() == StepPlan()


@pytest.mark.parametrize("max_tokens", [None, 5, 6, 10**6])
@pytest.mark.parametrize(("length", "pages"), [(8, 64), (128, 7)])
def test_the_models_length_ends_every_request_and_the_cache_those_of_no_length(
    max_tokens: int | None, length: int, pages: int
) -> None:
    scheduler = make(length=length, pages=pages, page_size=1)
    asked = Request(1, (1, 2, 3), SamplingParams(max_tokens=max_tokens))
    if pages == 7 and max_tokens in (6, 10**6):
        with pytest.raises(RequestError, match=r"the cache has 7 \(set max_tokens=5 or less"):
            scheduler.add(asked)
        return
    scheduler.add(asked)
    assert scheduler.outstanding_tokens == 3 + 5
    ends = [end for _ in range(5) for end in run(scheduler)[1]]
    assert ends == [Finished(1, "length")]


def test_failed_logits_end_the_request_and_are_not_cached() -> None:
    scheduler = make()
    scheduler.add(request(1, 9))
    scheduler.add(request(2, 9))
    plan = scheduler.plan()
    assert scheduler.commit(plan, {2: 5}, failed={1: "not finite"}) == [Finished(1, "abort", error="not finite")]
    scheduler.add(request(1, 9))
    assert (1, 0, 9, True) in shape(scheduler.plan())


def test_abort_frees_pages_at_once_running_or_waiting() -> None:
    scheduler = make(pages=3)
    scheduler.add(request(1, 8, max_tokens=4))
    scheduler.add(request(2, 8, max_tokens=4))
    run(scheduler)
    assert scheduler.abort(2)
    assert not scheduler.abort(2)
    assert scheduler.abort(1)
    assert scheduler.pool.num_free == 3
    assert scheduler.outstanding_tokens == 0


def test_outstanding_tokens_count_down_to_zero() -> None:
    scheduler = make()
    scheduler.add(request(1, 5, max_tokens=3))
    seen = [scheduler.outstanding_tokens]
    while scheduler.outstanding_tokens:
        run(scheduler)
        seen.append(scheduler.outstanding_tokens)
    assert seen == [8, 3, 2, 0]


def test_a_step_can_be_planned_before_the_last_is_committed() -> None:
    scheduler = make()
    scheduler.add(request(1, 4, max_tokens=3))
    first, second = scheduler.plan(), scheduler.plan()
    assert shape(second) == [(1, 4, 1, True)]
    assert second.chunks[0].token_ids == (PENDING,)
    assert scheduler.commit(first, {1: 7}) == []
    third = scheduler.plan()
    assert third.chunks[0].token_ids == (PENDING,)
    assert scheduler.plan() == StepPlan(), "max_tokens is known beforehand"
    assert scheduler.commit(second, {1: EOS}) == [Finished(1, "stop")]
    assert scheduler.commit(third, {1: 9}) == [], "the chunk of a request that ended is ignored"
    assert scheduler.pool.num_free == 64


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "the prompt is empty"),
        ((1, 100), {}, r"token id 100: ids must be in 0..99"),
        ((-1,), {}, r"token id -1: ids must be in 0..99"),
        ((1,) * 32, {}, r"the prompt has 32 tokens: it must have at most 31, one less than engine.max_model_len=32"),
        (
            (1,) * 10,
            {"max_tokens": 12},
            r"needs 6 pages of 4 tokens: the cache has 5 \(set max_tokens=11 or less, or raise",
        ),
        ((1,) * 22, {"max_tokens": 1}, r"needs 6 pages of 4 tokens: the cache has 5 \(raise engine.kv_cache_bytes"),
        ((1,), {"stop_token_ids": [100]}, r"stop_token_ids holds 100"),
    ],
)
def test_what_can_never_run_is_refused(prompt: tuple[int, ...], params: dict[str, object], message: str) -> None:
    scheduler = make(pages=5, length=32)
    with pytest.raises(RequestError, match=message):
        scheduler.add(Request(1, prompt, SamplingParams(**params)))  # type: ignore[arg-type]
    assert not scheduler.outstanding_tokens


def test_what_just_fits_runs() -> None:
    scheduler = make(pages=5, length=32)
    scheduler.add(request(1, 10, max_tokens=11))
    assert [end for _ in range(11) for end in run(scheduler)[1]] == [Finished(1, "length")]


def test_limits_are_checked() -> None:
    with pytest.raises(AssertionError, match="takes a token per step"):
        make(tokens=4)
    with pytest.raises(ConfigError, match="max_model_len=0"):
        make(length=0)
