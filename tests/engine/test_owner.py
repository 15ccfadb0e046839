"""RequestOwner without an engine: the test takes its commands and reports steps by hand."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.engine import LoadReport, StepReport
from moe_runtime.engine.handle import RequestHandle
from moe_runtime.engine.lockstep import AgreedStep
from moe_runtime.engine.messages import GroupCommands, TokenResult
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.engine.request import Request, RequestOutput, SamplingParams
from moe_runtime.engine.submission import Submission
from moe_runtime.errors import EngineClosedError, RequestError
from moe_runtime.parallel.mesh import ProcessMesh


def longest(request: Request) -> int:
    """As if the model's length left 100 tokens."""
    return 100 if request.params.max_tokens is None else request.params.max_tokens


def make(dp: int = 1) -> RequestOwner:
    return RequestOwner(mesh=ProcessMesh(dp=dp), num_pages=9, check=longest, decoder=None, idle_wait_s=0.0)


def submission(length: int = 1, max_tokens: int | None = 4, n: int = 1) -> Submission:
    return Submission(None, [5] * length, SamplingParams(max_tokens=max_tokens, n=n))


def step(*results: TokenResult, outstanding: tuple[int, ...] = (0,), load: LoadReport | None = None) -> StepReport:
    agreed = AgreedStep(0, Phase.MIXED, (1,), 1, 1, 1, (), 1, outstanding)
    return StepReport(results, agreed, (), load)


def refuse(update: object) -> None:
    raise ValueError("no room")


def test_a_caller_that_cannot_be_told_loses_its_request_alone() -> None:
    owner = make()
    (refused,) = owner.submit([submission()], stream=True, deliver=refuse)
    (other,) = owner.submit([submission()], stream=True)
    owner.commands(idle=False)
    owner.report(step(*(TokenResult(handle.number, 65) for handle in (refused, other))))
    assert other.wait().outputs[0].token_ids == (65,)
    (completion,) = refused.output().outputs
    assert (completion.finish_reason, completion.stop_reason) == ("abort", None)
    assert completion.error == "its output could not be delivered: ValueError('no room')"
    assert GroupCommands.decode(owner.commands(idle=False), 0).abort == [refused.number]
    owner.report(step(TokenResult(other.number, 66, finish_reason="length")))
    assert other.wait().finished
    snapshot = owner.snapshot()
    assert (snapshot.num_live_requests, snapshot.num_finished_requests) == (0, 2)


@pytest.mark.parametrize("failure", [None, RuntimeError("broken")])
def test_the_end_releases_everybody_whoever_refuses(failure: BaseException | None) -> None:
    owner = make()
    owner.submit([submission()], stream=True, deliver=refuse)
    handles = owner.submit([submission()] * 2)
    told: list[BaseException] = []

    def load() -> None:
        try:
            owner.load()
        except EngineClosedError as error:
            told.append(error)

    waiting = threading.Thread(target=load, daemon=True)
    waiting.start()
    while not GroupCommands.decode(owner.commands(idle=False), 0).report:
        pass
    owner.end(failure)
    waiting.join(10)
    assert len(told) == 1
    for handle in handles:
        if failure is None:
            assert handle.wait().outputs[0].finish_reason == "abort"
        else:
            with pytest.raises(EngineClosedError, match="the engine has failed: broken"):
                handle.wait()


class Breaks:
    """A decoder that fails from some moment on."""

    broken = False

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self.broken:
            raise ValueError("no text")
        return ""


def test_the_end_releases_those_whose_text_cannot_be_made_and_all_others() -> None:
    decoder = Breaks()
    owner = RequestOwner(mesh=ProcessMesh(), num_pages=9, check=longest, decoder=decoder, idle_wait_s=0.0)
    streams = owner.submit([submission()] * 2, stream=True)
    decoder.broken = True
    owner.end(None)
    assert [handle.wait().outputs[0].finish_reason for handle in streams] == ["abort", "abort"]


def test_a_first_chunk_is_no_update() -> None:
    owner = make()
    told: list[RequestOutput | None] = []
    (handle,) = owner.submit([submission()], stream=True, deliver=told.append)
    owner.commands(idle=False)
    assert handle.output().metrics.scheduled_time is None
    owner.report(step(TokenResult(handle.number)))
    assert not told
    assert handle.output().metrics.scheduled_time is not None
    owner.report(step(TokenResult(handle.number, 65)))
    assert len(told) == 1


def groups_of(owner: RequestOwner, handles: list[RequestHandle]) -> list[int]:
    """Where the next commands send them."""
    payload = owner.commands(idle=False)
    places = {request.id: group for group in range(2) for request in GroupCommands.decode(payload, group).add}
    return [places[handle.number] for handle in handles]


def test_the_groups_own_counts_are_heard_under_steady_arrivals() -> None:
    owner = make(dp=2)
    assert groups_of(owner, owner.submit([submission(10), submission(2)])) == [0, 1]
    late = owner.submit([submission(3)])  # always one that came too late for the step that is reported now
    owner.report(step(outstanding=(14, 0)))  # group 1 has ended its request already
    more = owner.submit([submission(1)] * 3)  # of 5 tokens, where 14 and the late 7 are outstanding
    assert groups_of(owner, late + more) == [1, 1, 1, 0]


def test_requests_without_a_limit_count_up_to_the_models_length() -> None:
    owner = make(dp=2)
    handles = owner.submit([submission(1, None), submission(50, 40), submission(1)])
    assert groups_of(owner, handles) == [0, 1, 1]


def test_checks_once_and_outside_of_the_lock() -> None:
    checked: list[Request] = []

    def check(request: Request) -> int:
        other = threading.Thread(target=owner.snapshot, daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive(), "other threads wait for this check"
        checked.append(request)
        return 4

    owner = RequestOwner(mesh=ProcessMesh(), num_pages=9, check=check, decoder=None)
    first, second = owner.submit([submission(n=3), submission(n=2)])
    assert len(checked) == 2
    assert (first.number, second.number) == (0, 3)
    added = GroupCommands.decode(owner.commands(idle=False), 0).add
    assert [request.id for request in added] == [0, 1, 2, 3, 4]
    assert all(request.prompt_token_ids == (5,) for request in added)


def test_all_or_none() -> None:
    def check(request: Request) -> int:
        if len(request.prompt_token_ids) > 3:
            raise RequestError("too long")
        return 1

    owner = RequestOwner(mesh=ProcessMesh(), num_pages=9, check=check, decoder=None, idle_wait_s=0.0)
    with pytest.raises(RequestError, match="prompt 1: too long"):
        owner.submit([submission(), submission(4)])
    with pytest.raises(RequestError, match=r"^stop needs a tokenizer.json, .* Use stop_token_ids\.$"):
        owner.submit([Submission(None, [5], SamplingParams(stop="a"))])
    assert owner.commands(idle=True) == b""
    assert owner.snapshot().num_live_requests == 0


def test_loads_are_the_callers_own() -> None:
    owner = make()
    found: list[LoadReport] = []

    @torch.inference_mode()
    def load() -> None:
        found.append(owner.load())

    callers = [threading.Thread(target=load, daemon=True) for _ in range(2)]
    for caller in callers:
        caller.start()
    while len(owner._load_waiters) < 2:
        pass
    owner.commands(idle=False)
    with torch.inference_mode():
        owner.report(step(load=LoadReport(torch.ones(2, 3).long(), torch.ones(2, 1).long())))
    for caller in callers:
        caller.join(10)
    one, other = (report.expert_load for report in found)
    one -= 1
    assert (int(one.sum()), int(other.sum())) == (0, 6)
