"""Lockstep: every rank tells its wish, and one pure function turns all wishes into the one step that all ranks take.

Nothing about a step's shape is decided anywhere else: phase, padding, chunks and who is idle follow from the same rows
on every rank. A DP group is the tp ranks that share one scheduler; between attention blocks its tokens are scattered
over them, so a group of `padded` tokens enters a dispatch with `padded / tp` on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from moe_runtime.dispatch.base import Phase
from moe_runtime.errors import ConfigError


class Padding(StrEnum):
    """How many token rows a DP group runs."""

    AUTO = "auto"
    """MAX in pure decode steps where they are captured as graphs, else OWN."""
    MAX = "max"
    """Every group as many as the largest."""
    OWN = "own"
    """Its own tokens rounded up to a multiple of tp."""


class Wish(NamedTuple):
    """One DP group's wish for the next step; a tuple of integers, as which it crosses the control plane.

    `outstanding`: tokens still to compute for the group's live requests, at their longest.
    """

    step: int = 0
    num_tokens: int = 0
    num_decode_tokens: int = 0
    outstanding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepLimits:
    """What `agree` needs besides the wishes, equal on all ranks.

    `receive_bytes_per_token`: worst case that a rank receives in one dispatch, per token that each rank sends;
    `receive_bytes_cap` (None = no cap) is engine.dispatch_buffer_bytes. `max_capacity`: the dispatcher's own limit on
    tokens per rank. ConfigError where not even one token per rank fits.
    """

    tp: int = 1
    padding: Padding = Padding.AUTO
    captures_graphs: bool = False
    receive_bytes_per_token: int = 0
    receive_bytes_cap: int | None = None
    max_capacity: int | None = None

    def __post_init__(self) -> None:
        if self.tp < 1 or (self.max_capacity is not None and self.max_capacity < 1):
            raise ConfigError(f"tp={self.tp}, max_capacity={self.max_capacity}: both must be at least 1")
        if self.receive_bytes_cap is not None and self.receive_bytes_per_token > self.receive_bytes_cap:
            raise ConfigError(
                f"engine.dispatch_buffer_bytes={self.receive_bytes_cap}: one token per rank already needs "
                f"{self.receive_bytes_per_token} bytes "
                f"(set engine.dispatch_buffer_bytes={self.receive_bytes_per_token} or more)"
            )

    def chunk_limit(self, capacity: int) -> int:
        """The most tokens per rank that may enter one dispatch, at least 1 and at most `capacity`."""
        limit = capacity
        if self.receive_bytes_cap is not None and self.receive_bytes_per_token > 0:
            limit = min(limit, self.receive_bytes_cap // self.receive_bytes_per_token)
        if self.max_capacity is not None:
            limit = min(limit, self.max_capacity)
        return max(limit, 1)


@dataclass(frozen=True, slots=True)
class AgreedStep:
    """The step that all ranks take.

    `padded_tokens`: rows per DP group, multiples of tp. `capacity`: the most tokens with which a rank enters the MoE
    layer, which it takes in `num_chunks` turns of at most `chunk_tokens`. `idle`: groups without real tokens; they run
    the same code. `outstanding`: the wishes', per group.
    """

    step: int
    phase: Phase
    padded_tokens: tuple[int, ...]
    capacity: int
    num_chunks: int
    chunk_tokens: int
    idle: tuple[int, ...]
    num_tokens: int
    outstanding: tuple[int, ...]


def agree(wishes: Sequence[Sequence[int]], *, limits: LockstepLimits) -> AgreedStep:
    """The step that follows from one wish per DP group, in group order. Pure: equal rows, equal step, on every rank.

    `wishes` are `Wish`es, or the rows as which they crossed the control plane. ValueError where the groups are not at
    the same step.
    """
    steps, tokens, decodes, outstanding = zip(*wishes, strict=True)
    if min(steps) != max(steps):
        behind = [f"group {group} at {step}" for group, step in enumerate(steps) if step != max(steps)]
        raise ValueError(f"groups out of step: {', '.join(behind)}, the others at {max(steps)}")
    total = sum(tokens)
    if total == 0:
        phase = Phase.IDLE
    elif total == sum(decodes):
        phase = Phase.DECODE
    else:
        phase = Phase.MIXED
    padded = _pad(tokens, phase, limits)
    capacity = max(padded) // limits.tp
    chunk_tokens = limits.chunk_limit(capacity)
    num_chunks = -(-capacity // chunk_tokens)
    if num_chunks > 1:  # even turns: the last one is not left with a remnant
        chunk_tokens = -(-capacity // num_chunks)
        num_chunks = -(-capacity // chunk_tokens)
    return AgreedStep(
        step=steps[0],
        phase=phase,
        padded_tokens=padded,
        capacity=capacity,
        num_chunks=num_chunks,
        chunk_tokens=chunk_tokens,
        idle=tuple([group for group, count in enumerate(tokens) if not count]) if 0 in tokens else (),
        num_tokens=total,
        outstanding=outstanding,
    )


def _pad(tokens: tuple[int, ...], phase: Phase, limits: LockstepLimits) -> tuple[int, ...]:
    tp = limits.tp
    match limits.padding:
        case Padding.OWN:
            to_max = False
        case Padding.MAX:
            to_max = True
        case Padding.AUTO:
            to_max = limits.captures_graphs and phase is Phase.DECODE
    if to_max:
        return (-(-max(tokens) // tp) * tp,) * len(tokens)
    return tokens if tp == 1 else tuple([-(-count // tp) * tp for count in tokens])


def choose_group(outstanding: Sequence[int]) -> int:
    """The DP group with the fewest outstanding tokens; the lowest index on a tie."""
    return min(range(len(outstanding)), key=outstanding.__getitem__)


class GroupBalancer:
    """Spreads requests over DP groups at their owner: the groups' last reports plus what was assigned since.

    Without the second part, all requests that arrive between two steps would go to the same group. Units are tokens,
    prompt and output, at a request's longest.
    """

    __slots__ = ("_outstanding",)

    def __init__(self, num_groups: int) -> None:
        self._outstanding = [0] * num_groups

    def assign(self, num_tokens: int) -> int:
        """The group for a request of so many tokens, accounted for at once."""
        group = choose_group(self._outstanding)
        self._outstanding[group] += num_tokens
        return group

    def report(self, outstanding: Sequence[int], queued: Sequence[int]) -> None:
        """The groups' own counts (`AgreedStep.outstanding`), and what was assigned too late for that step."""
        self._outstanding[:] = [own + late for own, late in zip(outstanding, queued, strict=True)]
