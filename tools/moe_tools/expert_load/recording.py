"""Runs a model over prompts while its engine records a trace; `record`, `apply` and `report` without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from moe_runtime.api import LLM
from moe_runtime.balance.trace import HEADER_FILE, Trace, TraceHeader, has_trace, read_header, read_trace
from moe_runtime.cli.console import Console, PlainConsole, count
from moe_runtime.cli.prompts import own_prompts, read_prompts
from moe_runtime.engine.request import SamplingParams
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.launch.build import LoadProgress
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import torchrun_env
from moe_runtime.launch.meeting import Meeting, decide
from moe_runtime.launch.recording import SNAPSHOT_NAME, trace_header
from moe_tools.expert_load.progress import watched
from moe_tools.expert_load.run_file import RUN_FILE, save_run
from moe_tools.expert_load.words import Words

_DEFAULTS: Final = ("balance.record=per_token", "balance.window_steps=4")
"""Unlike serving, a recording is short and wants everything."""

Check = Callable[[TraceHeader], None]
"""Raises where what is about to run does not fit. The header is that of the coming trace, without a placement."""


def record(words: Words, folder: Path, console: Console, *, check: Check = lambda _: None) -> Trace | None:
    """Run what `words` say and return the trace, written to `folder`; None on a rank that only serves.

    Raises ConfigError where the folder holds a trace already, and what the launch and `check` raise, all of it before
    the model is loaded.
    """
    place = torchrun_env()
    first = place is None or place.rank == 0
    if first:
        check_folder(folder)  # the others might look when rank 0 has begun to write
    else:
        console = PlainConsole(StringIO())
    if words.value("balance.record") == "off":
        raise ConfigError("balance.record=off: nothing would be recorded. Leave it out: per_token is the default here.")
    defaults = [word for word in _DEFAULTS if not words.gives(word.partition("=")[0])]
    composed, meeting = decide([*defaults, *words.launch, f"balance.trace={folder}"], torchrun=place)
    config = composed.config
    prompts = workload(words, composed)
    check(trace_header(config, composed.model, None))
    console.line(
        f"{config.model} on {composed.topology}: {count(len(prompts), 'prompt')}, at most "
        f"{count(config.sampling.max_tokens, 'new token')} each, into {folder}"
    )
    try:
        with _load(composed, meeting, console) as llm:
            if not llm.owns_requests:
                llm.generate([])
                return None
            save_run(folder, words)
            with watched(console, f"running {count(len(prompts), 'prompt')}", lambda: _state(llm, len(prompts))):
                outputs = llm.generate(prompts, SamplingParams(**asdict(config.sampling)))
            steps = llm.num_steps
    except BaseException:
        if first and not _discard_empty(folder):
            console.line(f"what was recorded until then is in {folder}")
        raise
    written = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    console.line(f"{count(written, 'token')} written in {count(steps, 'step')}; the trace is in {folder}")
    trace = read_trace(folder)
    if not trace.num_windows:
        raise TraceError(f"{folder}: no step with tokens was recorded. Give prompts, or sampling.max_tokens above 1.")
    return trace


def _load(composed: Composed, meeting: Meeting | None, console: Console) -> LLM:
    loaded, ranks = 0, composed.topology.world if composed.topology.launcher == "virtual" else 1
    total = ranks * composed.model.num_layers

    def on_progress(_: LoadProgress) -> None:
        nonlocal loaded
        loaded += 1

    title = f"loading {composed.config.model} on {count(ranks, 'rank')}"
    with watched(console, title, lambda: f"{min(loaded, total)} of {total} layers"):
        return LLM.from_composed(composed, meeting=meeting, on_progress=on_progress)


def _state(llm: LLM, num_prompts: int) -> str:
    now = llm.snapshot()
    return f"step {now.step}, {now.num_finished_requests} of {num_prompts} done, {now.num_output_tokens} tokens written"


def workload(words: Words, composed: Composed) -> list[str | Sequence[int]]:
    """The prompts of the file or of the model, or random token ids in which some are far more frequent than others."""
    kind = words.one_of("workload", ("prompts", "synthetic"))
    config, model = composed.config, composed.model
    if kind == "prompts":
        if given := [key for key in ("requests", "prompt_tokens") if key in words.own]:
            raise ConfigError(f"{given[0]}={words.own[given[0]]}: belongs to random prompts. Add workload=synthetic.")
        found = own_prompts(composed.model_path) if config.prompts is None else read_prompts(Path(config.prompts))
        return [prompt.value for prompt in found]
    if config.prompts is not None:
        raise ConfigError(f"prompts={config.prompts}: workload=synthetic draws its own. Leave one of them out.")
    requests = words.whole("requests", 64, least=1)
    length = words.whole("prompt_tokens", 64, least=1)
    assert requests is not None and length is not None, "both have defaults"
    generator = np.random.default_rng(config.seed)
    rank_of = np.stack([generator.permutation(model.vocab_size) for _ in range(min(requests, 8))])
    ids = np.minimum(generator.zipf(1.3, size=(requests, length)), model.vocab_size) - 1
    return [rank_of[number % len(rank_of)][row].tolist() for number, row in enumerate(ids)]


def _discard_empty(folder: Path) -> bool:
    """Remove what a run that failed has left in `folder`, unless a window was written; whether nothing is left."""
    with suppress(OSError, TraceError):
        if read_header(folder).next_part:
            return False
        for name in (HEADER_FILE, SNAPSHOT_NAME, RUN_FILE):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    return True


def check_folder(folder: Path) -> None:
    """ConfigError where no trace can be begun in `folder`."""
    if file := next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None):
        raise ConfigError(f"output={folder}: {file} is a file, and a trace is a folder. Name another one.")
    if has_trace(folder):
        free = free_folder(folder)
        raise ConfigError(f"output={folder}: holds a trace already. Remove it, or write elsewhere: output={free}")
    near = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    try:
        with TemporaryDirectory(prefix=".", dir=near):
            pass
    except OSError as error:
        raise ConfigError(
            f"output={folder}: no folder can be made in {near}: {error.strerror}. Name one in a folder of yours."
        ) from None


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that holds no trace."""
    if not has_trace(folder):
        return folder
    return next(name for n in range(2, 100_000) if not has_trace(name := folder.with_name(f"{folder.name}-{n}")))
