"""The low-latency kernels of DeepEP V1's double. T tokens, K top-k, R ranks, E experts of a rank, C capacity, H hidden.

Not modelled: statistics, LogFMT, zero copy, masked ranks, packed UE8M0 scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.doubles.deep_ep.events import EventHandle, EventOverlap, garbage_
from tests.doubles.deep_ep.legacy_core import WORKSPACE_SMS, Core, Hook, LooseEvent, low_latency_total, packed, unpacked

HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
_INT = torch.int32
_LOW = 2**32 - 1


@dataclass
class _Call:
    """One that has sent. `wiped`: a later send cleared the counters that its receive waits for."""

    results: list[tuple[Tensor, Tensor]]
    received: bool = False
    wiped: bool = False
    lent: list[Tensor] = field(default_factory=list)
    """Results in memory that later calls write."""


class LowLatencyCalls(Core):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._calls: list[_Call] = []
        self._areas: tuple[int, int, int] | None = None
        self._random = torch.Generator().manual_seed(self.library.seed * 1000 + self.rank)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        self.alive()
        self.require("low_latency_mode", self.low_latency_mode, "clean_low_latency_buffer")
        self.group.ep.barrier()
        self.dirty, self._areas = False, None

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        round_scale: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, tuple[Any, ...], EventOverlap, Hook | None]:
        capacity, size = num_max_dispatch_tokens_per_rank, self.group_size
        self._check_tokens(x, topk_idx, capacity, num_experts)
        self._check_call(capacity, x.shape[1], num_experts, async_finish, return_recv_hook)
        self.require("few_topk", topk_idx.shape[1] <= 11, topk_idx.shape)
        self.require("room_by_fours", size * capacity % 4 == 0, f"{size} ranks of {capacity}")
        values, scales = _cast(x, round_scale) if use_fp8 else (x.to(torch.bfloat16), None)
        each = num_experts // size
        source, local, columns = self._send(values, scales, topk_idx.to(torch.int64), num_experts)
        order, place, counts, layout = self._arrange(source, local, each, size * capacity)
        results = []
        for column in columns:
            there = garbage_(torch.empty(each, size * capacity, column.shape[1], dtype=column.dtype))
            if not self.rules.on("rows_past_count"):
                there.view(torch.uint8).zero_()
            # index_copy_ knows no fp8.
            flat = there.view(torch.uint8).view(-1, column.shape[1] * column.itemsize)
            flat.index_copy_(0, place, column[order].contiguous().view(torch.uint8))
            results.append(there)
        if scales is not None and self.rules.on("scales_by_columns"):
            results[1] = results[1].transpose(1, 2).contiguous().transpose(1, 2)
        origin = results[-1].view(each, size * capacity)
        data = tuple(results[:-1])
        call = self._issue([*data, counts, origin, layout], lent=data)
        native = (origin, layout, capacity, x.shape[1], num_experts)
        return (data if use_fp8 else data[0]), counts, native, *self._deliver(call, async_finish, return_recv_hook)

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        assert not use_logfmt and not zero_copy, "not modelled"
        origin, layout, capacity, _, num_experts = handle
        self._check_rows(x, topk_idx, topk_weights, capacity, num_experts)
        self._check_call(capacity, x.shape[2], num_experts, async_finish, return_recv_hook)
        self.require("few_topk", topk_idx.shape[1] <= 11, topk_idx.shape)
        wanted = (len(topk_idx), x.shape[2])
        if out is not None:
            fits = out.shape == wanted and out.dtype is x.dtype and out.is_contiguous()
            self.require("combine_out", fits, f"{tuple(out.shape)} {out.dtype}")
        home, rows = self._return(x.to(torch.bfloat16), origin, layout, capacity)
        total = self._weighed_sum(home, rows, topk_idx.to(torch.int64), topk_weights.float(), capacity)
        result = total if out is None else out.copy_(total)
        call = self._issue([result], lent=[] if out is not None else [result])
        return result, *self._deliver(call, async_finish, return_recv_hook)

    def _check_call(self, capacity: int, hidden: int, num_experts: int, async_finish: bool, hook: bool) -> None:
        self.alive()
        self.unfilled()
        each, per_sm = num_experts // self.group_size, -(-num_experts // WORKSPACE_SMS)
        self.require("low_latency_mode", self.low_latency_mode, "a low-latency call")
        self.require("queue_depth", self.nvshmem_qp_depth >= 2 * (capacity + 1), f"{self.nvshmem_qp_depth}")
        self.require("known_hidden", hidden in HIDDEN, hidden)
        self.require("few_experts", per_sm <= 14, f"{per_sm} of {num_experts}")
        total = low_latency_total(capacity, hidden, num_experts)
        self.require("areas_fit", total <= self.num_rdma_bytes, f"{self.num_rdma_bytes} bytes of {total}")
        self.require("hook_or_event", not (async_finish and hook), "both")
        self.require("queue_per_expert", self.num_qps_per_rank >= each, f"{self.num_qps_per_rank} of {each}")
        self.require("clean_after_normal", not self.dirty, "no clean_low_latency_buffer() after normal kernels")
        areas = (capacity, hidden, num_experts)
        self.require("same_capacity", self._areas in (None, areas), f"{areas} after {self._areas}")
        self._areas = areas

    def _check_tokens(self, x: Tensor, ids: Tensor, capacity: int, num_experts: int) -> None:
        bf16 = x.dim() == 2 and x.is_contiguous() and x.dtype is torch.bfloat16
        self.require("tokens_bf16", bf16, f"{tuple(x.shape)} {x.dtype} {x.stride()}")
        fits = ids.dim() == 2 and ids.is_contiguous() and ids.dtype is self.library.topk_idx_t and len(ids) == len(x)
        self.require("ids_as_tokens", fits, f"{tuple(ids.shape)} {ids.dtype} {ids.stride()}")
        self.require("within_capacity", len(x) <= capacity, f"{len(x)} tokens, capacity {capacity}")
        self.require("experts_divide_too", num_experts % self.group_size == 0, num_experts)
        self.require("ids_in_range", bool((ids < num_experts).all()), f"ids up to {ids.max() if len(ids) else 0}")
        by_size = ids.sort(dim=1).values
        twice = (by_size[:, 1:] == by_size[:, :-1]) & (by_size[:, 1:] >= 0)
        self.require("ids_distinct", not bool(twice.any()), "an expert twice for a token")

    def _check_rows(self, x: Tensor, ids: Tensor, weights: Tensor, capacity: int, num_experts: int) -> None:
        room = (num_experts // self.group_size, self.group_size * capacity)
        fits = x.dim() == 3 and x.shape[:2] == room and x.is_contiguous() and x.dtype is torch.bfloat16
        self.require("combine_shape", fits, f"{tuple(x.shape)} {x.dtype} {x.stride()} for {room}")
        same = ids.shape == weights.shape and len(ids) <= capacity
        self.require("combine_ids", same, f"{tuple(ids.shape)}, {tuple(weights.shape)}")
        floats = weights.dtype is torch.float32 and weights.is_contiguous()
        self.require("combine_weights_float", floats, f"{weights.dtype} {weights.stride()}")

    def _send(
        self, values: Tensor, scales: Tensor | None, ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What arrives here: source and local expert `[n]` of each row, and columns: values, scales, origin."""
        each, size = num_experts // self.group_size, self.group_size
        flat = ids.reshape(-1)
        chosen = flat.argsort(stable=True)[int((flat < 0).sum()) :]
        expert, token = flat[chosen], chosen // max(1, ids.shape[1])
        columns = [values[token]] + ([] if scales is None else [scales[token]])
        wire = packed(*columns, torch.stack([expert % each, token], 1).to(_INT))
        counts = torch.bincount(expert // each, minlength=size).tolist()
        blocks = self.group.scatter_rows(list(torch.split(wire, counts)))
        forms = [(column.dtype, column.shape[1]) for column in columns]
        *received, local, origin = unpacked(torch.cat(blocks), *forms, (_INT, 1), (_INT, 1))
        source = torch.repeat_interleave(torch.arange(size), torch.tensor([len(block) for block in blocks]))
        return source, local.flatten().to(torch.int64), [*received, origin]

    def _arrange(self, source: Tensor, local: Tensor, each: int, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order in which rows are placed, each one's place, counts `[E]` and layout `[E, R]` (begin and count)."""
        size = self.group_size
        drawn = self.rules.on("order_is_open")
        mixed = torch.randperm(len(local), generator=self._random) if drawn else torch.arange(len(local))
        turn = torch.arange(size).expand(each, size)
        if drawn:
            turn = torch.rand(each, size, generator=self._random).argsort(1)
        rank_of_turn = turn.argsort(1)
        order = mixed[(local * size + turn[local, source])[mixed].argsort(stable=True)]
        counts = torch.bincount(local * size + source, minlength=each * size).view(each, size)
        by_turn = counts.gather(1, rank_of_turn)
        begins = torch.zeros_like(counts).scatter_(1, rank_of_turn, by_turn.cumsum(1) - by_turn)
        per_expert = counts.sum(1)
        slot = local[order]
        place = torch.arange(len(order)) - (per_expert.cumsum(0) - per_expert)[slot] + slot * room
        return order, place, per_expert.to(_INT), begins * 2**32 + counts

    def _return(self, x: Tensor, origin: Tensor, layout: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Rows to their homes; what comes here: `expert * C + token [n]`, ascending, and rows `[n, H]`."""
        each, size = layout.shape
        counts, begins = (layout & _LOW).clamp(max=size * capacity), layout >> 32
        starts = (begins + torch.arange(each).unsqueeze(1) * size * capacity).t().reshape(-1)
        lengths = counts.t().reshape(-1)
        total = int(lengths.sum())
        shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
        taken = (torch.arange(total) + shift) % max(1, each * size * capacity)
        expert = self.rank * each + taken // (size * capacity)
        home = (expert * capacity + origin.reshape(-1)[taken]).unsqueeze(1)
        wire = packed(x.reshape(-1, x.shape[2])[taken], home)
        blocks = self.group.scatter_rows(list(torch.split(wire, counts.sum(0).tolist())))
        rows, keys = unpacked(torch.cat(blocks), (torch.bfloat16, x.shape[2]), (torch.int64, 1))
        found, by_key = keys.flatten().sort()
        return found, rows[by_key]

    def _weighed_sum(self, home: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
        """In fp32, in top-k order; a row that nobody sent is what the memory held."""
        tokens, top_k = ids.shape
        lost = rows.new_zeros(1, rows.shape[1])
        rows = torch.cat([rows, garbage_(lost) if self.rules.on("same_ids") else lost])
        keys = torch.cat([home, home.new_full((1,), -1)])
        out = torch.zeros(tokens, rows.shape[1])
        for k in range(top_k):
            wanted = ids[:, k] * capacity + torch.arange(tokens)
            at = torch.searchsorted(home, wanted)
            at = torch.where(keys[at] == wanted, at, len(home))
            out += torch.where((ids[:, k] >= 0).unsqueeze(1), rows[at].float() * weights[:, k : k + 1], 0.0)
        return out.to(torch.bfloat16)

    def _issue(self, results: Sequence[Tensor], *, lent: Sequence[Tensor]) -> _Call:
        """A call has sent: its results are not there yet, and those of the last but one no more."""
        if self._calls and not self._calls[-1].received:
            self._calls[-1].wiped = True
        if len(self._calls) > 1:
            last_but_one = self._calls.pop(0)
            for x in last_but_one.lent if self.rules.on("two_live_results") else ():
                garbage_(x)
        call = _Call([(x, x.clone()) for x in results] if self.rules.on("arrives_with_hook") else [], lent=list(lent))
        for x, _ in call.results:
            garbage_(x)
        self._calls.append(call)
        return call

    def _receive(self, call: _Call) -> None:
        self.require("receive_before_next", not call.wiped, "a hook called after the next call's send")
        call.received = True
        for target, value in call.results:
            target.copy_(value)
        call.results = []

    def _deliver(self, call: _Call, async_finish: bool, return_recv_hook: bool) -> tuple[EventOverlap, Hook | None]:
        if return_recv_hook:
            return LooseEvent(self.rules), lambda: self._receive(call)
        if not async_finish:
            self._receive(call)
            return LooseEvent(self.rules), None
        event = EventHandle(call.results)
        call.received, call.results = True, []
        return EventOverlap(event), None


def _cast(x: Tensor, round_scale: bool) -> tuple[Tensor, Tensor]:
    """As csrc/kernels/legacy/utils.cuh:494-503: multiplied by 448 / amax, told as amax * (1 / 448)."""
    wide = x.float().view(len(x), -1, 128)
    amax = wide.abs().amax(2).clamp(min=1e-4)
    told = amax * torch.tensor(1 / 448)
    factor = 448 / amax
    if round_scale:
        exponent = torch.ceil(torch.log2(told))
        told, factor = torch.exp2(exponent), torch.exp2(-exponent)
    values = (wide * factor.unsqueeze(2)).clamp(-448, 448).view(x.shape)
    return values.to(torch.float8_e4m3fn), told
