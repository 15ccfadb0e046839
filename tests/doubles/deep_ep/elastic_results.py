"""What a dispatch of the double of DeepEP V2 gives back, garbage included. R rows, K top-k, E experts per rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.doubles.clauses import Clauses
from tests.doubles.deep_ep import elastic_wire as wire
from tests.doubles.deep_ep.events import garbage_


@dataclass(frozen=True)
class Call:
    """A dispatch, once its arguments are sorted out."""

    rank: int
    ranks: int
    nodes: int
    experts: int
    slots: int
    top_k: int
    capacity: int
    alignment: int
    sync: bool
    expand: bool
    zero_padding: bool
    column_major_scales: bool


@dataclass(frozen=True)
class Truth:
    """Of a dispatch, out of the caller's reach."""

    arrived: wire.Arrived
    local: Tensor
    """[R, K]: ids of this rank's experts, -1 elsewhere."""
    place: Tensor
    """[R, K]: expanded row of each choice, -1 for none."""
    seed: int

    @property
    def master(self) -> Tensor:
        """[R]: the last choice of each token that is of this rank; the highest lane leads."""
        last = torch.arange(self.local.shape[1])
        return torch.where(self.local >= 0, last, -1).amax(1)


@dataclass
class EPHandle:
    """What the library documents of its handle."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor
    truth: Truth

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Received:
    x: Tensor
    scales: Tensor | None
    ids: Tensor | None
    weights: Tensor | None


def truth_of(call: Call, arrived: wire.Arrived, shuffle: torch.Generator | None, seed: int) -> Truth:
    first = call.rank * call.slots
    mine = (arrived.ids >= first) & (arrived.ids < first + call.slots)
    local = torch.where(mine, arrived.ids - first, -1)
    starts = _starts(_counts(call, local), call.alignment)
    return Truth(arrived, local, wire.expand(local, starts, shuffle), seed)


def handle_of(clauses: Clauses, call: Call, truth: Truth, ids: Tensor) -> EPHandle:
    """The handle of a new dispatch, `ids [T, K]` its routing."""
    counts = _counts(call, truth.local)
    aligned = [_up(count, call.alignment) for count in counts]
    received, expanded = len(truth.local), sum(aligned)
    if not call.sync:
        received = max(received, call.capacity * call.ranks)
        room = call.ranks * call.capacity * min(call.top_k, call.slots) + (call.alignment - 1) * call.slots
        expanded = max(expanded, _up(room, call.alignment))
    listed = aligned if clauses.on("list_is_aligned") else counts
    if not call.sync and clauses.on("no_list_without_sync"):
        listed = []
    ends = [start + count for start, count in zip(_starts(counts, call.alignment), counts, strict=True)]
    if not call.expand and clauses.on("compact_psum"):
        ends = torch.tensor(aligned).cumsum(0).tolist()
    metadata = garbage_(torch.empty(received, call.top_k + 2, dtype=torch.int32))
    own = metadata[: len(truth.local)]
    rank, token = truth.arrived.source >> 32, truth.arrived.source & 0xFFFFFFFF
    own[:, 0] = rank * call.capacity + token
    own[:, 1] = rank * call.top_k + truth.master
    if call.expand:
        own[:, 2:] = truth.place
    per_peer = _int32(truth.arrived.counts).view(call.nodes, -1)
    return EPHandle(
        do_expand=call.expand,
        num_experts=call.experts,
        expert_alignment=call.alignment,
        num_max_tokens_per_rank=call.capacity,
        topk_idx=ids,
        num_recv_tokens=received,
        num_expanded_tokens=expanded,
        num_recv_tokens_per_expert_list=listed,
        psum_num_recv_tokens_per_scaleup_rank=per_peer.sum(0).cumsum(0, dtype=torch.int32),
        psum_num_recv_tokens_per_expert=_int32(ends),
        num_unaligned_recv_tokens_per_expert=_int32(counts),
        recv_src_metadata=metadata,
        truth=truth,
    )


def received(clauses: Clauses, call: Call, handle: EPHandle, arrived: wire.Arrived) -> Received:
    """The tensors of a dispatch."""
    local, place = handle.truth.local, handle.truth.place
    if call.expand:
        rows, used = handle.num_expanded_tokens, sum(_up(n, call.alignment) for n in _counts(call, local))
        chosen = (place >= 0).nonzero()
        of, to = chosen[:, 0], place[chosen[:, 0], chosen[:, 1]]
        weights = None if arrived.weights is None else arrived.weights[chosen[:, 0], chosen[:, 1]]
    else:
        rows, used = handle.num_recv_tokens, len(local)
        of = to = torch.arange(used)
        weights = arrived.weights

    def fill(out: Tensor, values: Tensor, past: str) -> Tensor:
        zero_bytes(out)
        if clauses.on(past):
            garbage_(out[used:])
        if clauses.on("gaps_uninitialised") and not call.zero_padding:
            garbage_(out[:used])
        out[to] = values
        return out

    x = fill(arrived.x.new_empty(rows, arrived.x.shape[1]), arrived.x[of], "rows_past_count")
    scales = None
    if arrived.scales is not None:
        packs = arrived.scales.shape[1]
        strides = (1, _up(rows, 4)) if call.column_major_scales else (packs, 1)
        empty = torch.empty_strided((rows, packs), strides, dtype=arrived.scales.dtype)
        scales = fill(empty, arrived.scales[of], "rows_past_count")
    if weights is not None:
        weights = fill(weights.new_empty(rows, *weights.shape[1:]), weights, "weights_past_count")
    if call.expand:
        return Received(x, scales, None, weights)
    ids = torch.full((rows, call.top_k), -1)
    if clauses.on("ids_past_count"):
        ids[used:] = torch.arange(ids[used:].numel()).view(-1, call.top_k) % call.slots
    shown = local if clauses.on("local_ids") else torch.where(local >= 0, local + call.rank * call.slots, -1)
    ids[:used] = shown
    return Received(x, scales, ids, weights)


def zero_bytes(x: Tensor) -> None:
    (x.view(torch.uint8) if x.element_size() == 1 else x).zero_()


def _counts(call: Call, local: Tensor) -> list[int]:
    counts: list[int] = torch.bincount(local[local >= 0], minlength=call.slots).tolist()
    return counts


def _starts(counts: list[int], alignment: int) -> list[int]:
    starts = [0]
    for count in counts[:-1]:
        starts.append(starts[-1] + _up(count, alignment))
    return starts


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
