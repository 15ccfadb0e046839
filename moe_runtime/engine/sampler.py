"""Sampler: from logits to tokens. S rows, V vocab. A row's result depends on that row alone, to the bit.

The order is vLLM's: min_tokens mask, penalties, temperature, min-p, top-k, top-p; log probabilities are of the model's
own logits. A draw inverts the cumulative distribution (token ids ascending, fp64) at one number that a hash makes of
the seed and the request's own position: no generator state, so preemption, retries and batch-mates change nothing.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from moe_runtime.engine.request import Logprob, PositionLogprobs, SamplingParams
from moe_runtime.engine.sequence import SampleRow

_NUCLEUS_HEAD = 256
"""Tokens sorted first for top-p; where they do not hold the mass, all are (about 10 ms for 129k tokens)."""


class TokenLogprobs(NamedTuple):
    """Of one position: the token itself first, then the likeliest ones (without it) by rank. Plain numbers."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]

    def named(self, text_of: dict[int, str] | None = None) -> PositionLogprobs:
        """As users get it; `text_of` gives the tokens' texts."""
        texts = text_of or {}
        return {
            token: Logprob(logprob, rank, texts.get(token))
            for token, logprob, rank in zip(self.token_ids, self.logprobs, self.ranks, strict=True)
        }


class Sampled(NamedTuple):
    """`token_id` is None where the request fails; `error` says why then."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


NOT_FINITE = "the model's logits were not finite"


class Sampler:
    """`seed` serves requests without their own; `eos_token_ids` are masked until a request's min_tokens."""

    def __init__(self, seed: int = 0, eos_token_ids: Sequence[int] = ()) -> None:
        self._seed = seed
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """One token per row of `logits [S, V] fp32`; ties go to the lowest id."""
        assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} requests"
        if not rows:
            return []
        peaks, best = logits.max(dim=-1)
        tokens: list[int | None] = best.tolist()
        results: list[Sampled] = []
        for index, (row, token, peak) in enumerate(zip(rows, tokens, peaks.tolist(), strict=True)):
            if not math.isfinite(peak):
                results.append(Sampled(None, error=NOT_FINITE))
                continue
            params = row.params
            if not (params.greedy and _untouched(row)):
                token = self._choose(logits[index], row)
            if token is None:
                results.append(Sampled(None, error=self._why_none(logits[index], row)))
            elif params.logprobs is None:
                results.append(Sampled(token))
            else:
                results.append(Sampled(token, token_logprobs(logits[index], token, params.logprobs)))
        return results

    def _why_none(self, logits: Tensor, row: SampleRow) -> str:
        if float(self.adjusted(logits, row).max()) != -math.inf:
            return "penalties or temperature took the logits out of range"
        return f"min_tokens={row.params.min_tokens}: every token of the vocabulary would stop before"

    def _choose(self, logits: Tensor, row: SampleRow) -> int | None:
        if row.params.greedy:
            peak, best = self.adjusted(logits, row).max(dim=-1)
            return int(best) if math.isfinite(float(peak)) else None
        weights = self.weights(logits, row)
        cumulative = weights.cumsum(dim=-1)
        total = float(cumulative[-1])
        if not 0.0 < total < math.inf:
            return None
        mark = self._uniform(row) * total
        token = int(torch.searchsorted(cumulative, mark, right=True))
        # mark may round up to the total; the last token of nonzero weight is meant then.
        return token if token < len(weights) else int(weights.nonzero()[-1])

    def adjusted(self, logits: Tensor, row: SampleRow) -> Tensor:
        """`logits [V]` after the min_tokens mask and the penalties (a copy where anything changes)."""
        if _untouched(row):
            return logits
        logits, params = logits.clone(), row.params
        if len(row.tokens) - row.prompt_len < params.min_tokens:
            stops = params.stop_ids if params.ignore_eos else params.stop_ids + self._eos_token_ids
            if stops:
                logits[list(stops)] = -math.inf
        if params.repetition_penalty != 1.0 and row.tokens:
            seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
            values, penalty = logits[seen], params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        counts = Counter(row.tokens[row.prompt_len :]) if params.presence_penalty or params.frequency_penalty else None
        if counts:
            ids = torch.tensor(list(counts.keys()), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[ids] -= params.frequency_penalty * times + params.presence_penalty
        return logits

    def weights(self, logits: Tensor, row: SampleRow) -> Tensor:
        """Unnormalised probabilities `[V] fp64` of a row that is not greedy; 0 where a filter excludes the token."""
        params = row.params
        scaled = self.adjusted(logits, row).double() / params.temperature
        weights = (scaled - scaled.max()).exp_()
        if params.min_p > 0.0:
            weights = weights.masked_fill(weights < params.min_p, 0.0)
        if 0 < params.top_k < len(weights):
            lowest = weights.topk(params.top_k).values[-1]
            weights = weights.masked_fill(weights < lowest, 0.0)
        return _nucleus(weights, params.top_p) if params.top_p < 1.0 else weights

    def _uniform(self, row: SampleRow) -> float:
        """A number in [0, 1) that belongs to this request's seed and position."""
        position = len(row.tokens) - row.prompt_len
        seed = row.params.seed
        own = (seed, position) if seed is not None else (self._seed, row.request_id, position)
        key = struct.pack(f"<{len(own)}q", *own)
        return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of `logits [V] fp32`: the log probability and rank of `token`, and the `count` likeliest. Ties rank by id."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs[token]
    rank = 1 + int((logprobs > own).sum()) + int((logprobs[:token] == own).sum())
    ids, values, ranks = [token], [float(own)], [rank]
    if count:
        lowest = logprobs.topk(min(count, len(logprobs))).values[-1]
        candidates = (logprobs >= lowest).nonzero().flatten()
        likeliest = sorted(zip((-logprobs[candidates]).tolist(), candidates.tolist(), strict=True))[:count]
        for place, (negative, candidate) in enumerate(likeliest, start=1):
            if candidate != token:
                ids.append(candidate)
                values.append(-negative)
                ranks.append(place)
    return TokenLogprobs(tuple(ids), tuple(values), tuple(ranks))


def prompt_logprobs(logits: Tensor, targets: Sequence[int], count: int) -> list[TokenLogprobs] | None:
    """Of each row of `logits [n, V] fp32`: its target, the prompt's next token. None where a row is not finite."""
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        return None
    return [token_logprobs(row, target, count) for row, target in zip(logits, targets, strict=True)]


def _untouched(row: SampleRow) -> bool:
    """Neither the min_tokens mask nor a penalty changes this row's logits."""
    params: SamplingParams = row.params
    return (
        params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and len(row.tokens) - row.prompt_len >= params.min_tokens
    )


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """`weights [V]` with 0 outside the smallest set of likeliest tokens that reaches `top_p` of the sum (never empty).

    A token stays if the tokens above it hold less than top_p; among equals the lowest ids stay.
    """
    mass = float(weights.sum()) * top_p
    head = weights.topk(min(_NUCLEUS_HEAD, len(weights))).values
    inside = head.cumsum(dim=-1) - head < mass
    if len(head) < len(weights) and bool(inside[-1]):
        head = weights.sort(descending=True).values
        inside = head.cumsum(dim=-1) - head < mass
    kept = max(int(inside.sum()), 1)
    lowest = head[kept - 1]
    mask = weights > lowest
    equals = (weights == lowest).nonzero().flatten()[: kept - int(mask.sum())]
    mask[equals] = True
    return weights.masked_fill(~mask, 0.0)
