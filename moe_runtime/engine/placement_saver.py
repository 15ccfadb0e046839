"""Placements written to disk beside the steps: a slow disk holds nobody up."""

from __future__ import annotations

import threading
from collections.abc import Callable

from moe_runtime.parallel.placement import ExpertPlacement


class PlacementSaver:
    """`write` runs on a thread of its own, once at a time; of the placements that wait, only the newest is kept."""

    def __init__(self, write: Callable[[ExpertPlacement], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._next: ExpertPlacement | None = None
        self._busy = False
        self._failure: str | None = None

    def offer(self, placement: ExpertPlacement) -> None:
        """To be written next. Returns at once."""
        with self._changed:
            self._next = placement
            if self._busy:
                return
            self._busy = True
        try:
            threading.Thread(target=self._run, name="placement-saver", daemon=True).start()
        except RuntimeError as error:  # the system has no more threads
            with self._changed:
                self._busy, self._failure = False, f"{type(error).__name__}: {error}"

    def take_failure(self) -> str | None:
        """What went wrong since the last call, if anything."""
        with self._changed:
            failure, self._failure = self._failure, None
            return failure

    def wait(self, within_s: float) -> bool:
        """Whether all that was offered has been tried, at the latest after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout=within_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                placement, self._next = self._next, None
                if placement is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
            try:
                self._write(placement)
            except Exception as error:  # noqa: BLE001 - told where serving goes on
                with self._changed:
                    self._failure = f"{type(error).__name__}: {error}"
