"""AsyncLLM: the same engine behind an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_runtime import AsyncLLM, ConfigError, EngineClosedError, RequestError, RequestOutput, SamplingParams
from moe_runtime.launch.executors.virtual import VirtualExecutor
from tests.api.tiny import NUM_MOE_LAYERS, TOP_K, alone, greedy


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(str(folder), ep=2, overrides=["num_threads=1"])
    yield engine
    engine.close()
    engine.close()


async def collect(engine: AsyncLLM, prompt: list[int] | str, params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params)]


def test_many_at_once(engine: AsyncLLM, folder: Path) -> None:
    prompts = [[5, 6], [7], [8, 9, 10]]

    async def program() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(engine, prompt, greedy(6)) for prompt in prompts))

    updates = asyncio.run(program())
    assert [each[-1].outputs[0].token_ids for each in updates] == alone(folder, prompts, greedy(6))
    for each in updates:
        assert [len(update.outputs[0].token_ids) for update in each] == [1, 2, 3, 4, 5, 6]
        assert [update.finished for update in each] == [False] * 5 + [True]


def test_abort_cancel_and_close_early(engine: AsyncLLM) -> None:
    async def aborted() -> RequestOutput:
        outputs = []
        async for output in engine.generate([5], greedy(250), request_id="mine"):
            outputs.append(output)
            engine.abort("mine")
            engine.abort("nobody's")
        return outputs[-1]

    async def left() -> None:
        stream = engine.generate([5], greedy(250))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    async def cancelled() -> None:
        task = asyncio.create_task(collect(engine, [5], greedy(250)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert asyncio.run(aborted()).outputs[0].finish_reason == "abort"
    asyncio.run(left())
    asyncio.run(cancelled())
    until = time.monotonic() + 10
    while engine.snapshot().num_live_requests and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.snapshot().num_live_requests == 0


def test_errors(engine: AsyncLLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(collect(engine, "", greedy(1)))

    async def twice() -> None:
        async for _ in engine.generate([5], greedy(250), request_id="mine"):
            async for _ in engine.generate([5], greedy(2), request_id="mine"):
                pass

    with pytest.raises(RequestError, match="running already"):
        asyncio.run(twice())


def test_a_loop_that_ends_first(engine: AsyncLLM) -> None:
    """Updates to a loop that is gone must not reach the engine as errors."""

    async def program() -> None:
        stream = engine.generate([5], greedy(250))
        await anext(stream)
        leaked.append(stream)

    leaked: list[object] = []
    asyncio.run(program())
    leaked.clear()
    assert len(asyncio.run(collect(engine, [5], greedy(3)))) == 3


def test_closing_ends_what_runs(folder: Path) -> None:
    before = set(threading.enumerate())

    async def program() -> str | None:
        async with AsyncLLM(str(folder), ep=2, overrides=["num_threads=1"]) as engine:
            stream = engine.generate([5], greedy(250))
            await anext(stream)
        rest = [output async for output in stream]
        with pytest.raises(EngineClosedError):
            await collect(engine, [5], greedy(1))
        return rest[-1].outputs[0].finish_reason

    assert asyncio.run(program()) == "abort"
    assert set(threading.enumerate()) == before


def test_what_it_shows(engine: AsyncLLM) -> None:
    async def program() -> None:
        before = await engine.expert_load()
        (*_, last) = [update async for update in engine.generate({"prompt_token_ids": [5, 6]}, greedy(3))]
        report = await engine.load_report()
        assert int(report.expert_load.sum() - before.sum()) == (2 + 2) * TOP_K * NUM_MOE_LAYERS
        assert last.outputs[0].finish_reason == "length"

    assert engine.owns_requests
    assert engine.notice is None
    steps = engine.num_steps
    asyncio.run(program())
    assert engine.num_steps > steps
    with pytest.raises(RequestError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hello"}])


def test_a_rank_that_only_serves_says_so(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualExecutor, "serves_only", True)
    for use in (lambda: collect(engine, [5], greedy(1)), engine.load_report, engine.expert_load):
        with pytest.raises(ConfigError, match=r"only serves: .* on rank 0 .*, and call close\(\) here"):
            asyncio.run(use())


def test_a_loop_that_closes_under_an_update(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any check and the call, the loop may close: the call says so, and nobody else hears of it."""

    async def program() -> None:
        stream = engine.generate([5], greedy(250))
        await anext(stream)
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def closed(callback: Callable[..., None], *args: object) -> object:
            if callback.__name__ != "put_nowait":
                return call(callback, *args)
            refused.set()
            raise RuntimeError("Event loop is closed")

        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", closed)
            assert await asyncio.to_thread(refused.wait, 10)
            assert engine.snapshot().num_live_requests == 1, "the request ends with its iterator"
        await stream.aclose()  # type: ignore[attr-defined]

    refused = threading.Event()
    asyncio.run(program())
    assert len(asyncio.run(collect(engine, [5], greedy(3)))) == 3
