"""SamplingParams' checks, and requests over the control plane."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.engine.messages import decode_requests, encode_requests
from moe_runtime.engine.request import Request, RequestMetrics, SamplingParams, parse_params
from moe_runtime.errors import RequestError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, r"temperature is -0.5: it must be at least 0; the nearest valid value is 0$"),
        ({"temperature": float("nan")}, "temperature is nan: it must be a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, r"top_p is 0.0: it must be above 0 and at most 1$"),
        ({"top_p": 1.5}, r"top_p is 1.5: it must be above 0 and at most 1; the nearest valid value is 1$"),
        ({"top_k": -2}, r"top_k is -2: it must be an integer of at least -1; the nearest valid value is -1"),
        ({"top_k": 2.5}, "top_k is 2.5: it must be an integer"),
        ({"top_k": True}, "top_k is True"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be above 0$"),
        ({"presence_penalty": 3}, r"presence_penalty is 3: .* the nearest valid value is 2"),
        ({"frequency_penalty": -3}, r"frequency_penalty is -3: .* the nearest valid value is -2"),
        ({"max_tokens": 0}, r"max_tokens is 0: .* the nearest valid value is 1"),
        ({"min_tokens": 9, "max_tokens": 4}, r"min_tokens is 9 but max_tokens is 4.*set max_tokens=9"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 10**6}, r"prompt_logprobs is 1000000: .*1024"),
        ({"n": 0}, "n is 0"),
        ({"seed": 2**63}, "seed is"),
        ({"temperature": 10**400}, r"temperature is an integer of 1329 bits: it must be a finite number at least 0$"),
        ({"max_tokens": 2**63}, r"max_tokens is 9223372036854775808: .* nearest valid value is 9223372036854775807$"),
        ({"top_k": 10**5000}, "top_k is an integer of 16610 bits: it must be an integer of at least -1"),
        ({"stop_token_ids": [10**5000]}, "stop_token_ids is an integer of 16610 bits"),
        ({"stop": [""]}, "stop has a text of 0 characters"),
        ({"stop": [3]}, "stop holds 3"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": ["x"] * 65}, "at most 64"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids holds 'a'"),
        ({"ignore_eos": 1}, "ignore_eos is 1: it must be True or False"),
    ],
)
def test_bad_values_are_refused_with_numbers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.seed) == (16, 0, None, None)
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))
    assert SamplingParams(stop_token_ids={3, 1}).stop_ids == (1, 3)  # type: ignore[arg-type]  # vLLM's users pass sets


def test_unknown_key_names_its_neighbour() -> None:
    with pytest.raises(RequestError, match=r"unknown sampling parameter 'temprature'. Did you mean 'temperature'\?"):
        parse_params({"temprature": 1})


def test_whole_numbers_are_numbers() -> None:
    """Tensors cannot be divided by integers of more than 8 bytes."""
    params = SamplingParams(temperature=10**30, repetition_penalty=2)
    assert (type(params.temperature), type(params.repetition_penalty)) == (float, float)
    assert params == SamplingParams(temperature=1e30, repetition_penalty=2.0)


def test_completions_differ_in_seed() -> None:
    assert [child.seed for child in SamplingParams(n=3, seed=7).completions()] == [7, 8, 9]
    assert SamplingParams(seed=-1).seed is None, "as with vLLM"
    most = 2**63 - 1
    for n in (1, 4):
        for seed in (-(2**63), -3, -2, 0, most - 1, most):
            seeds = [child.seed for child in SamplingParams(n=n, seed=seed).completions()]
            assert seeds[0] == seed
            assert len(set(seeds)) == n
            assert all(value is not None and -(2**63) <= value <= most for value in seeds)
    assert [child.n for child in SamplingParams(n=2).completions()] == [1, 1]


params_strategy = st.builds(
    SamplingParams,
    temperature=st.floats(0, 3),
    top_k=st.integers(-1, 9),
    top_p=st.floats(0.01, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.none() | st.lists(st.integers(0, 9), max_size=3),
    max_tokens=st.none() | st.integers(5, 99),
    min_tokens=st.integers(0, 5),
    logprobs=st.none() | st.integers(0, 5),
    ignore_eos=st.booleans(),
)
request_strategy = st.builds(
    Request,
    st.integers(0, 2**62),
    st.lists(st.integers(0, 2**31), max_size=9).map(tuple),
    params_strategy,
    st.text(max_size=5),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(requests=st.lists(request_strategy, max_size=4))
def test_requests_survive_the_control_plane(requests: list[Request]) -> None:
    assert decode_requests(encode_requests(requests)) == requests


@pytest.mark.parametrize(
    "payload", [b"{", b"[1]", b'[{"id":1}]', b'{"id":1}', b"\xff", b'[{"id":1,"prompt_token_ids":3}]']
)
def test_garbage_is_a_request_error(payload: bytes) -> None:
    with pytest.raises(RequestError, match="not an encoded list of requests"):
        decode_requests(payload)


def test_encoding_is_plain_data() -> None:
    assert encode_requests([]) == b""
    payload = encode_requests([Request(1, (2, 3), SamplingParams(temperature=0))])
    assert payload == b'[{"id":1,"prompt_token_ids":[2,3],"params":{"temperature":0.0}}]'


def test_metrics() -> None:
    metrics = RequestMetrics(1.0, 1.5, 2.0, 5.0, num_output_tokens=7, num_longest_output_tokens=4)
    assert (metrics.queue_time_s, metrics.ttft_s, metrics.tpot_s, metrics.latency_s) == (0.5, 1.0, 1.0, 4.0)
    waiting = RequestMetrics(1.0)
    assert waiting.queue_time_s is waiting.ttft_s is waiting.tpot_s is waiting.latency_s is None
