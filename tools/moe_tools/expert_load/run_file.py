"""run.json beside a trace: the words of the recording, so that `apply` can repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_runtime.balance.trace import TraceHeader
from moe_runtime.errors import ConfigError
from moe_runtime.launch.data import shape_names
from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.expert_load.words import WORKLOAD_KEYS, Words

RUN_FILE: Final = "run.json"
_VERSION: Final = 1
_PATHS: Final = ("prompts", "model", "placement.file")
_NOT_REPEATED: Final = ("placement.", "snapshot_file=", "ep=", "tp=", "dp=", "ranks_per_node=")
_OF_RECORDING: Final = ("balance.record=", "balance.window_steps=", "balance.trace_bytes=")
"""The only ones of `balance` that are repeated: a run under a plan keeps its experts where the plan has them."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """How this tool ran a recording. `launch`: words; `own`: the workload's keys."""

    launch: tuple[str, ...]
    own: Mapping[str, str]


def save_run(folder: Path, words: Words) -> None:
    """Write it, with absolute paths, so that it can be repeated from any folder."""
    own = {key: value for key, value in words.own.items() if key in WORKLOAD_KEYS}
    run = {"version": _VERSION, "launch": [_absolute(word) for word in words.launch], "own": own}
    (folder / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def read_run(folder: Path) -> SavedRun | None:
    """None where another program recorded, or the file is not as `save_run` writes it."""
    try:
        saved: Any = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if saved["version"] != _VERSION:
            return None
        return SavedRun(tuple(map(str, saved["launch"])), {str(k): str(v) for k, v in saved["own"].items()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def repeated(words: Words, folder: Path, header: TraceHeader, plan: ExpertPlacement) -> Words:
    """`words` after those of the recording in `folder`, on the plan's ranks, less what belonged to that run alone:
    where it put its experts and its files. ConfigError where nobody knows how it was run."""
    run = read_run(folder)
    if run is None:
        raise ConfigError(
            f"trace={folder}: there is no {RUN_FILE} that says how it was run. Leave trace= out, and give the launch's "
            f"keys instead: apply plan={words.own['plan']} model={header.model} ep={plan.ep}"
        )
    # Attention's tp stays where the plan's ranks allow it.
    mesh = {"ep": plan.ep, "tp": header.tp if plan.ep % header.tp == 0 else 1, "ranks_per_node": header.ranks_per_node}
    if words.gives("dp"):
        del mesh["tp"]
    kept = [word for word in run.launch if not word.startswith((*_NOT_REPEATED, "balance."))]
    kept += [word for word in run.launch if word.startswith((*_OF_RECORDING, "placement.replica_choice="))]
    kept += [f"{key}={value}" for key, value in mesh.items()]
    kept = [word for word in kept if not words.gives(word.partition("=")[0])]
    return Words(words.command, {**run.own, **words.own}, (*kept, *words.launch))


def _absolute(word: str) -> str:
    key, _, value = word.partition("=")
    if key not in _PATHS or value in ("demo", *shape_names()) or not Path(value).exists():
        return word
    return f"{key}={Path(value).resolve()}"
