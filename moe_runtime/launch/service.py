"""Service: a loaded model, its ranks and the owner of its requests: what the Python API stands on."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial

from moe_runtime.engine.engine import LoadReport
from moe_runtime.engine.handle import Deliver, RequestHandle
from moe_runtime.engine.owner import IDLE_WAIT_S, RequestOwner
from moe_runtime.engine.request import SamplingParams
from moe_runtime.engine.sequence import check_request
from moe_runtime.engine.snapshot_file import SnapshotFile
from moe_runtime.engine.submission import Submission
from moe_runtime.errors import ConfigError, EngineClosedError, RequestError
from moe_runtime.launch.build import OnProgress, ProcessParts
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import torchrun_env
from moe_runtime.launch.executors import start_executor
from moe_runtime.launch.executors.base import Executor
from moe_runtime.launch.meeting import Meeting, decide
from moe_runtime.launch.recording import make_snapshot_file
from moe_runtime.launch.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int] | Mapping[str, str | Sequence[int]]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

Plain = str | tuple[int, ...]
"""A prompt, read and checked."""

_ALLOWED = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'

_NO_TOKENIZER = (
    "text needs a tokenizer.json, which this checkpoint lacks (one that exists only as remote code is not run). "
    "Give prompts as lists of token ids, or add a tokenizer.json to the folder."
)


class Service:
    """Usable from any thread. Everything is released by `close`, and at the latest with the object or the process."""

    def __init__(self, composed: Composed, *, meeting: Meeting | None, on_progress: OnProgress) -> None:
        """Load and start. Raises ConfigError, CheckpointError and CommunicationError; nothing is left behind then."""

        def open_all() -> tuple[ProcessParts, Tokenizer | None, SnapshotFile | None]:
            in_process = composed.topology.world if composed.topology.launcher == "virtual" else 1
            local_rank = 0 if meeting is None else meeting.place.local_rank
            parts = ProcessParts.open(composed, ranks_in_process=in_process, local_rank=local_rank)
            shown = make_snapshot_file(config, parts.model) if meeting is None or not meeting.place.rank else None
            return parts, load_tokenizer(composed.model_path), shown

        config = composed.config
        self.composed = composed
        opened = open_all() if meeting is None else meeting.together("its checkpoint", open_all)
        self.parts, self.tokenizer, snapshot_file = opened
        self.named: dict[str, RequestHandle] = {}
        """Running requests to which a caller gave a name"""
        cache = self.parts.cache
        self.owner = RequestOwner(
            mesh=composed.topology.mesh(),
            num_pages=cache.num_pages,
            check=partial(
                check_request,
                limits=self.parts.scheduler_limits,
                num_pages=cache.num_pages,
                page_size=cache.page_size,
            ),
            decoder=self.tokenizer,
            idle_wait_s=min(IDLE_WAIT_S, config.comm_timeout_s / 4),
            snapshot_file=snapshot_file,
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

    def require_owner(self, what: str, *, instead: str = "generate() or close()") -> None:
        """ConfigError where this rank only serves: nobody here could answer. `instead`: what its program may call."""
        if self.serves_only:
            raise ConfigError(f"this rank only serves: {what} on rank 0 (llm.owns_requests), and call {instead} here.")

    def submit(
        self,
        prompts: Sequence[Plain],
        params: Sequence[SamplingParams],
        *,
        cache_salt: str = "",
        stream: bool = False,
        deliver: Deliver | None = None,
    ) -> list[RequestHandle]:
        """Queue all prompts, or none: RequestError where one can never run."""
        if not isinstance(cache_salt, str):
            raise RequestError(f"cache_salt is {cache_salt!r:.60}: it must be a text")
        many = len(prompts) > 1
        return self.owner.submit(
            [
                Submission(
                    prompt if isinstance(prompt, str) else None, self._encode(prompt, index, many), own, cache_salt
                )
                for index, (prompt, own) in enumerate(zip(prompts, params, strict=True))
            ],
            stream=stream,
            deliver=deliver,
        )

    def load(self, *, instead: str = "generate() or close()") -> LoadReport:
        """The load counters of all ranks. ConfigError as `require_owner`."""
        self.require_owner("load_report() and expert_load()", instead=instead)
        if self.composed.config.balance.record == "off":
            raise ConfigError("balance.record=off: no loads are counted. Set balance.record=stat.")
        return self.owner.load()

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

    def _encode(self, prompt: Plain, index: int, many: bool) -> Sequence[int]:
        where = f"prompt {index}: " if many else ""
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise RequestError(f"{where}the prompt is empty: at least one character is needed to continue from")
        if self.tokenizer is None:
            raise RequestError(f"{where}{_NO_TOKENIZER}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            half = f"{prompt[error.start]!r} at character {error.start}"
            raise RequestError(
                f"{where}the text holds half of a surrogate pair, which is no character: {half}"
            ) from None
        return self.tokenizer.encode(prompt)


def start_service(model: str, *, ep: int | None, tp: int | None, dp: int | None, overrides: Sequence[str]) -> Service:
    """From what the Python API is given: `overrides` are the command line's `key=value` words."""
    sizes = {"ep": ep, "tp": tp, "dp": dp}
    words = [f"model={model}", *(f"{name}={size}" for name, size in sizes.items() if size is not None), *overrides]
    composed, meeting = decide(words, torchrun=torchrun_env())
    return Service(composed, meeting=meeting, on_progress=lambda _: None)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Plain]:
    """One prompt or many, told apart: a sequence of integers is one prompt. RequestError for anything else."""
    if isinstance(prompts, (str, Mapping)):
        return [one_prompt(prompts)]
    items = _items(prompts)
    ids = _token_ids(items) if items else None
    return [one_prompt(item) for item in items] if ids is None else [ids]


def one_prompt(prompt: object) -> Plain:
    """A prompt in any of its forms. RequestError where it is none."""
    match prompt:
        case str():
            return prompt
        case {"prompt": str() as text, **others} if not others:
            return text
        case {"prompt_token_ids": ids, **others} if not others:
            found = _token_ids(_items(ids))
        case Mapping():
            found = None
        case _:
            found = _token_ids(_items(prompt))
    if found is None:
        raise RequestError(f"{prompt!r:.60} is no prompt: each must be {_ALLOWED}.")
    return found


def params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """One for each of `count` prompts. RequestError for anything but SamplingParams."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    found: list[object] = list(params) if isinstance(params, (list, tuple)) else [params]
    if not all(isinstance(own, SamplingParams) for own in found):
        raise RequestError(f"sampling_params is {params!r:.60}: give one SamplingParams for all prompts, or one each.")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one for all, or one each.")
    return params


def _items(value: object) -> list[object]:
    """What a sequence (also of numpy or torch) holds. RequestError for bytes, what has no order and what is none."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, memoryview, Mapping, AbstractSet)):
        with suppress(TypeError):  # an array of no dimension says that it can be iterated over
            return list(value)
    raise RequestError(f"{value!r:.60} is no prompt: each must be {_ALLOWED}.")


def _token_ids(items: Sequence[object]) -> tuple[int, ...] | None:
    """Whole numbers, of numpy and torch as well; None where one is none."""
    try:
        return tuple([_token_id(item) for item in items])
    except TypeError:
        return None


def _token_id(item: object) -> int:
    shape: Sequence[int] = getattr(item, "shape", ())
    if isinstance(item, bool) or len(shape):  # torch takes a tensor of one element for a number
        raise TypeError(item)
    return operator.index(item)  # type: ignore[arg-type]


def _end(owner: RequestOwner, executor: Executor) -> None:
    owner.close()
    executor.close()
