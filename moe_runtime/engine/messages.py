"""What crosses the control plane: commands from the owner of the requests, results from the groups. JSON, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from moe_runtime.engine.request import FinishReason, Request, SamplingParams, parse_params
from moe_runtime.engine.sampler import TokenLogprobs
from moe_runtime.errors import RequestError


@dataclass(frozen=True, slots=True)
class Commands:
    """What the owner asks before a step. `add` and `abort` are by DP group.

    `report`: every rank sends its load counters after the step. `stop`: this step is the last.
    """

    add: Mapping[int, Sequence[Request]] = field(default_factory=dict)
    abort: Mapping[int, Sequence[int]] = field(default_factory=dict)
    report: bool = False
    stop: bool = False

    @property
    def empty(self) -> bool:
        return not (self.add or self.abort or self.report or self.stop)

    def encode(self) -> bytes:
        """Empty bytes where there is nothing to say. A group's requests stay encoded until that group reads them."""
        if self.empty:
            return b""
        add = {str(group): encode_requests(requests).decode() for group, requests in self.add.items()}
        abort = {str(group): list(ids) for group, ids in self.abort.items()}
        return json.dumps({"add": add, "abort": abort, "report": self.report, "stop": self.stop}).encode()


@dataclass(frozen=True, slots=True)
class GroupCommands:
    """A DP group's part of `Commands`."""

    add: Sequence[Request] = ()
    abort: Sequence[int] = ()
    report: bool = False
    stop: bool = False

    @classmethod
    def decode(cls, payload: bytes, group: int) -> GroupCommands:
        """The part of DP group `group`."""
        if not payload:
            return cls()
        values = json.loads(payload)
        add = values["add"].get(str(group))
        return cls(
            decode_requests(add.encode()) if add else (),
            values["abort"].get(str(group), ()),
            values["report"],
            values["stop"],
        )


def encode_requests(requests: Iterable[Request]) -> bytes:
    """JSON; parameters at their defaults are left out."""
    defaults = SamplingParams()
    rows: list[dict[str, object]] = []
    for request in requests:
        row: dict[str, object] = {"id": request.id, "prompt_token_ids": request.prompt_token_ids}
        if request.params != defaults:
            own = {item.name: getattr(request.params, item.name) for item in fields(SamplingParams)}
            row["params"] = {name: value for name, value in own.items() if value != getattr(defaults, name)}
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


def _request(row: Mapping[str, Any]) -> Request:
    params = parse_params(row.get("params", {}))
    return Request(row["id"], tuple(row["prompt_token_ids"]), params, row.get("cache_salt", ""))


class TokenResult(NamedTuple):
    """What one step brought one request.

    `token_id` is None where none was sampled (a prompt chunk, or a failure, which `error` names). `prompt_logprobs`
    continue those sent before. `finish_reason` closes the request. The first chunk of a request gives a result in any
    case, later chunks only where they bring something.
    """

    request_id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    error: str | None = None


def encode_results(results: Sequence[TokenResult]) -> bytes:
    """Empty bytes for no results."""
    return json.dumps(results, separators=(",", ":")).encode() if results else b""


def decode_results(payload: bytes) -> list[TokenResult]:
    """The inverse of `encode_results`."""
    results = []
    for row in json.loads(payload) if payload else ():
        result = TokenResult(*row)
        results.append(
            result._replace(
                logprobs=_logprobs(result.logprobs),
                prompt_logprobs=tuple(lp for item in result.prompt_logprobs if (lp := _logprobs(item)) is not None),
            )
        )
    return results


def _logprobs(row: Sequence[Sequence[float]] | None) -> TokenLogprobs | None:
    if row is None:
        return None
    ids, values, ranks = row
    return TokenLogprobs(tuple(map(int, ids)), tuple(values), tuple(map(int, ranks)))
