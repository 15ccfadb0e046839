"""What DeepEP V2 can hold and what it takes, from its sources (2.1.0). All of it is known before a run.

T tokens per rank, S ranks, K top-k, E slots per rank, H hidden, R received rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from moe_runtime.dispatch.deep_ep.width import SCALE_BLOCK
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.spec import DispatchSpec

HIDDEN_MULTIPLE: Final = 256
"""A warp of the combine kernel moves 32 x 16 bytes at a time."""
DOMAIN: Final = 8
"""Ranks within NVLink's reach of one another, where nothing else is known: a node of eight GPUs."""

MOST_TOP_K: Final = 32
MOST_RANKS: Final = 1024
MOST_SLOTS: Final = 256
MOST_EXPERTS: Final = 2048
MOST_NODES: Final = 32
"""Of the hybrid kernels; beyond it ranks send to all others directly."""

_OR_ELSE: Final = ", or set dispatch=all_to_all"
_MiB: Final = 1 << 20
_ALIGNMENT: Final = 2 * _MiB
_CHANNELS: Final = 1280
"""Of the hybrid kernels: 8 on each of up to 160 multiprocessors."""
WORKSPACE: Final = 14 * _MiB
"""Counters and flags, equal for all sizes (12.2 MiB, rounded up to 2)."""


def padded_hidden(hidden: int) -> int:
    return _up(hidden, HIDDEN_MULTIPLE)


def power_of_two(tokens: int) -> int:
    """The capacity for `tokens`: V2 compiles its kernels anew for every other one."""
    return 1 << max(0, tokens - 1).bit_length()


def capacities(spec: DispatchSpec) -> tuple[int, int]:
    """Tokens per rank of a dispatch with prompt tokens, and of one without."""
    return power_of_two(spec.max_tokens), power_of_two(spec.max_decode_tokens or spec.max_tokens)


def hybrid(nodes: int, ranks_per_node: int, num_slots: int) -> bool:
    """Whether the kernels that cross between nodes once per token and node can serve these ranks."""
    return nodes == 1 or (nodes <= MOST_NODES and ranks_per_node <= 64 and ranks_per_node + num_slots <= 128)


def unfit(spec: DispatchSpec) -> Missing | None:
    """Why V2's kernels cannot serve these sizes on any machine, or None."""
    slots = spec.rows.num_slots
    if spec.dtype is not torch.bfloat16:
        return Missing(f"tokens are {spec.dtype}, and DeepEP V2 sums in bf16 only", "Set dtype=bfloat16")
    for value, most, what, remedy in (
        (spec.top_k, MOST_TOP_K, "slots per token", "Set shared_experts=replicated"),
        (spec.ep, MOST_RANKS, "ranks in the ep group", f"Set ep={MOST_RANKS}"),
        (slots, MOST_SLOTS, "slots per rank", "Raise ep, or lower placement.num_redundant_experts"),
        (spec.num_physical, MOST_EXPERTS, "slots in all", "Lower placement.num_redundant_experts"),
    ):
        if value > most:
            return Missing(f"{value} {what}, and DeepEP V2 has room for at most {most}", remedy + _OR_ELSE)
    return None


def max_capacity(spec: DispatchSpec) -> int | None:
    """V2 has no limit of its own on the tokens of a dispatch: memory has."""
    return None


def buffer_bytes(spec: DispatchSpec, *, domain: int = DOMAIN) -> int:
    """Most bytes on a rank: the buffer, its workspace, and all that dispatches in flight hold at their worst.

    `domain`: ranks that NVLink joins; where more are, less is needed.
    """
    return symmetric_bytes(spec, domain=domain) + WORKSPACE + spec.in_flight * result_bytes(spec)


def symmetric_bytes(spec: DispatchSpec, *, domain: int = DOMAIN) -> int:
    """What `ElasticBuffer.get_buffer_size_hint` says for the larger of both capacities."""
    ranks_per_node = math.gcd(spec.ep, domain)
    nodes = spec.ep // ranks_per_node
    if not hybrid(nodes, ranks_per_node, spec.rows.num_slots):
        ranks_per_node, nodes = spec.ep, 1
    tokens, hidden, top_k = max(capacities(spec)), padded_hidden(spec.hidden), spec.top_k
    values, packs = (hidden, -(-hidden // 32)) if spec.rows.quantize else (2 * hidden, 0)
    there = _up(values, 32) + _up(4 * packs, 32) + _up(8 * top_k + 4 * (1 + top_k), 32)
    back = _up(2 * hidden, 32) + _up(8 * top_k, 32)
    if nodes == 1:
        # Without NVLink between all, what leaves is staged as well.
        joined = ranks_per_node <= domain
        dispatch = there * tokens * (spec.ep + (0 if joined else 1))
        combine = back * tokens * (min(spec.ep, top_k) + (0 if joined else spec.ep))
    else:
        between = nodes * (tokens + _CHANNELS)
        dispatch = there * (spec.ep * tokens + tokens + between)
        combine = back * (min(ranks_per_node, top_k) * nodes * tokens + min(nodes, top_k) * tokens + between)
    return _up(max(dispatch, combine), _ALIGNMENT)


def result_bytes(spec: DispatchSpec) -> int:
    """Of one dispatch and its combine, where all tokens of all ranks come to this one.

    With prompt tokens the host knows the counts, and only what arrived is held; without, room for the capacity.
    """
    return max(_Results(spec, spec.max_tokens).total, _Results(spec, capacities(spec)[1]).total)


@dataclass(frozen=True, slots=True)
class _Results:
    spec: DispatchSpec
    tokens: int

    @property
    def rows(self) -> int:
        """R of the expanded layout."""
        rows, received = self.spec.rows, self.spec.ep * self.tokens
        expanded = received * min(self.spec.top_k, rows.num_slots) + (rows.alignment - 1) * rows.num_slots
        return _up(expanded, rows.alignment)

    @property
    def total(self) -> int:
        spec, tokens, rows = self.spec, self.tokens, self.rows
        hidden, top_k, slots = padded_hidden(spec.hidden), spec.top_k, spec.rows.num_slots
        value, scales = (1, 4 * (hidden // SCALE_BLOCK)) if spec.rows.quantize else (2, 0)
        received = rows * hidden * value + _up(rows, 4) * scales + 4 * rows
        handle = 4 * (spec.ep * tokens * (top_k + 2) + tokens * top_k + spec.ep + 2 * slots + 1) + 8 * tokens * top_k
        home = tokens * hidden * 2 + (tokens * (hidden + scales) if spec.rows.quantize else 0)
        if hidden != spec.hidden:
            # Columns of zeros: cut from what arrives, put back for the way home.
            received += rows * (spec.hidden * value + 2 * hidden)
            home += tokens * (2 * spec.hidden + 2 * hidden)
        return received + handle + home


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
