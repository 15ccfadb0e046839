"""One request as its scheduler sees it: limits, state, and the row it gives to the sampler. Counts are of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from moe_runtime.engine.plan import SequenceChunk
from moe_runtime.engine.request import Request, SamplingParams
from moe_runtime.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Per DP group. `eos_token_ids` end a sequence unless its `ignore_eos`."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_model_len < 1:
            raise ConfigError(
                f"engine.max_num_seqs={self.max_num_seqs}, engine.max_model_len={self.max_model_len}: "
                "both must be at least 1"
            )
        assert self.max_num_seqs <= self.max_num_batched_tokens, "every running sequence takes a token per step"


def check_request(request: Request, limits: SchedulerLimits, *, num_pages: int, page_size: int) -> int:
    """The most tokens that the request may write: max_tokens, within the model's length.

    RequestError, with the numbers, where it could never run under these limits. Without max_tokens the cache is no
    reason: what fits it is the limit then.
    """
    length = len(request.prompt_token_ids)
    if not length:
        raise RequestError("the prompt is empty: at least one token is needed to continue from")
    low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
    if low < 0 or high >= limits.vocab_size:
        raise RequestError(
            f"the prompt holds token id {low if low < 0 else high}: ids must be in 0..{limits.vocab_size - 1}"
        )
    for token in request.params.stop_ids:
        if token >= limits.vocab_size:
            raise RequestError(f"stop_token_ids holds {token}: ids must be in 0..{limits.vocab_size - 1}")
    if length >= limits.max_model_len:
        raise RequestError(
            f"the prompt has {length} tokens: it must have at most {limits.max_model_len - 1}, one less than "
            f"engine.max_model_len={limits.max_model_len}"
        )
    wanted, room = request.params.max_tokens, limits.max_model_len - length
    fitting = num_pages * page_size - length + 1  # the last sampled token is never run
    new = max(min(room, fitting), 1) if wanted is None else min(room, wanted)
    if new > fitting:
        remedy = f"set max_tokens={fitting} or less, or " if fitting > 0 else ""
        raise RequestError(
            f"a prompt of {length} tokens with {new} new ones needs {-(-(length + new - 1) // page_size)} pages of "
            f"{page_size} tokens: the cache has {num_pages} ({remedy}raise engine.kv_cache_bytes)"
        )
    return new


class SampleRow(NamedTuple):
    """What the sampler knows of one row of logits. `tokens` is the live history, prompt then output: read it, keep no
    reference."""

    request_id: int
    params: SamplingParams
    tokens: list[int]
    prompt_len: int


@dataclass(slots=True, eq=False)
class SequenceState:
    """One live request. Counts are of tokens; `planned >= computed`, equal when no step is in flight."""

    request: Request
    tokens: list[int]
    prompt_len: int
    max_tokens: int
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    chain: list[bytes]
    pages: list[int] = field(default_factory=list)
    planned: int = 0
    computed: int = 0
    published_pages: int = 0
    pending: int = 0
    """Samples planned and not committed."""
    in_flight: int = 0
    """Chunks planned and not committed."""
    stale: int = 0
    """Of those, the first so many were planned before a preemption: their cache rows are gone, their sample counts."""
    prompt_logits: int = 0
    """Prompt positions whose logits are delivered."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled: bool = False

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def logprobs_due(self) -> bool:
        """Log probabilities of the prompt were asked for and are not all delivered."""
        return self.request.params.prompt_logprobs is not None and self.prompt_logits < self.prompt_len - 1

    def begins_with(self, chunk: SequenceChunk) -> bool:
        """Whether `chunk` is the first that is run of this request."""
        return chunk.start == self.num_cached_tokens and not self.num_preemptions
