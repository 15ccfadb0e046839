"""How far a long part of the work has come."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from moe_runtime.cli.console import Advance, Console

_EVERY_S: Final = 0.2
_CALM_S: Final = 5.0


@contextmanager
def watched(console: Console, title: str, state: Callable[[], str], *, calm_s: float = _CALM_S) -> Iterator[None]:
    """Shows `title`, then `state()` while the block runs: in place on a terminal, elsewhere a line on stderr every
    `calm_s` seconds. `state` is called on a thread of its own."""
    over = threading.Event()
    with console.progress(title, 0) as advance:
        show, every_s = (_in_place(advance), _EVERY_S) if sys.stdout.isatty() else (_as_line(title), calm_s)
        watcher = threading.Thread(target=_watch, args=(over, every_s, state, show), name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _watch(over: threading.Event, every_s: float, state: Callable[[], str], show: Callable[[str], None]) -> None:
    while not over.wait(every_s):
        show(state())


def _in_place(advance: Advance) -> Callable[[str], None]:
    return lambda text: advance(0, text)


def _as_line(title: str) -> Callable[[str], None]:
    return lambda text: print(f"{title}: {text}", file=sys.stderr, flush=True)
