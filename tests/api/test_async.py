"""AsyncLLM: the same engine behind an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime import AsyncLLM, EngineClosedError, RequestError, RequestOutput, SamplingParams
from tests.api.tiny import alone, greedy


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
