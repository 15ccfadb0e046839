"""What users ask for and what they get back, and the pickle-free encoding of requests for the control plane."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from moe_runtime.errors import RequestError, nearest

FinishReason = Literal["stop", "length", "abort"]

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 1024
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by less gains nothing and overflows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names, defaults and meaning are vLLM's. Invalid values: RequestError.

    n: completions per prompt. temperature: 0 = greedy. top_k: keep the k likeliest (0 or -1 = all). top_p: keep the
    smallest set of this probability mass. min_p: drop what is less likely than this times the likeliest.
    repetition_penalty: over prompt and output, > 1 discourages; presence_penalty and frequency_penalty: over the
    output, in -2..2. seed: same seed and prompt, same tokens, whoever else is in the batch; None = drawn from the
    engine's seed and the request's number. logprobs / prompt_logprobs: this many likeliest tokens per position, beside
    the token itself (0 = the token alone, None = none). stop: texts that end the output and are cut from it (kept with
    include_stop_str_in_output); stop_token_ids: tokens that do. max_tokens: None = up to the model's length.
    min_tokens: no stop before. ignore_eos: the end-of-text token does not stop. skip_special_tokens: leave them out
    of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _sequence("stop", stop, str))
        object.__setattr__(self, "stop_token_ids", _sequence("stop_token_ids", self.stop_token_ids, int))
        _integer("n", self.n, 1, MAX_COMPLETIONS)
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, -1, None)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("min_tokens", self.min_tokens, 0, None)
        for name, low, high in (
            ("seed", -MAX_SEED - 1, MAX_SEED),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("max_tokens", 1, None),
        ):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, low, high)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}: "
                f"min_tokens must be at most max_tokens (set max_tokens={self.min_tokens} or more)"
            )
        for text in self.stop_strings:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise RequestError(f"stop has a text of {len(text)} characters: it must have 1..{MAX_STOP_CHARS}")
        for token in self.stop_ids:
            _integer("stop_token_ids", token, 0, None)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.stop_token_ids if isinstance(self.stop_token_ids, tuple) else ()

    def completions(self) -> tuple[SamplingParams, ...]:
        """One `n=1` copy per completion; a given seed counts up so that the completions differ."""
        if self.n == 1:
            return (self,)
        seeds = [None if self.seed is None else (self.seed + j) % MAX_SEED for j in range(self.n)]
        return tuple(replace(self, n=1, seed=seed) for seed in seeds)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. `id` is unique in the engine and grows in order of arrival.

    Requests of different `cache_salt` never share cached pages (a tenant's secret, for instance).
    """

    id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "prompt_token_ids", tuple(map(operator.index, self.prompt_token_ids)))
        except TypeError:
            raise RequestError("a prompt of token ids must be a list of integers") from None


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log of the model's own probability (before temperature and penalties); `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""By token id: the token itself and the likeliest ones."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """`stop_reason`: the stop text or stop token id that ended it; None for end-of-text, length and abort."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds on the owner's monotonic clock, None where the event has not come."""

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def queue_time_s(self) -> float | None:
        return None if self.scheduled_time is None else self.scheduled_time - self.arrival_time

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if self.finish_time is None or self.first_token_time is None or self.num_output_tokens < 2:
            return None
        return (self.finish_time - self.first_token_time) / (self.num_output_tokens - 1)

    @property
    def latency_s(self) -> float | None:
        """Arrival to last token."""
        return None if self.finish_time is None else self.finish_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """`prompt` is None where token ids were given. `prompt_logprobs[0]` is None: nothing precedes the first token."""

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool


def encode_requests(requests: Iterable[Request]) -> bytes:
    """JSON; parameters at their defaults are left out."""
    rows: list[dict[str, object]] = []
    for request in requests:
        row: dict[str, object] = {"id": request.id, "prompt_token_ids": request.prompt_token_ids}
        if params := _non_defaults(request.params):
            row["params"] = params
        if request.cache_salt:
            row["cache_salt"] = request.cache_salt
        rows.append(row)
    return json.dumps(rows, separators=(",", ":")).encode() if rows else b""


def decode_requests(payload: bytes) -> list[Request]:
    """The inverse of `encode_requests`; parameters are validated again. RequestError where the payload is not one."""
    if not payload:
        return []
    try:
        return [_request(row) for row in json.loads(payload)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"not an encoded list of requests: {error}") from error


def parse_params(values: Mapping[str, object]) -> SamplingParams:
    """SamplingParams from plain data (configuration, JSON). RequestError names an unknown key and its neighbour."""
    names = [item.name for item in fields(SamplingParams)]
    for key in values:
        if key not in names:
            raise RequestError(f"unknown sampling parameter {key!r}.{nearest(key, names)}")
    return SamplingParams(**values)  # type: ignore[arg-type]  # every value is checked in __post_init__


def _request(row: Mapping[str, Any]) -> Request:
    return Request(
        row["id"], tuple(row["prompt_token_ids"]), parse_params(row.get("params", {})), row.get("cache_salt", "")
    )


def _non_defaults(params: SamplingParams) -> dict[str, object]:
    if params == _DEFAULTS:
        return {}
    return {
        item.name: value
        for item in fields(params)
        if (value := getattr(params, item.name)) != getattr(_DEFAULTS, item.name)
    }


def _sequence(name: str, value: object, kind: type) -> tuple[object, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > MAX_STOPS:
        raise RequestError(f"{name} is {value!r:.60}: it must be a list of at most {MAX_STOPS} {kind.__name__} values")
    for item in value:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise RequestError(f"{name} holds {item!r}: every entry must be of type {kind.__name__}")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    allowed = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: it must be {allowed}")
    if value < low or (high is not None and value > high):
        nearby = low if value < low else high
        raise RequestError(f"{name} is {value}: it must be {allowed}; the nearest valid value is {nearby}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    allowed = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}: it must be a finite number {allowed}")
    if value < low or value > high or (open_low and value == low):
        bound = high if value > high else low
        nearby = f"; the nearest valid value is {bound:g}" if bound == high or not open_low else ""
        raise RequestError(f"{name} is {value!r}: it must be {allowed}{nearby}")


_DEFAULTS = SamplingParams()
