"""Files that a tool writes: checked before the work, and never one that is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from moe_runtime.balance.trace import has_trace
from moe_runtime.errors import ConfigError

_RECORDS: Final = (".safetensors", ".npy", ".npz", ".jsonl")
"""Endings of what traces, other programs' records and models are kept in"""
_OF_TRACES: Final = ("trace.json", "run.json", "snapshot.json")
_OF_FOLDERS: Final = ("meta_info.json", "config.json")
"""Of a folder that is read: TensorRT-LLM's statistics, a model"""


def check_output(key: str, file: Path, *, reads: Sequence[str | Path | None] = ()) -> None:
    """ConfigError where `file`, which `key=` names, cannot be written, or would replace a part of a trace or what the
    command reads: `reads`, files and folders; None is left out. Better now than after the work."""
    folder = file.absolute().parent
    if file.is_dir():
        raise ConfigError(f"{key}={file}: is a folder. Name a file in it: {key}={file / 'FILE'}")
    if not folder.is_dir():
        near = next(parent for parent in folder.parents if parent.is_dir())
        raise ConfigError(
            f"{key}={file}: there is no folder {str(folder)!r}. Make it first: mkdir -p '{folder}'. Nearest: "
            f"{key}={near / file.name}"
        )
    if kept := _kept(file.resolve(), [Path(place).resolve() for place in reads if place is not None]):
        raise ConfigError(f"{key}={file}: {kept}. Name another file.")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"{key}={file}: cannot be written to. Name another file, in a folder of yours.")


def _kept(file: Path, reads: Sequence[Path]) -> str | None:
    """Why `file` must stay as it is, in words."""
    if file.suffix in _RECORDS:
        return f"{file.suffix} is the ending of parts of traces, other programs' records and models"
    if file.name in _OF_TRACES and has_trace(file.parent):
        return f"would overwrite what belongs to the trace in {str(file.parent)!r}"
    for place in reads:
        if file == place or (file.exists() and place.is_file() and file.samefile(place)):
            return "would overwrite what this command reads"
        if file.parent == place and file.name in _OF_FOLDERS:
            return f"would overwrite what belongs to {str(place)!r}, which this command reads"
    return None
