"""Executor: runs the engines of all ranks behind one request owner."""

from __future__ import annotations

import traceback
from typing import Protocol


class Executor(Protocol):
    """Started once, closed once. `serves_only`: this process's ranks do not own the requests."""

    @property
    def serves_only(self) -> bool: ...

    def serve(self) -> None:
        """Where `serves_only`: run this process's rank until the owner stops."""

    def close(self, error: BaseException | None = None) -> None:
        """Wait for the last step (the owner was told to stop) and for the release of everything. Idempotent.

        `error`: this process's program has failed; where `serves_only`, the other ranks are told instead of served.
        Does not wait where it is called on a thread that the executor itself waits for.
        """


def without_frames(failure: BaseException) -> BaseException:
    """The failure with its traceback's lines, but without what its frames hold: they would keep the engine alive."""
    error: BaseException | None = failure
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    return failure
