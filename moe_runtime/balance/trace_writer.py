"""TraceWriter: windows to a folder, part by part, under a byte cap. One thread at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from moe_runtime.balance.files import write_atomic
from moe_runtime.balance.trace_header import HEADER_FILE, TraceHeader, has_trace
from moe_runtime.balance.trace_parts import Change, Window, encode_part, part_bytes, part_name, stray_parts
from moe_runtime.errors import TraceError

PART_BYTES: Final = 4 * 2**20
"""A part is written once it holds so much,"""
PART_SECONDS: Final = 5.0
"""or once its first window waits so long when another comes."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What the writer knows of a part."""

    number: int
    num_bytes: int
    num_windows: int
    num_tokens: int
    moved: Mapping[int, Change]
    """The last change of each layer that moved"""


class TraceWriter:
    """Begins a trace in `folder`, which it makes. TraceError where that holds a trace or cannot be written.

    At most `cap_bytes` of parts are kept: the oldest ones are dropped, the header counts what they held, and its
    placement goes on to that of the first one kept. A part that alone is more is not written, and counts as dropped.
    """

    def __init__(self, folder: str | Path, header: TraceHeader, *, cap_bytes: int = 2**30) -> None:
        self._folder = Path(folder)
        self._cap = cap_bytes
        self._part_bytes = min(PART_BYTES, cap_bytes // 4)
        if has_trace(self._folder):
            raise TraceError(trace_exists(folder))
        created = header.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        fresh = {"first_part": 0, "next_part": 0, "dropped_windows": 0, "dropped_tokens": 0, "complete": False}
        self._header = replace(header, created=created, **fresh)  # type: ignore[arg-type]
        self._kept: deque[_Part] = deque()
        self._windows: list[Window] = []
        self._tokens: list[Mapping[str, Tensor]] = []
        self._changes: list[Change] = []
        self._waiting_bytes = 0
        self._waiting_since = 0.0
        self._lacks = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in stray_parts(self._folder):
                raise TraceError(f"{str(file)!r} is of another trace. Give an empty folder.")
            self._write_header()
        except OSError as error:
            raise TraceError(f"{str(folder)!r} cannot be written: {error}. Give a folder of your own.") from error

    @property
    def header(self) -> TraceHeader:
        """As it stands in the folder."""
        return self._header

    def add(
        self,
        windows: Sequence[Window],
        tokens: Mapping[str, Tensor] | None = None,
        changes: Sequence[Change] = (),
    ) -> None:
        """Take windows, the tokens whose `window` (0..) counts among them, and the moves of experts since the windows
        before, in the order of their steps. OSError where the disk refuses them."""
        if not windows:
            return
        now = time.monotonic()
        if not self._windows:
            self._waiting_since = now
        if tokens is not None and len(tokens["routes"]):
            self._tokens.append({**tokens, "window": tokens["window"] + len(self._windows)})
        self._windows += windows
        self._changes += changes
        count = 0 if tokens is None else len(tokens["routes"])
        self._waiting_bytes += part_bytes(self._header, windows=len(windows), tokens=count, changes=len(changes))
        if self._waiting_bytes >= self._part_bytes or now - self._waiting_since >= PART_SECONDS:
            self.flush()

    def drop(self, num_windows: int, num_tokens: int) -> None:
        """Count windows that were never added, and their tokens with routes: such a trace is never complete. OSError
        as of any write."""
        if num_windows:
            self._lacks = True
            self._header = _counted(self._header, num_windows, num_tokens)
            self._write_header()

    def flush(self) -> None:
        """Write what is waiting. OSError as of any write."""
        if not self._windows:
            return
        windows, tokens, changes = self._windows, self._joined(), self._changes
        self._windows, self._tokens, self._changes, self._waiting_bytes = [], [], [], 0
        count = len(tokens["routes"]) if tokens else 0
        data = encode_part(windows, tokens, changes)
        number = self._header.next_part
        part = _Part(number, len(data), len(windows), count, {change.layer: change for change in changes})
        if part.num_bytes > self._cap:
            if self._kept:  # the header's placement is theirs, so the next part says what moved in this one
                self._changes, part = sorted(part.moved.values()), replace(part, moved={})
            self._header = _dropped(self._header, part)
            self._write_header()
            return
        self._make_room(part.num_bytes)
        write_atomic(self._folder / part_name(number), data)
        self._kept.append(part)
        self._header = replace(self._header, next_part=number + 1)
        self._write_header()

    def close(self) -> None:
        """Write what is waiting and mark the trace as complete, unless it lacks windows. OSError as of any write."""
        self.flush()
        self._header = replace(self._header, complete=not self._lacks)
        self._write_header()

    def _make_room(self, num_bytes: int) -> None:
        """Drop parts, the oldest first; the header stops naming a part before it goes."""
        while self._kept and sum(part.num_bytes for part in self._kept) + num_bytes > self._cap:
            part = self._kept.popleft()
            self._header = replace(_dropped(self._header, part), first_part=part.number + 1)
            self._write_header()
            (self._folder / part_name(part.number)).unlink(missing_ok=True)

    def _joined(self) -> dict[str, Tensor]:
        if not self._tokens:
            return {}
        return {name: torch.cat([own[name] for own in self._tokens]) for name in self._tokens[0]}

    def _write_header(self) -> None:
        write_atomic(self._folder / HEADER_FILE, self._header.to_json().encode())


def trace_exists(folder: str | Path) -> str:
    """The error's text where a trace is in the way."""
    return f"{str(folder)!r} holds a trace already: one folder, one trace. Give another folder, or remove this one."


def _dropped(header: TraceHeader, part: _Part) -> TraceHeader:
    rows = header.phy2log
    if rows is not None and part.moved:
        rows = tuple([part.moved[layer].row if layer in part.moved else row for layer, row in enumerate(rows)])
    return _counted(replace(header, phy2log=rows), part.num_windows, part.num_tokens)


def _counted(header: TraceHeader, num_windows: int, num_tokens: int) -> TraceHeader:
    return replace(
        header,
        dropped_windows=header.dropped_windows + num_windows,
        dropped_tokens=header.dropped_tokens + num_tokens,
    )
