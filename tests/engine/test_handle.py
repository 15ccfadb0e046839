"""RequestHandle: a text made in the end equals the text made token by token; what is published and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.engine.handle import Completion, RequestHandle
from moe_runtime.engine.messages import TokenResult
from moe_runtime.engine.request import Request, RequestOutput, SamplingParams
from moe_runtime.engine.sampler import TokenLogprobs
from moe_runtime.errors import EngineClosedError

SPECIAL = 256


class Bytes:
    """A token is a byte; 256 is special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        pieces, run = [], bytearray()
        for token in ids:
            if token == SPECIAL:
                pieces += [run.decode(errors="replace"), "" if skip_special_tokens else "<s>"]
                run = bytearray()
            else:
                run.append(token)
        return "".join([*pieces, run.decode(errors="replace")])


def completion(prompt: Sequence[int], params: SamplingParams, *, stream: bool) -> Completion:
    return Completion(0, Request(0, tuple(prompt), params), 0, Bytes(), stream=stream)


token_lists = st.one_of(
    st.text(max_size=12).map(lambda text: list(text.encode())),
    st.lists(st.one_of(st.integers(0, SPECIAL), st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 65])), max_size=40),
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(prompt=token_lists, written=token_lists, skip=st.booleans(), stop=st.booleans(), include=st.booleans())
def test_text_in_the_end_or_on_the_way(
    prompt: list[int], written: list[int], skip: bool, stop: bool, include: bool
) -> None:
    """Up to 64 tokens without a whole character; beyond, a stream gives out what it has."""
    params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=include)
    late, eager = (completion(prompt, params, stream=stream) for stream in (False, True))
    for each in (late, eager):
        for at, token in enumerate(written):
            last = stop and at == len(written) - 1
            each.append(token, TokenResult(0, token, finish_reason="stop" if last else None))
        each.finish("stop" if stop and written else "length")
    assert late.text == eager.text
    assert late.output() == eager.output()


def test_a_stop_text_among_characters_that_were_held_back() -> None:
    each = completion([65], SamplingParams(stop=["\ufffd"]), stream=False)
    each.append(66, TokenResult(0, 66))
    each.append(0xF0, TokenResult(0, 0xF0))
    each.finish("length")
    assert (each.text, each.finish_reason, each.stop_reason) == ("B", "stop", "\ufffd")


def test_text_of_the_token_that_stopped_it() -> None:
    """End-of-text (SPECIAL, without a stop_reason) and stop tokens alike."""
    for stop_reason in (None, SPECIAL):
        for include, expected in ((False, "A"), (True, "A<s>")):
            for stream in (False, True):
                params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=include)
                each = completion([65], params, stream=stream)
                each.append(65, TokenResult(0, 65))
                each.append(SPECIAL, TokenResult(0, SPECIAL, finish_reason="stop", stop_reason=stop_reason))
                each.finish("stop", stop_reason)
                assert each.text == expected


def test_metrics_of_several_completions() -> None:
    params = SamplingParams(max_tokens=3)
    handle = RequestHandle(7, "p", [1, 2], params, stream=True)
    one, two = (Completion(i, Request(7 + i, (1, 2), params), 0, None, stream=True) for i in range(2))
    handle.completions += [one, two]
    handle.apply(one, TokenResult(7, num_cached_tokens=1), began=1.0, now=2.0)
    assert handle.output().metrics.scheduled_time == 1.0
    handle.apply(one, TokenResult(7, 65, num_cached_tokens=1), began=2.0, now=3.0)
    handle.apply(two, TokenResult(8, 65, num_cached_tokens=2, num_preemptions=1), began=2.0, now=3.0)
    metrics = handle.output().metrics
    assert (metrics.num_cached_tokens, metrics.num_preemptions) == (2, 1), "also before the end"
    handle.apply(one, TokenResult(7, 66, finish_reason="stop", num_preemptions=2), began=3.0, now=4.0)
    assert handle.output().metrics.finish_time is None
    handle.apply(two, TokenResult(8, 66, num_preemptions=1), began=3.0, now=4.0)
    handle.apply(two, TokenResult(8, 67, finish_reason="length", num_preemptions=1), began=4.0, now=6.0)
    metrics = handle.output().metrics
    assert (metrics.num_output_tokens, metrics.num_longest_output_tokens, metrics.num_preemptions) == (5, 3, 3)
    assert metrics.tpot_s == (6.0 - 3.0) / 2


def test_a_failure_is_no_stop_reason() -> None:
    params = SamplingParams()
    handle = RequestHandle(7, "p", [1], params)
    handle.completions.append(Completion(0, Request(7, (1,), params), 0, None, stream=False))
    handle.apply(handle.completions[0], TokenResult(7, finish_reason="abort", error="not finite"), began=1.0, now=2.0)
    (output,) = handle.output().outputs
    assert (output.finish_reason, output.stop_reason, output.error) == ("abort", None, "not finite")


def test_publishing() -> None:
    told: list[RequestOutput | None] = []
    params = SamplingParams(max_tokens=2, logprobs=0, prompt_logprobs=0)
    for stream in (False, True):
        told.clear()
        handle = RequestHandle(7, "p", [1, 2], params, stream=stream, decoder=Bytes(), deliver=told.append)
        one = Completion(0, Request(7, (1, 2), params), 0, Bytes(), stream=stream)
        handle.completions.append(one)
        scored = TokenLogprobs((2,), (-0.5,), (1,))
        first = TokenResult(7, 65, TokenLogprobs((65,), (-1.0,), (1,)), (scored,))
        handle.apply(one, first, began=1.0, now=2.0)
        handle.publish()
        assert len(told) == stream, "only streams hear of every token"
        last = TokenResult(7, 66, TokenLogprobs((66,), (-2.0,), (1,)), finish_reason="length", num_cached_tokens=1)
        handle.apply(one, last, began=2.0, now=3.0)
        handle.publish()
        output = handle.read(told[-1])
        assert output.finished
        assert output.outputs[0].text == "AB"
        assert output.outputs[0].cumulative_logprob == -3.0
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert output.prompt_logprobs[1] is not None
        assert output.prompt_logprobs[1][2].logprob == -0.5
        metrics = output.metrics
        assert (metrics.scheduled_time, metrics.first_token_time, metrics.finish_time) == (1.0, 2.0, 3.0)
        assert (metrics.num_output_tokens, metrics.num_cached_tokens, metrics.tpot_s) == (2, 1, 1.0)


def test_a_failure_reaches_the_thread_that_waits() -> None:
    for stream in (False, True):
        handle = RequestHandle(7, "p", [1], SamplingParams(), stream=stream)
        handle.completions.append(completion([1], SamplingParams(), stream=stream))
        handle.error = ValueError("broken")
        handle.abort(1.0)
        handle.publish()
        with pytest.raises(EngineClosedError, match="broken"):
            handle.wait()
