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
    """OWN, but a decode step that runs as a captured graph has that graph's size in every group."""
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

    `graph_sizes`: rows per DP group, ascending multiples of tp, of the decode steps that are captured as graphs.

    `max_tokens`, `max_decode_tokens`: most tokens per rank that the dispatcher takes at once, of a step with prompts
    and of one without (None = any number); larger steps take several turns.

    `two_batch_tokens`, `two_batch_decode_tokens`: rows of the largest group from which on a step of either kind is cut
    into two micro-batches that overlap (None = never).

    `split_combine`: steps with prompts that are not cut bring the experts' outputs home in two parts.
    """

    tp: int = 1
    padding: Padding = Padding.AUTO
    graph_sizes: tuple[int, ...] = ()
    max_tokens: int | None = None
    max_decode_tokens: int | None = None
    two_batch_tokens: int | None = None
    two_batch_decode_tokens: int | None = None
    split_combine: bool = False

    def __post_init__(self) -> None:
        limits = (self.max_tokens, self.max_decode_tokens)
        if self.tp < 1 or any(limit is not None and limit < 1 for limit in limits):
            raise ConfigError(f"tp={self.tp}, most tokens of a dispatch {limits}: all must be at least 1")
        assert list(self.graph_sizes) == sorted(set(self.graph_sizes)), f"graph sizes ascend: {self.graph_sizes}"
        assert not any(size % self.tp for size in self.graph_sizes), f"multiples of {self.tp}: {self.graph_sizes}"

    def num_micro_batches(self, rows: int, phase: Phase) -> int:
        """1 or 2, for a step whose largest group has so many padded rows."""
        least = self.two_batch_tokens if phase is Phase.MIXED else self.two_batch_decode_tokens
        return 2 if least is not None and rows >= least and rows > self.tp else 1

    def chunk_limit(self, capacity: int, phase: Phase) -> int:
        """The most tokens per rank that may enter one dispatch, at least 1 and at most `capacity`."""
        limit = self.max_tokens if phase is Phase.MIXED else self.max_decode_tokens
        return max(capacity if limit is None else min(limit, capacity), 1)

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Those of `graph_sizes` that fit into one dispatch: a step of several turns runs eagerly."""
        return tuple([size for size in self.graph_sizes if self._in_one_turn(size)])

    def graph_size(self, most_tokens: int) -> int | None:
        """The captured size for a decode step whose largest group has so many tokens; None: the step runs eagerly."""
        size = next((size for size in self.graph_sizes if size >= most_tokens), None)
        return size if size is not None and self._in_one_turn(size) else None

    def _in_one_turn(self, rows: int) -> bool:
        most = cut_rows(rows, self.num_micro_batches(rows, Phase.DECODE), tp=self.tp)[0] // self.tp
        return self.chunk_limit(most, Phase.DECODE) == most


@dataclass(frozen=True, slots=True)
class AgreedStep:
    """The step that all ranks take.

    `padded_tokens`: rows per DP group, multiples of tp. `capacity`: the most tokens with which a rank enters the MoE
    layer in one micro-batch; they take `num_chunks` turns of at most `chunk_tokens`. `idle`: groups without real
    tokens; they run the same code. `outstanding`: the wishes', per group. `graph`: the step is one that all ranks have
    captured; every group has equal rows.
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
    graph: bool = False
    num_micro_batches: int = 1
    """Each group's rows are cut by `cut_rows`."""
    split_combine: bool = False
    """See `DispatchStep.split_combine`."""


def cut_rows(rows: int, num_micro_batches: int, *, tp: int) -> tuple[int, ...]:
    """Rows of a group per micro-batch, multiples of tp; the first has as many as the second or tp more."""
    if num_micro_batches == 1:
        return (rows,)
    first = -(-rows // (2 * tp)) * tp
    return (first, rows - first)


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
    size = limits.graph_size(max(tokens)) if limits.graph_sizes and phase is Phase.DECODE else None
    padded = _pad(tokens, limits) if size is None else (size,) * len(tokens)
    micro_batches = limits.num_micro_batches(max(padded), phase)
    capacity = cut_rows(max(padded), micro_batches, tp=limits.tp)[0] // limits.tp
    chunk_tokens = limits.chunk_limit(capacity, phase)
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
        graph=size is not None,
        num_micro_batches=micro_batches,
        split_combine=limits.split_combine and phase is Phase.MIXED and micro_batches == 1,
    )


def default_graph_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 up to 256 and every 16 beyond, up to the first that holds `most` rows; so at most 15 rows
    of a captured step are padding (the sizes that vLLM and SGLang capture)."""
    steps = [1, 2, 4, *range(8, 257, 8), *range(272, most + 16, 16)]
    return graph_sizes(steps, most=most, tp=1)


def graph_sizes(wanted: Sequence[int], *, most: int, tp: int) -> tuple[int, ...]:
    """`wanted` rows per DP group, rounded up to multiples of `tp`, ascending, without those that no step of up to
    `most` tokens would take. ConfigError where one is below 1 or none is left."""
    if not wanted or min(wanted) < 1:
        raise ConfigError(
            f"engine.cuda_graph_sizes={list(wanted)}: give rows of a DP group, each at least 1, e.g. [1,2,4,8]; "
            "engine.cuda_graphs=off captures none"
        )
    sizes = sorted({-(-size // tp) * tp for size in wanted})
    enough = [size for size in sizes if size >= most]
    return tuple([size for size in sizes if size < most] + enough[:1])


def _pad(tokens: tuple[int, ...], limits: LockstepLimits) -> tuple[int, ...]:
    tp = limits.tp
    if limits.padding is Padding.MAX:
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
