"""What users ask for and what they get back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from moe_runtime.errors import RequestError, nearest

FinishReason = Literal["stop", "length", "abort"]

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 1024
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_INT = 2**63 - 1
"""Of seeds, counts and ids: what fits 8 bytes."""
GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by less gains nothing and overflows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names, defaults and meaning are vLLM's. Invalid values: RequestError.

    n: completions per prompt. temperature: 0 = greedy. top_k: keep the k likeliest (0 or -1 = all). top_p: keep the
    smallest set of this probability mass. min_p: drop what is less likely than this times the likeliest.
    repetition_penalty: over prompt and output, > 1 discourages; presence_penalty and frequency_penalty: over the
    output, in -2..2. seed: same seed and prompt, same draws, and with engine.batch_invariant the same tokens, whoever
    else is in the batch; None or -1 = drawn from the engine's seed and the request's number. logprobs /
    prompt_logprobs: this many likeliest tokens per position, beside the token itself (0 = the token alone, None =
    none). stop: texts that end the output and are cut from it (kept with include_stop_str_in_output); stop_token_ids:
    tokens that do. max_tokens: generation ends at the model's length in any case ("length"); None = there, or where
    the cache is full. min_tokens: no stop before. ignore_eos: the end-of-text token does not stop.
    skip_special_tokens: leave them out of the text.
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
        for number, least, most, above in (
            ("temperature", 0.0, math.inf, False),
            ("top_p", 0.0, 1.0, True),
            ("min_p", 0.0, 1.0, False),
            ("repetition_penalty", 0.0, math.inf, True),
            ("presence_penalty", -2.0, 2.0, False),
            ("frequency_penalty", -2.0, 2.0, False),
        ):
            object.__setattr__(self, number, _number(number, getattr(self, number), least, most, open_low=above))
        _integer("top_k", self.top_k, -1, None)
        _integer("min_tokens", self.min_tokens, 0, None)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        for name, low, high in (
            ("seed", -MAX_INT - 1, MAX_INT),
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
        """One `n=1` copy per completion, the first with the seed as given; it counts up so that they differ."""
        return tuple(replace(self, n=1, seed=self._seed_of(index)) for index in range(self.n))

    def _seed_of(self, completion: int) -> int | None:
        if self.seed is None:
            return None
        seed = self.seed + completion
        seed += self.seed < -1 <= seed  # -1 is passed over: it means none
        return seed if seed <= MAX_INT else seed - 2**64


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. `id` is unique in the engine and grows in order of arrival.

    Requests of different `cache_salt` never share cached pages (a tenant's secret, for instance).
    """

    id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""


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
    """`stop_reason`: the stop text or stop token id that ended it; None for end-of-text, length and abort.

    `error`: why the engine aborted it; None for everything else.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds on the owner's monotonic clock, None where the event has not come.

    `scheduled_time`: the start of the first step that ran tokens of it. Counts: `num_output_tokens` and
    `num_preemptions` over all completions, `num_longest_output_tokens` of the longest, `num_cached_tokens` of the one
    that found most.
    """

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    num_output_tokens: int = 0
    num_longest_output_tokens: int = 0
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
        """Mean time per output token after the first, of the longest completion."""
        if self.finish_time is None or self.first_token_time is None or self.num_longest_output_tokens < 2:
            return None
        return (self.finish_time - self.first_token_time) / (self.num_longest_output_tokens - 1)

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


def parse_params(values: Mapping[str, object]) -> SamplingParams:
    """SamplingParams from plain data (configuration, JSON). RequestError names an unknown key and its neighbour."""
    names = [item.name for item in fields(SamplingParams)]
    for key in values:
        if key not in names:
            raise RequestError(f"unknown sampling parameter {key!r}.{nearest(key, names)}")
    return SamplingParams(**values)  # type: ignore[arg-type]  # every value is checked in __post_init__


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
        raise RequestError(f"{name} is {value!r:.60}: it must be {allowed}")
    high = MAX_INT if high is None else high
    if not low <= value <= high:
        nearby = low if value < low else high
        raise RequestError(f"{name} is {_shown(value)}: it must be {allowed}; the nearest valid value is {nearby}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool) -> float:
    allowed = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise RequestError(f"{name} is {_shown(value)}: it must be a finite number {allowed}")
    if number < low or number > high or (open_low and number == low):
        bound = high if number > high else low
        nearby = f"; the nearest valid value is {bound:g}" if bound == high or not open_low else ""
        raise RequestError(f"{name} is {value!r}: it must be {allowed}{nearby}")
    return number


def _shown(value: object) -> str:
    """As Python writes it; long integers by their size, since Python refuses to write those of many thousand digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.60}"
