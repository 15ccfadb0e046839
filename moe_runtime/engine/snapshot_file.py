"""SnapshotFile: EngineSnapshot as a JSON file that is replaced while the engine runs. Another program may read it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from moe_runtime.balance.files import not_writable, write_atomic
from moe_runtime.engine.disk import DiskThread
from moe_runtime.engine.recording import LoadWindow
from moe_runtime.engine.snapshot import EngineSnapshot
from moe_runtime.errors import ConfigError

FORMAT: Final = "moe_runtime.snapshot"
VERSION: Final = 1
INTERVAL_S: Final = 0.5


class SnapshotFile:
    """Written at most every `interval_s`, whole or not at all, beside the steps: of snapshots that wait for the disk
    the newest is written. `run`: what stays as it is; `within_s`: how long the end waits for the disk.

    The document: {"format", "version", "written_at": Unix time in seconds, "pid", "run", "engine": the snapshot's
    fields, "window": the last LoadWindow's, or null}. ConfigError where the folder cannot be written to.
    """

    def __init__(
        self, path: Path, run: Mapping[str, object], *, within_s: float, interval_s: float = INTERVAL_S
    ) -> None:
        self._path = path
        self._run = dict(run)
        self._within_s = within_s
        self._interval_s = interval_s
        self._disk = DiskThread(self._write, name="snapshot-file")
        self._due_at = 0.0
        self._window: LoadWindow | None = None
        self._window_text = "null"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"snapshot_file={str(path)!r}: cannot be written: {error}. Give another path.") from error
        if (problem := not_writable(path)) is not None:
            raise ConfigError(f"snapshot_file={str(path)!r}: {problem}")

    def offer(self, take: Callable[[], EngineSnapshot]) -> None:
        """Have what `take` returns written, if it is time to. A disk that refuses is asked again the next time."""
        now = time.monotonic()
        if now >= self._due_at:
            self._due_at = now + self._interval_s
            self._disk.offer(take())

    def close(self, snapshot: EngineSnapshot) -> None:
        """Write the last one, and tell in the log where that failed or took longer than `within_s`."""
        self._disk.take_failure()
        self._disk.offer(snapshot)
        in_time = self._disk.wait(self._within_s)
        failure = self._disk.take_failure() if in_time else f"not within {self._within_s:g} s of the run's end"
        if failure is not None:
            text = "snapshot_file=%r: the last snapshot was not written: %s"
            logging.getLogger(__name__).warning(text, str(self._path), failure)

    def _write(self, snapshot: EngineSnapshot) -> None:
        if snapshot.window is not self._window:
            self._window = snapshot.window
            self._window_text = json.dumps(plain(snapshot.window), separators=(",", ":"))
        engine = {item.name: plain(getattr(snapshot, item.name)) for item in fields(snapshot) if item.name != "window"}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "written_at": time.time(),
            "pid": os.getpid(),
            "run": self._run,
            "engine": engine,
        }
        text = json.dumps(head, separators=(",", ":"))[:-1] + f',"window":{self._window_text}}}\n'
        write_atomic(self._path, text.encode())


def read_snapshot(path: str | Path) -> dict[str, Any]:
    """The document of a snapshot file. ConfigError where it is none or of another version."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read: {error}. Give the snapshot_file of a running engine."
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f'{str(path)!r} is no snapshot: must be JSON with "format": "{FORMAT}".')
    if document.get("version") != VERSION:
        raise ConfigError(f"{str(path)!r}: version={document.get('version')!r}; this program reads version {VERSION}.")
    return document


def plain(value: object) -> Any:
    """Dataclasses and named tuples as objects by field, enums as their values, tensors and tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    match value:
        case Enum():
            return plain(value.value)
        case Tensor():
            return value.tolist()
        case tuple() if hasattr(value, "_asdict"):
            return {name: plain(part) for name, part in value._asdict().items()}
        case list() | tuple():
            return [plain(part) for part in value]
        case Mapping():
            return {str(key): plain(part) for key, part in value.items()}
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
