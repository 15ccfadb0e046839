"""The Python API: LLM, and AsyncLLM for asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType

from torch import Tensor

from moe_runtime.engine.engine import LoadReport
from moe_runtime.engine.handle import RequestHandle
from moe_runtime.engine.request import RequestOutput, SamplingParams
from moe_runtime.engine.snapshot import EngineSnapshot
from moe_runtime.errors import RequestError
from moe_runtime.launch.build import OnProgress
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.meeting import Meeting
from moe_runtime.launch.service import Prompt, Service, one_prompt, params_list, prompt_list, start_service
from moe_runtime.launch.tokenizer import Tokenizer
from moe_runtime.launch.topology import Topology


class _Model:
    """What LLM and AsyncLLM have in common: how they begin, what they are, how they end."""

    def __init__(
        self,
        model: str = "demo",
        *,
        ep: int | None = None,
        tp: int | None = None,
        dp: int | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self._service = start_service(model, ep=ep, tp=tp, dp=dp, overrides=overrides)

    @property
    def topology(self) -> Topology:
        """The mesh, the launcher, and why."""
        return self._service.composed.topology

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint's tokenizer exists only as code of its own."""
        return self._service.tokenizer

    @property
    def notice(self) -> str | None:
        """What loading passed over, in one line."""
        return self._service.parts.notice

    @property
    def owns_requests(self) -> bool:
        """False on the ranks of a torchrun world that only serve, until rank 0 closes.

        There, LLM.generate() and close() serve; everything that needs an answer raises ConfigError.
        """
        return not self._service.serves_only

    @property
    def num_steps(self) -> int:
        """Engine steps so far, idle ones included."""
        return self._service.owner.num_steps

    def snapshot(self) -> EngineSnapshot:
        """Queues, counts and timings now. Cheap; changes nothing."""
        return self._service.owner.snapshot()

    def close(self) -> None:
        """End running requests with "abort", stop every rank and release everything. Blocks; idempotent."""
        self._service.close()


class LLM(_Model):
    """A model that generates, under expert parallelism. Usable from any thread; close it, or use it in `with`.

    `model`: a known name ("demo") or a checkpoint folder. `ep`, `tp`, `dp`: any may be given, the rest follow.
    `overrides`: the command line's `key=value` words. Raises ConfigError, CheckpointError and CommunicationError.
    """

    @classmethod
    def from_composed(
        cls, composed: Composed, *, meeting: Meeting | None = None, on_progress: OnProgress = lambda _: None
    ) -> LLM:
        """The LLM of a run that was decided already (the command line's way)."""
        llm = cls.__new__(cls)
        llm._service = Service(composed, meeting=meeting, on_progress=on_progress)
        return llm

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Complete every prompt; results in the order of the prompts. On a rank that only serves: serve, return [].

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}. Requests of different
        `cache_salt` share no cached pages. Raises RequestError, before anything runs, where a prompt cannot be served;
        EngineClosedError where the engine failed or was closed.
        """
        if self._service.serves_only:
            self._service.serve()
            return []
        listed = prompt_list(prompts)
        handles = self._service.submit(listed, params_list(sampling_params, len(listed)), cache_salt=cache_salt)
        try:
            return [handle.wait() for handle in handles]
        except BaseException:
            for handle in handles:
                self._service.owner.abort(handle)
            raise

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, cache_salt: str = ""
    ) -> TokenStream:
        """The growing output of one prompt, a value per token (and completion); the last one is `finished`.

        Raises as `generate` does, at once, and ConfigError on a rank that only serves. A stream that is closed or
        dropped early ends its request.
        """
        self._service.require_owner("stream()")
        params = params_list(sampling_params, 1)
        (handle,) = self._service.submit([one_prompt(prompt)], params, cache_salt=cache_salt, stream=True)
        return TokenStream(handle, self._service)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> RequestOutput:
        """The answer to a conversation of {"role", "content"} messages, by the checkpoint's chat template.

        Raises as `generate` does, and ConfigError on a rank that only serves.
        """
        self._service.require_owner("chat()")
        return self.generate(self._service.render_chat(messages), sampling_params, cache_salt=cache_salt)[0]

    def load_report(self) -> LoadReport:
        """Load counters of all ranks since the start: experts `[L, E'] int64` and ranks `[L, ep] int64`, on the CPU.

        ConfigError on a rank that only serves; EngineClosedError as `generate`.
        """
        return self._service.load()

    def expert_load(self) -> Tensor:
        """`[L, E'] int64`: tokens per MoE layer and logical expert, as in `load_report`; padding is never counted."""
        return self.load_report().expert_load

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.close(error)


class TokenStream:
    """An iterator over the growing output of one request."""

    def __init__(self, handle: RequestHandle, service: Service) -> None:
        self._handle = handle
        self._service = service  # keeps the engine alive while somebody reads
        self._over = False

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        if self._over:
            raise StopIteration
        try:
            output = self._handle.wait()
        except BaseException:
            self.close()
            raise
        self._over = output.finished
        return output

    def close(self) -> None:
        """End the request where it still runs. Idempotent."""
        self._over = True
        self._service.owner.abort(self._handle)

    def __del__(self) -> None:
        if not self._over:
            self.close()


class AsyncLLM(_Model):
    """LLM for asyncio programs: an async iterator per request. Close it, or use it in `async with`.

    Takes what LLM takes; loading blocks, so start it before the event loop or in a thread. On a rank that only serves,
    close() serves and everything else that needs an answer raises ConfigError.
    """

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """The growing output of one prompt; the last one is `finished`. `request_id`: for `abort`.

        Raises RequestError, ConfigError and EngineClosedError. An iterator that is closed or cancelled early ends its
        request.
        """
        service = self._service
        service.require_owner("generate()", instead="close()")
        if request_id is not None and request_id in service.named:
            raise RequestError(f"request_id={request_id!r} is running already: give each request its own.")
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[RequestOutput | None] = asyncio.Queue()

        def deliver(update: RequestOutput | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(updates.put_nowait, update)

        params = params_list(sampling_params, 1)
        (handle,) = service.submit([one_prompt(prompt)], params, cache_salt=cache_salt, stream=True, deliver=deliver)
        if request_id is not None:
            service.named[request_id] = handle
        try:
            finished = False
            while not finished:
                output = handle.read(await updates.get())
                finished = output.finished
                yield output
        finally:
            if request_id is not None:
                service.named.pop(request_id, None)
            service.owner.abort(handle)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """`generate` for a conversation of {"role", "content"} messages, by the checkpoint's chat template."""
        self._service.require_owner("chat()", instead="close()")
        ids = self._service.render_chat(messages)
        return self.generate(ids, sampling_params, request_id=request_id, cache_salt=cache_salt)

    def abort(self, request_id: str) -> None:
        """End a request; its iterator ends with an output that says "abort". Nothing happens where it has ended."""
        handle = self._service.named.get(request_id)
        if handle is not None:
            self._service.owner.abort(handle)

    async def load_report(self) -> LoadReport:
        """As LLM.load_report."""
        return await asyncio.to_thread(self._service.load, instead="close()")

    async def expert_load(self) -> Tensor:
        """As LLM.expert_load."""
        return (await self.load_report()).expert_load

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._service.close, error)
