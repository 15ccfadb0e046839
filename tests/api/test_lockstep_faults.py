"""The real engine on virtual ranks under random traffic, and with a rank that raises anywhere in a step.

Traffic is handed over on the engine's own thread, before its k-th step, so every example runs the same way each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moe_runtime import LLM, EngineClosedError, RequestOutput, SamplingParams
from moe_runtime.engine.handle import RequestHandle
from moe_runtime.engine.owner import RequestOwner
from moe_runtime.engine.plan import StepPlan
from moe_runtime.engine.runner import Runner
from moe_runtime.engine.sampler import Sampler
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.launch.executors.virtual import VirtualExecutor
from moe_runtime.layers.experts import Experts
from moe_runtime.layers.router import Router
from tests.api.tiny import TOP_K, tokens

PATIENCE_S = 30.0
SMALL = [
    "num_threads=1",
    "engine.max_num_seqs=3",
    "engine.max_num_batched_tokens=7",
    "engine.page_size=4",
    "engine.kv_cache_bytes=12KiB",  # 10 pages: three requests of 20 tokens do not fit at once
]
MESHES = ((1, 1), (3, 1), (4, 2), (4, 4))
"""(ep, tp)"""


@dataclass(frozen=True)
class Arrival:
    """`abort`: so many steps after it came, if ever."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    abort: int | None = None


@dataclass
class Traffic:
    """Feeds an engine through its own call for commands."""

    arrivals: list[Arrival]
    handles: list[RequestHandle] = field(default_factory=list)
    submitted: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def before_step(self, llm: LLM) -> None:
        service = llm._service
        for arrival in self.arrivals:
            if arrival.step == self.steps:
                self.handles += service.submit([arrival.prompt], [arrival.params])
        for arrival, handle in zip(self.arrivals, self.handles):
            if arrival.abort is not None and arrival.step + arrival.abort == self.steps:
                service.owner.abort(handle)
        if len(self.handles) == len(self.arrivals):
            self.submitted.set()
        self.steps += 1


class Driver:
    """An LLM whose steps a test counts and feeds."""

    def __init__(self, folder: Path, ep: int, tp: int, *overrides: str) -> None:
        self.llm = LLM(str(folder), ep=ep, tp=tp, overrides=[*SMALL, *overrides])
        self.traffic = Traffic([])
        executor = self.llm._service._executor
        assert isinstance(executor, VirtualExecutor)
        self.thread = executor._threads[1]
        """On which its ranks run"""
        owner = self.llm._service.owner
        commands = owner.commands

        def fed(*, idle: bool) -> bytes:
            self.traffic.before_step(self.llm)
            owner._idle_wait_s = 1.0 if self.traffic.submitted.is_set() else 0.0
            return commands(idle=idle)

        owner.commands = fed  # type: ignore[method-assign]

    def feed(self, arrivals: list[Arrival]) -> None:
        self.traffic = Traffic(sorted(arrivals, key=lambda arrival: arrival.step))
        owner = self.llm._service.owner
        with owner._wake:
            owner._wake.notify()

    def run(self, arrivals: list[Arrival]) -> list[RequestOutput]:
        """In the order of arrival."""
        self.feed(arrivals)
        assert self.traffic.submitted.wait(PATIENCE_S), "the engine takes no steps"
        return [handle.wait() for handle in self.traffic.handles]


@pytest.fixture(scope="module")
def planned() -> Iterator[list[int]]:
    """Token counts of all plans."""
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        plan = Scheduler.plan

        def counted(scheduler: Scheduler) -> StepPlan:
            result = plan(scheduler)
            counts.append(result.num_tokens)
            return result

        patch.setattr(Scheduler, "plan", counted)
        yield counts


@pytest.fixture(scope="module")
def drivers(folder: Path, planned: list[int]) -> Iterator[dict[tuple[int, int], Driver]]:
    made = {mesh: Driver(folder, *mesh) for mesh in MESHES}
    yield made
    for driver in made.values():
        driver.llm.close()


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Iterator[LLM]:
    """One rank, one request at a time."""
    with LLM(str(folder), ep=1, overrides=["num_threads=1", "engine.prefix_caching=false"]) as llm:
        yield llm


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    shared = draw(st.lists(st.integers(2, 20), min_size=1, max_size=8))  # so that prefixes meet
    found = []
    for _ in range(draw(st.integers(1, 7))):
        prompt = (
            *shared[: draw(st.integers(0, len(shared)))],
            *draw(st.lists(st.integers(2, 250), min_size=1, max_size=6)),
        )
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
            max_tokens=draw(st.integers(1, 12)),
            ignore_eos=draw(st.booleans()),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        )
        abort = draw(st.sampled_from([None, None, None, 0, 1, 4]))
        found.append(Arrival(draw(st.integers(0, 12)), prompt, params, abort))
    return found


def check(traffic: list[Arrival], outputs: list[RequestOutput], oracle: LLM) -> None:
    for arrival, output in zip(sorted(traffic, key=lambda arrival: arrival.step), outputs, strict=True):
        (expected,) = tokens(oracle.generate([arrival.prompt], arrival.params))
        (completion,) = output.outputs
        if completion.finish_reason == "abort":
            assert arrival.abort is not None
            assert completion.token_ids == expected[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected
            if output.prompt_logprobs is not None:
                assert len(output.prompt_logprobs) == len(arrival.prompt)


# Shrinking would repeat, for minutes, what a clear error names already.
PROFILE = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@settings(PROFILE, max_examples=40)
@given(mesh=st.sampled_from(MESHES), traffic=arrivals())
def test_every_request_as_if_alone(
    mesh: tuple[int, int],
    traffic: list[Arrival],
    drivers: dict[tuple[int, int], Driver],
    planned: list[int],
    oracle: LLM,
) -> None:
    driver = drivers[mesh]
    before = driver.llm.expert_load()
    planned.clear()
    outputs = driver.run(traffic)
    ran = driver.llm.expert_load() - before
    num_tokens = sum(planned)
    assert ran.sum(dim=1).tolist() == [num_tokens * TOP_K] * ran.shape[0], "padding is no load"
    check(traffic, outputs, oracle)
    until = time.monotonic() + PATIENCE_S
    while any(group.num_free_pages != 10 for group in driver.llm.snapshot().groups):
        assert time.monotonic() < until, f"pages are lost: {driver.llm.snapshot().groups}"
        time.sleep(0.002)


class BoomError(RuntimeError):
    pass


PLACES: dict[str, tuple[type, str]] = {
    "planning": (Scheduler, "plan"),
    "making inputs": (Runner, "inputs"),
    "routing": (Router, "__call__"),
    "experts": (Experts, "__call__"),
    "sampling": (Sampler, "sample"),
    "committing": (Scheduler, "commit"),
    "reporting": (RequestOwner, "report"),
}


def arm(driver: Driver, patch: pytest.MonkeyPatch, place: str, call: int) -> list[int]:
    """The driver's `call`-th call of `place`, on whichever rank that is, raises. Returns the count of calls so far."""
    kind, name = PLACES[place]
    original = getattr(kind, name)
    calls = [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is driver.thread:
            calls[0] += 1
            if calls[0] == call:
                raise BoomError(f"{place} #{call}")
        return original(*args, **kwargs)

    patch.setattr(kind, name, failing)
    return calls


@settings(PROFILE, max_examples=24)
@given(place=st.sampled_from(sorted(PLACES)), call=st.integers(1, 40), mesh=st.sampled_from(MESHES), traffic=arrivals())
def test_a_fault_is_told_to_everybody(
    place: str, call: int, mesh: tuple[int, int], traffic: list[Arrival], folder: Path, oracle: LLM
) -> None:
    threads = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        driver = Driver(folder, *mesh)
        calls = arm(driver, patch, place, call)
        driver.feed(traffic)
        began = time.monotonic()
        errors: list[EngineClosedError] = []
        outputs: list[RequestOutput] = []
        while not driver.traffic.submitted.wait(0.002) and driver.llm.snapshot().state == "running":
            assert time.monotonic() < began + PATIENCE_S, "neither steps nor a failure"
        for handle in driver.traffic.handles:
            try:
                outputs.append(handle.wait())
            except EngineClosedError as error:
                errors.append(error)
        if calls[0] >= call:
            with pytest.raises(EngineClosedError, match=f"Boom.*{place} #{call}"):
                driver.llm.generate([[5]])
        for told in errors:
            assert calls[0] >= call
            assert isinstance(told.__cause__, Exception)
            assert isinstance(told.__cause__.__cause__, BoomError)
        driver.llm.close()
        assert time.monotonic() < began + PATIENCE_S
    if not errors and len(outputs) == len(traffic):
        check(traffic, outputs, oracle)
    assert set(threading.enumerate()) == threads


def test_a_new_llm_works_after_a_fault(folder: Path, oracle: LLM) -> None:
    with pytest.MonkeyPatch.context() as patch:
        driver = Driver(folder, 4, 2)
        arm(driver, patch, "experts", 9)
        with pytest.raises(EngineClosedError, match="experts #9"):
            driver.llm.generate([[5, 6]] * 4)
        driver.llm.close()
    driver = Driver(folder, 4, 2)
    params = SamplingParams(temperature=0, max_tokens=5)
    assert tokens(driver.llm.generate([[5, 6]], params)) == tokens(oracle.generate([[5, 6]], params))
    driver.llm.close()
