"""DeepEP V1: what its kernels take, and the bytes that its buffers and results need.

H hidden, K top-k, E local slots, P physical slots, R ranks, T tokens of a rank. Two kinds of kernels:
* normal (prefill): 2, 4 or 8 ranks of one node, or whole nodes of 8, in the numbers of `_NORMAL`;
* low latency (decode): more freely sized, one fixed capacity for all calls of a run.
Where there are no normal kernels for a size, low-latency ones serve both phases, a chunk at a time.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError

NODE: Final = 8
"""Ranks of a node, fixed in the library."""
LOW_LATENCY_HIDDEN: Final = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
MAX_TOP_K: Final = 11
MAX_IN_FLIGHT: Final = 2
"""Results stay good until the next but one low-latency call: there are two buffers."""
QUEUE_DEPTH: Final = 1024
"""Of a queue pair, NVSHMEM's default; it must hold two entries for each token of a rank, and two more."""
MAX_SLOTS: Final = 14 * 132
"""P of low latency: at most 14 slots for each of an H100's 132 multiprocessors."""

_ALIGNMENT = 128
_WORKSPACE = 32 * 2**20
_NODE_SIGNALS = NODE * (4 + 8 + 8)
"""Barrier counters and two tables of addresses behind the NVLink buffer."""
_RDMA_LIMIT = 2**35 - 128
"""Of the RDMA buffer, whose units of 16 bytes are counted in 31 bits."""
_CHANNELS = 10
_NORMAL: Final = {
    2: (256, 132),
    4: (256, 132),
    8: (256, 132),
    16: (288, 140),
    24: (288, 128),
    32: (288, 128),
    48: (288, 128),
    64: (288, 128),
    96: (480, 132),
    128: (560, 132),
    144: (720, 132),
    160: (720, 132),
}
"""R → rows of a channel's receive queues over NVLink and over RDMA, the larger of dispatch and combine."""


def unfit(spec: DispatchSpec) -> Missing | None:
    """Why V1 cannot serve `spec`, or None."""
    if spec.dtype is not torch.bfloat16:
        return Missing(f"tokens are {spec.dtype}; DeepEP V1 carries bf16", "Set dtype=bfloat16")
    if spec.ep < 2:
        return Missing("ep=1; DeepEP V1 has no kernels for one rank", "Use dispatch=local, or ep=2")
    if spec.ep >= NODE and spec.ep % NODE:
        below = spec.ep // NODE * NODE
        return Missing(
            f"ep={spec.ep}; DeepEP V1 takes 2..7 ranks or a multiple of {NODE}", f"Set ep={below} or ep={below + NODE}"
        )
    if spec.hidden > LOW_LATENCY_HIDDEN[-1]:
        return Missing(
            f"hidden={spec.hidden}; DeepEP V1's low-latency kernels take up to {LOW_LATENCY_HIDDEN[-1]}",
            "Use dispatch=all_to_all",
        )
    if spec.top_k > MAX_TOP_K:
        return Missing(
            f"{spec.top_k} slots per token; DeepEP V1's low-latency kernels take up to {MAX_TOP_K}",
            "Set shared_experts=replicated, or dispatch=all_to_all",
        )
    if spec.num_physical > MAX_SLOTS:
        return Missing(
            f"{spec.num_physical} slots; DeepEP V1's low-latency kernels take up to {MAX_SLOTS}",
            f"Lower placement.num_redundant_experts: at most {MAX_SLOTS // spec.ep * spec.ep} physical experts",
        )
    if spec.in_flight > MAX_IN_FLIGHT:
        return Missing(
            f"{spec.in_flight} micro-batches; DeepEP V1 keeps {MAX_IN_FLIGHT} results alive",
            f"Use {MAX_IN_FLIGHT} micro-batches",
        )
    return None


def normal_unfit(spec: DispatchSpec, *, ranks_per_node: int = NODE) -> Missing | None:
    """Why V1 has no normal kernels for `spec`, so that low-latency ones serve prefill too; None where it has."""
    use = "Low-latency kernels serve prefill too, in chunks"
    if spec.one_form:
        return Missing("both kinds of kernels round in their own way, and all steps must go one way", use)
    internode = spec.ep > NODE
    nodes = ranks_per_node == NODE if internode else spec.ep <= ranks_per_node
    if spec.ep not in _NORMAL or not nodes:
        return Missing(f"no normal kernels for {spec.ep} ranks, {ranks_per_node} in a node", use)
    if (slots := spec.rows.num_slots) > (most := 64 if internode else 128):
        return Missing(f"{slots} slots on a rank; normal kernels count up to {most}", use)
    width, most = normal_hidden(spec), _most_normal_hidden(spec)
    if width > most:
        return Missing(f"hidden={spec.hidden} as {width}; normal kernels take up to {most}", use)
    return None


def normal_hidden(spec: DispatchSpec) -> int:
    """H as normal kernels take it. A row is loaded by halves of 16 bytes' multiples within a node, by 512 bytes of bf16
    between nodes; with fp8 every 128 columns share a scale."""
    unit = 256 if spec.ep > NODE else 128 if spec.rows.quantize else 16
    return -(-spec.hidden // unit) * unit


def _most_normal_hidden(spec: DispatchSpec) -> int:
    """Such that half a row (a row with its routing between nodes) and a barrier fit into a warp's shared memory."""
    if spec.ep > NODE:
        return 7936
    return 16256 if spec.rows.quantize else 8176


def low_latency_hidden(spec: DispatchSpec) -> int:
    """H as low-latency kernels take it: the next of LOW_LATENCY_HIDDEN."""
    return next(width for width in LOW_LATENCY_HIDDEN if width >= spec.hidden)


def max_capacity(spec: DispatchSpec, phase: Phase = Phase.DECODE, *, ranks_per_node: int = NODE) -> int | None:
    """Most tokens per rank of one dispatch in `phase`; None where the kernels set no limit."""
    if phase is Phase.MIXED:
        limited = normal_unfit(spec, ranks_per_node=ranks_per_node) is not None
        return low_latency_capacity(spec) if limited else None
    step, width = _capacity_step(spec), low_latency_hidden(spec)
    most = (QUEUE_DEPTH // 2 - 1) // step * step
    while low_latency_bytes(most, width, spec.num_physical) > _RDMA_LIMIT:
        most -= step
    return most


def low_latency_capacity(spec: DispatchSpec) -> int:
    """T of all low-latency calls of a run: `max_decode_tokens` (`max_tokens` where no decoding is planned) within
    `max_capacity`, rounded up so that four divide the rows of a slot."""
    most, step = max_capacity(spec), _capacity_step(spec)
    assert most is not None and most >= step, "low latency always has a limit"
    return min(most, -(-max(1, spec.max_decode_tokens or spec.max_tokens) // step) * step)


def low_latency_bytes(tokens: int, width: int, num_physical: int) -> int:
    """The library's size of the RDMA buffer for `tokens` of a rank: two send, receive and signal areas."""
    groups = width // 128
    row = max(16 + max(2 * width, width + 4 * groups), 4 * groups + 2 * width)
    sent = max(tokens * (16 + 2 * width), num_physical * tokens * (4 * groups + 2 * width))
    received = num_physical * tokens * row
    signals = -(-4 * num_physical // _ALIGNMENT) * _ALIGNMENT
    return (2 * (sent + received + signals) // _ALIGNMENT + 1) * _ALIGNMENT


def normal_bytes(spec: DispatchSpec) -> tuple[int, int]:
    """The library's sizes of NVLink and RDMA buffer for normal kernels, with its recommended configurations."""
    over_nvlink, over_rdma = _NORMAL[spec.ep]
    nodes, peers = max(1, spec.ep // NODE), min(spec.ep, NODE)
    # A row with its origin, and room for 128 ids, weights and scales.
    row = 2 * normal_hidden(spec) + 8 + 128 * (8 + 4 + 4)
    nvlink = _CHANNELS * peers * ((2 * nodes + 3) * 4 + over_nvlink * row)
    rdma = 0 if nodes == 1 else 2 * _CHANNELS * nodes * ((NODE * 2 + 2) * 4 + over_rdma * (row + 16))
    return _aligned(nvlink), _aligned(rdma)


def buffer_bytes(spec: DispatchSpec, *, ranks_per_node: int = NODE) -> int:
    """Bytes on a rank: the one buffer of all layers with its workspace, and the worst-case results of the dispatches
    that are under way at once. ConfigError where V1 does not fit."""
    if (missing := unfit(spec)) is not None:
        raise ConfigError(f"dispatch=deep_ep: {missing}")
    tokens = low_latency_capacity(spec)
    rdma = low_latency_bytes(tokens, low_latency_hidden(spec), spec.num_physical)
    results, nvlink = _low_latency_results(spec, tokens), 0
    if normal_unfit(spec, ranks_per_node=ranks_per_node) is None:
        nvlink, over_rdma = normal_bytes(spec)
        rdma, nvlink = max(rdma, over_rdma), nvlink + _NODE_SIGNALS
        results = max(results, _normal_results(spec))
    return _WORKSPACE + nvlink + rdma + spec.in_flight * results


def _normal_results(spec: DispatchSpec) -> int:
    """All tokens of all ranks with their routing, and their rows in this rank's slots."""
    tokens, width, top_k = spec.ep * spec.max_tokens, normal_hidden(spec), spec.top_k
    per_row = _row_bytes(spec, spec.hidden)
    sorted_rows = spec.rows.num_slots * (spec.rows.alignment - 1) + tokens * min(top_k, spec.rows.num_slots)
    origin = 8 if spec.ep > NODE else 4
    return tokens * (_row_bytes(spec, width) + origin + top_k * (8 + 4 + 8)) + sorted_rows * per_row


def _low_latency_results(spec: DispatchSpec, tokens: int) -> int:
    """Room for every token of every rank in each slot, twice where columns of padding are cut off."""
    slots, width = spec.rows.num_slots, low_latency_hidden(spec)
    per_row = _row_bytes(spec, width) + 4
    if width != spec.hidden:
        per_row += spec.hidden if spec.rows.quantize else 2 * spec.hidden
    return slots * (spec.ep * (tokens * per_row + 8) + 4)


def _row_bytes(spec: DispatchSpec, width: int) -> int:
    return width + 4 * -(-width // 128) if spec.rows.quantize else 2 * width


def _capacity_step(spec: DispatchSpec) -> int:
    return 4 // math.gcd(spec.ep, 4)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
