"""Service: a loaded model, its ranks and the owner of its requests: what the Python API stands on."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence

from moe_runtime.engine.handle import Deliver, RequestHandle
from moe_runtime.engine.owner import IDLE_WAIT_S, RequestOwner, Submission
from moe_runtime.engine.request import SamplingParams
from moe_runtime.errors import EngineClosedError, RequestError
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import torchrun_env
from moe_runtime.launch.executors import start_executor
from moe_runtime.launch.executors.base import Executor
from moe_runtime.launch.meeting import Meeting, decide
from moe_runtime.launch.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]

_NO_TOKENIZER = (
    "text needs a tokenizer.json, which this checkpoint lacks (one that exists only as remote code is not run). "
    "Give prompts as lists of token ids, or add a tokenizer.json to the folder."
)


class Service:
    """Usable from any thread. Everything is released by `close`, and at the latest with the object or the process."""

    def __init__(self, composed: Composed, *, meeting: Meeting | None, on_progress: OnProgress) -> None:
        """Load and start. Raises ConfigError, CheckpointError and CommunicationError; nothing is left behind then."""

        def open_both() -> tuple[ProcessParts, Tokenizer | None]:
            in_process = composed.topology.world if composed.topology.launcher == "virtual" else 1
            parts = ProcessParts.open(composed, ranks_in_process=in_process)
            return parts, load_tokenizer(composed.model_path)

        config = composed.config
        self.composed = composed
        self.parts, self.tokenizer = open_both() if meeting is None else meeting.together("its checkpoint", open_both)
        self.owner = RequestOwner(
            mesh=composed.topology.mesh(),
            num_pages=self.parts.cache.num_pages,
            check=self.parts.check_request,
            decoder=self.tokenizer,
            idle_wait_s=min(IDLE_WAIT_S, config.comm_timeout_s / 4),
        )
        executor = start_executor(composed, self.parts, self.owner, meeting=meeting, on_progress=on_progress)
        self._executor = executor
        # The engine's thread knows the owner, never this object: a service that nobody holds is found and ended.
        self._end = weakref.finalize(self, _end, self.owner, executor)

    @property
    def serves_only(self) -> bool:
        return self._executor.serves_only

    def serve(self) -> None:
        """Where `serves_only`: until rank 0 closes. EngineClosedError once this side is closed."""
        if not self._end.alive:
            raise EngineClosedError("this engine is closed. Make a new LLM.")
        self._executor.serve()

    def submit(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        stream: bool = False,
        deliver: Deliver | None = None,
    ) -> list[RequestHandle]:
        """Queue all prompts, or none: RequestError where one can never run."""
        many = len(prompts) > 1
        return self.owner.submit(
            [
                Submission(prompt if isinstance(prompt, str) else None, self._encode(prompt, index, many), own)
                for index, (prompt, own) in enumerate(zip(prompts, params, strict=True))
            ],
            stream=stream,
            deliver=deliver,
        )

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, by the checkpoint's chat template."""
        if self.tokenizer is None:
            raise RequestError(_NO_TOKENIZER)
        return self.tokenizer.render_chat(messages)

    def close(self, error: BaseException | None = None) -> None:
        """Stop every rank and release everything. `error`: why this rank's program leaves, where it only serves."""
        if error is not None and self.serves_only:
            self._executor.close(error)
        self._end()

    def _encode(self, prompt: Prompt, index: int, many: bool) -> Sequence[int]:
        where = f"prompt {index}: " if many else ""
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise RequestError(f"{where}the prompt is empty: at least one character is needed to continue from")
        if self.tokenizer is None:
            raise RequestError(f"{where}{_NO_TOKENIZER}")
        return self.tokenizer.encode(prompt)


def start_service(model: str, *, ep: int | None, tp: int | None, dp: int | None, overrides: Sequence[str]) -> Service:
    """From what the Python API is given: `overrides` are the command line's `key=value` words."""
    sizes = {"ep": ep, "tp": tp, "dp": dp}
    words = [f"model={model}", *(f"{name}={size}" for name, size in sizes.items() if size is not None), *overrides]
    composed, meeting = decide(words, torchrun=torchrun_env())
    return Service(composed, meeting=meeting, on_progress=lambda _: None)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, told apart: a sequence of integers is one prompt. RequestError for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(_is_integer(item) for item in items):
        return [_token_ids(items)]
    return [item if isinstance(item, str) else _token_ids(item) for item in items]


def params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """One for each of `count` prompts."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one for all, or one each.")
    return params


def _is_integer(item: object) -> bool:
    try:
        _token_id(item)
    except TypeError:
        return False
    return True


def _token_ids(item: object) -> list[int]:
    try:
        return [_token_id(token) for token in item]  # type: ignore[attr-defined]
    except TypeError:
        raise RequestError(f"{item!r:.60} is no prompt: each must be a text or a list of token ids.") from None


def _token_id(item: object) -> int:
    """Any whole number, of numpy and torch as well. TypeError for anything else."""
    if isinstance(item, bool):
        raise TypeError(item)
    return operator.index(item)  # type: ignore[arg-type]


def _end(owner: RequestOwner, executor: Executor) -> None:
    owner.close()
    executor.close()
