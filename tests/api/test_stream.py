"""LLM.stream: outputs that grow, and streams that are left early."""

from __future__ import annotations

from itertools import pairwise

from moe_runtime import LLM, SamplingParams
from tests.api.tiny import (
    greedy,
    wait_until_idle,
)


def test_stream_grows_token_by_token(llm: LLM) -> None:
    (whole,) = llm.generate([[5, 6, 7]], greedy(6))
    updates = list(llm.stream([5, 6, 7], greedy(6)))
    assert [len(update.outputs[0].token_ids) for update in updates] == [1, 2, 3, 4, 5, 6]
    assert [update.finished for update in updates] == [False] * 5 + [True]
    assert updates[-1].outputs == whole.outputs
    texts = [update.outputs[0].text for update in updates]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_streams_of_several_completions(llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
    updates = list(llm.stream([5, 6, 7], params))
    assert updates[-1].finished
    assert not any(update.finished for update in updates[:-1])
    assert updates[-1].outputs == llm.generate([[5, 6, 7]], params)[0].outputs


def test_a_dropped_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], greedy(200))
    next(stream)
    assert llm.snapshot().num_live_requests == 1
    del stream
    wait_until_idle(llm)
    unread = llm.stream([5, 6, 7], greedy(200))
    unread.close()
    unread.close()
    assert list(unread) == []
    wait_until_idle(llm)
