"""The Python API: LLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from moe_runtime.engine.engine import LoadReport
from moe_runtime.engine.owner import RequestHandle, RequestOwner
from moe_runtime.engine.request import RequestOutput, SamplingParams
from moe_runtime.errors import EngineClosedError, RequestError
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import torchrun_env
from moe_runtime.launch.executors import start_executor
from moe_runtime.launch.meeting import Meeting, decide
from moe_runtime.launch.tokenizer import Tokenizer, load_tokenizer
from moe_runtime.launch.topology import Topology

Prompt = str | Sequence[int]


class LLM:
    """A model that generates, under expert parallelism. Usable from any thread; close it, or use it in `with`.

    `model`: a known name ("demo") or a checkpoint folder. `ep`, `tp`, `dp`: any may be given, the rest follow.
    `overrides`: the command line's `key=value` words. Raises ConfigError and CheckpointError.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        ep: int | None = None,
        tp: int | None = None,
        dp: int | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        sizes = {"ep": ep, "tp": tp, "dp": dp}
        words = [f"model={model}", *(f"{name}={size}" for name, size in sizes.items() if size is not None), *overrides]
        composed, meeting = decide(words, torchrun=torchrun_env())
        self._start(composed, meeting, lambda _: None)

    @classmethod
    def from_composed(
        cls, composed: Composed, *, meeting: Meeting | None = None, on_progress: OnProgress = lambda _: None
    ) -> LLM:
        """The LLM of a run that was decided already (the command line's way)."""
        llm = cls.__new__(cls)
        llm._start(composed, meeting, on_progress)
        return llm

    def _start(self, composed: Composed, meeting: Meeting | None, on_progress: OnProgress) -> None:
        config, topology = composed.config, composed.topology
        self._closed = False
        self._composed = composed
        self._parts = ProcessParts.open(
            composed, ranks_in_process=topology.world if topology.launcher == "virtual" else 1
        )
        self._tokenizer = load_tokenizer(composed.model_path)
        self._owner = RequestOwner(
            num_groups=config.dp, check=self._parts.check_request, decoder=self._tokenizer
        )
        self._executor = start_executor(
            composed, self._parts, self._owner, meeting=meeting, on_progress=on_progress
        )

    # What it is

    @property
    def topology(self) -> Topology:
        """The mesh, the launcher, and why."""
        return self._composed.topology

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint's tokenizer exists only as code of its own."""
        return self._tokenizer

    @property
    def notice(self) -> str | None:
        """What loading passed over, in one line."""
        return self._parts.notice

    @property
    def owns_requests(self) -> bool:
        """False on the ranks of a torchrun world that only serve: there, generate() serves until rank 0 closes."""
        return not self._executor.serves_only

    @property
    def num_steps(self) -> int:
        """Engine steps so far, idle ones included."""
        return self._owner.num_steps

    # What it does

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids); results in the order of the prompts.

        Raises RequestError, before anything runs, where a prompt cannot be served; EngineClosedError where the engine
        failed or was closed.
        """
        if self._executor.serves_only:
            self._executor.serve()
            return []
        listed = _prompt_list(prompts)
        handles = self._submit_all(listed, _params_list(sampling_params, len(listed)), stream=False)
        try:
            return [_last(handle) for handle in handles]
        except BaseException:
            for handle in handles:
                self._owner.abort(handle)
            raise

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The growing output of one prompt, a value per token; the last one is `finished`.

        An iterator that is dropped early ends its request.
        """
        (handle,) = self._submit_all([prompt], [sampling_params or SamplingParams()], stream=True)
        try:
            while True:
                output = _next(handle)
                yield output
                if output.finished:
                    return
        finally:
            if not handle.finished:
                self._owner.abort(handle)

    def chat(
        self, messages: Sequence[Mapping[str, str]], sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """The answer to a conversation of {"role", "content"} messages, by the checkpoint's chat template."""
        if self._tokenizer is None:
            raise RequestError(_NO_TOKENIZER)
        return self.generate(self._tokenizer.render_chat(messages), sampling_params)[0]

    def load_report(self) -> LoadReport:
        """Load counters of all ranks since the start: experts `[L, E']` and ranks `[L, ep]`."""
        return self._owner.load()

    def expert_load(self) -> Tensor:
        """`[L, E'] int64`: tokens per MoE layer and logical expert since the start; padding is never counted."""
        return self._owner.load().expert_load

    def close(self) -> None:
        """End running requests with "abort", stop every rank and release everything. Idempotent."""
        if not self._closed:
            self._closed = True
            self._owner.close()
            self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_executor"):
            self.close()

    def _submit_all(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, stream: bool
    ) -> list[RequestHandle]:
        handles: list[RequestHandle] = []
        encoded = [self._encode(prompt, index) for index, prompt in enumerate(prompts)]
        try:
            for index, (prompt, ids, own) in enumerate(zip(prompts, encoded, params, strict=True)):
                text = prompt if isinstance(prompt, str) else None
                try:
                    handles.append(self._owner.submit(text, ids, own, stream=stream))
                except RequestError as error:
                    raise RequestError(f"prompt {index}: {error}") from None
        except BaseException:
            for handle in handles:
                self._owner.abort(handle)
            raise
        return handles

    def _encode(self, prompt: Prompt, index: int) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise RequestError(f"prompt {index}: {_NO_TOKENIZER}")
        return self._tokenizer.encode(prompt)


_NO_TOKENIZER = (
    "text needs a tokenizer.json, which this checkpoint lacks (a tokenizer that exists only as remote code is not run). "
    "Give prompts as lists of token ids, or add a tokenizer.json to the folder."
)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, told apart: a sequence of integers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [[int(item) for item in items if isinstance(item, int)]]
    return [item if isinstance(item, str) else list(_ids(item)) for item in items]


def _ids(item: int | str | Sequence[int]) -> Sequence[int]:
    if isinstance(item, int | str):
        raise RequestError(f"prompts mix {item!r} with others: each must be a text or a list of token ids.")
    return item


def _params_list(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one for all, or one each.")
    return params


def _next(handle: RequestHandle) -> RequestOutput:
    output = handle.updates.get()
    if output is None:
        raise EngineClosedError(f"the engine has failed: {handle.error}") from handle.error
    return output


def _last(handle: RequestHandle) -> RequestOutput:
    while not (output := _next(handle)).finished:
        pass
    return output


