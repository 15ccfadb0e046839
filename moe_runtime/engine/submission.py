"""Submission: what a caller asks, checked and split into one request per completion before it takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe_runtime.engine.request import Request, SamplingParams
from moe_runtime.errors import RequestError

Check = Callable[[Request], int]
"""The most tokens that a request may write. RequestError where it could never run."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A prompt to complete (params.n times). `prompt`: its text, None where it came as token ids."""

    prompt: str | None
    token_ids: Sequence[int]
    params: SamplingParams
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submission that can run. `requests`: one per completion, their ids counted from 0."""

    submission: Submission
    requests: tuple[Request, ...]
    num_tokens: int
    """Of each request at its longest, prompt and output"""


def prepare(submissions: Sequence[Submission], check: Check, *, has_decoder: bool) -> list[Prepared]:
    """All of them, or RequestError where one could never run. `has_decoder`: whether tokens can be made text."""
    prepared = []
    for index, submission in enumerate(submissions):
        try:
            prepared.append(_prepare(submission, check, has_decoder))
        except RequestError as error:
            raise RequestError(f"prompt {index}: {error}" if len(submissions) > 1 else str(error)) from None
    return prepared


def _prepare(submission: Submission, check: Check, has_decoder: bool) -> Prepared:
    params = submission.params
    if params.stop_strings and not has_decoder:
        raise RequestError("stop needs a tokenizer.json, which this checkpoint lacks. Use stop_token_ids.")
    first, *others = params.completions()
    request = Request(0, tuple(submission.token_ids), first, submission.cache_salt)
    longest = check(request)
    # Log probabilities of the prompt are the same for every completion: once is enough.
    rest = (replace(request, id=i, params=replace(own, prompt_logprobs=None)) for i, own in enumerate(others, start=1))
    return Prepared(submission, (request, *rest), len(request.prompt_token_ids) + longest)
