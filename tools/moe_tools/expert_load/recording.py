"""Runs a model over prompts while its engine records a trace; `record`, `apply` and `report` without a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Final

import numpy as np

from moe_runtime.api import LLM
from moe_runtime.balance.trace import Trace, has_trace, read_trace
from moe_runtime.cli.console import Console, PlainConsole, count
from moe_runtime.cli.prompts import own_prompts, read_prompts
from moe_runtime.engine.request import SamplingParams
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.env import torchrun_env
from moe_runtime.launch.meeting import decide
from moe_tools.expert_load.words import WORKLOAD_KEYS, Words

RUN_FILE: Final = "run.json"
"""Beside a trace: how the tool ran it."""
DEFAULT_FOLDER: Final = "runs/expert_load"
_DEFAULTS: Final = ("balance.record=per_token", "balance.window_steps=4")
"""Unlike serving, a recording is short and wants everything."""


def record(words: Words, folder: Path, console: Console) -> Trace | None:
    """Run what `words` say and return the trace, written to `folder`; None on a rank that only serves.

    Raises ConfigError where the folder holds a trace already, and what the launch raises.
    """
    place = torchrun_env()
    if place is None or place.rank == 0:
        refuse_used(folder)  # the others might look when rank 0 has begun to write
    else:
        console = PlainConsole(StringIO())
    composed, meeting = decide([*_defaults(words), *words.launch, f"balance.trace={folder}"], torchrun=place)
    prompts = workload(words, composed)
    params = SamplingParams(**asdict(composed.config.sampling))
    with console.progress(f"loading {composed.config.model} on {composed.topology}", 0) as advance:
        llm = LLM.from_composed(
            composed, meeting=meeting, on_progress=lambda progress: advance(0, f"rank {progress.rank}")
        )
    with llm:
        if not llm.owns_requests:
            llm.generate([])
            return None
        with console.progress(f"running {count(len(prompts), 'prompt')}", 0):
            outputs = llm.generate(prompts, params)
        steps = llm.num_steps
    written = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    console.line(f"{count(written, 'token')} written in {count(steps, 'step')}; the trace is in {folder}")
    (folder / RUN_FILE).write_text(json.dumps(_run_of(words), indent=1) + "\n", encoding="utf-8")
    trace = read_trace(folder)
    if not trace.num_windows:
        raise TraceError(f"{folder}: no step with tokens was recorded. Give prompts, or sampling.max_tokens above 1.")
    return trace


def workload(words: Words, composed: Composed) -> list[str | Sequence[int]]:
    """The prompts of the file or of the model, or random token ids in which some are far more frequent than others."""
    kind = words.one_of("workload", ("prompts", "synthetic"))
    config, model = composed.config, composed.model
    if kind == "prompts":
        if given := [key for key in ("requests", "prompt_tokens") if key in words.own]:
            raise ConfigError(f"{given[0]}={words.own[given[0]]}: belongs to random prompts. Add workload=synthetic.")
        found = own_prompts(composed.model_path) if config.prompts is None else read_prompts(Path(config.prompts))
        return [prompt.value for prompt in found]
    requests = words.whole("requests", 64, least=1)
    length = words.whole("prompt_tokens", 64, least=1)
    assert requests is not None and length is not None, "both have defaults"
    generator = np.random.default_rng(config.seed)
    rank_of = np.stack([generator.permutation(model.vocab_size) for _ in range(min(requests, 8))])
    ids = np.minimum(generator.zipf(1.3, size=(requests, length)), model.vocab_size) - 1
    return [rank_of[number % len(rank_of)][row].tolist() for number, row in enumerate(ids)]


def repeated(words: Words, folder: Path) -> Words:
    """`words` after those of the recording in `folder`, less where that one put its experts and its files."""
    try:
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        launch, own = list(map(str, saved["launch"])), {str(k): str(v) for k, v in saved["own"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"trace={folder}: {RUN_FILE} does not say how it was run ({error}). Leave trace= out, and give the "
            "launch's keys instead: apply plan=plan.json model=demo ep=32."
        ) from None
    kept = [word for word in launch if not word.startswith(("placement.", "balance.rebalance", "balance.save_"))]
    choice = [word for word in launch if word.startswith("placement.replica_choice=")]
    return Words(words.command, {**own, **words.own}, (*kept, *choice, *words.launch))


def words_of_run(folder: Path) -> tuple[str, ...]:
    """The launch's words of a recording of this tool; none where another program recorded."""
    try:
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return tuple(map(str, saved["launch"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def refuse_used(folder: Path) -> None:
    """ConfigError where `folder` holds a trace, with a free name beside it."""
    if not has_trace(folder):
        return
    free = next(f"{folder}-{n}" for n in range(2, 10_000) if not Path(f"{folder}-{n}").exists())
    raise ConfigError(f"output={folder}: holds a trace already. Remove it, or write elsewhere: output={free}.")


def _defaults(words: Words) -> list[str]:
    return [word for word in _DEFAULTS if not words.gives(word.partition("=")[0])]


def _run_of(words: Words) -> dict[str, object]:
    own = {key: value for key, value in words.own.items() if key in WORKLOAD_KEYS}
    return {"version": 1, "launch": list(words.launch), "own": own}
