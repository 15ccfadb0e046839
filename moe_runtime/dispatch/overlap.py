"""Overlap as a schedule: micro-batches take turns, and what one has sent travels while another computes.

A micro-batch is a generator that yields the stage whose result it needs next, right after it has begun it. Nothing else
knows of overlap: the layers are written once. With one micro-batch the schedule runs it through.

On CUDA everything computes on the current stream; collectives run on their library's own and are waited for there, so
the host goes on. Where stages stand still (virtual ranks), only their order matters, and `on_stage` sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class Stage(StrEnum):
    """What a micro-batch waits for next."""

    DISPATCH = "dispatch"
    """Tokens on their way to the experts."""
    COMBINE = "combine"
    """Their outputs on the way home."""


Stages = Generator[Stage, None, T]
"""A program that stops wherever it has begun a stage, and gives T at its end."""

OnStage = Callable[[int, Stage | None], None]
"""Called with the micro-batch and the stage that it has begun; None: it has ended."""


def interleave(programs: Sequence[Stages[T]], on_stage: OnStage | None = None) -> list[T]:
    """The results of `programs`, which take turns: each runs to its next stage.

    All have the same stages, so every rank begins all collectives in one order: program 0's first, then program 1's,
    and so on. An error of one closes all.
    """
    results: dict[int, T] = {}
    try:
        while len(results) < len(programs):
            for number, program in enumerate(programs):
                if number in results:
                    continue
                try:
                    stage: Stage | None = next(program)
                except StopIteration as end:
                    results[number], stage = end.value, None
                if on_stage is not None:
                    on_stage(number, stage)
    finally:
        for program in programs:
            program.close()
    return [results[number] for number in range(len(programs))]


def run_through(program: Stages[T]) -> T:
    """The result of one program alone."""
    return interleave((program,))[0]
