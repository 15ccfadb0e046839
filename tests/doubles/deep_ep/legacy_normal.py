"""The normal kernels of DeepEP V1's double. T tokens, K top-k, R ranks, P experts, N received tokens, H hidden.

Not modelled: dispatch with a handle (the backward pass), bias, weights carried by combine, and the channels, whose
tables in the handle are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.doubles.deep_ep.events import EventOverlap, garbage_
from tests.doubles.deep_ep.legacy_core import INT_MAX, PEERS, Config, Core, packed, unpacked

_INT = torch.int32


@dataclass(frozen=True)
class _Sent:
    """A dispatch's arguments as the library's stream sees them."""

    x: Tensor
    scales: Tensor | None
    ids: Tensor
    weights: Tensor
    in_rank: Tensor
    per_expert: Tensor

    @property
    def num_scales(self) -> int:
        return 0 if self.scales is None else self.scales.shape[1]


class NormalCalls(Core):
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        self.alive()
        self.require("ids_two_dims", topk_idx.dim() == 2 and topk_idx.is_contiguous(), topk_idx.stride())
        self.require("ids_dtype", topk_idx.dtype is self.library.topk_idx_t, topk_idx.dtype)
        self.begin(previous_event, async_finish, allocate_on_comm_stream)
        ids, size = self.on_stream(topk_idx).to(torch.int64), self.group_size
        chosen = ids >= 0
        where = torch.where(chosen, ids // (num_experts // size), size)
        in_rank = torch.zeros(len(ids), size + 1, dtype=torch.bool).scatter_(1, where, True)[:, :size].contiguous()
        per_node = in_rank.view(len(ids), self.nodes, PEERS).any(2).sum(0).to(_INT) if size > PEERS else None
        per_expert = torch.bincount(ids[chosen], minlength=num_experts).to(_INT)
        results = (in_rank.sum(0).to(_INT), per_node, per_expert, in_rank)
        return *results, self.finish(results, async_finish)

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor, Tensor, list[int], tuple[Tensor, ...], EventOverlap]:
        self.alive()
        self.unfilled()
        assert handle is None, "not modelled"
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        config = self.get_dispatch_config(self.group_size) if config is None else config
        within = self.group_size <= PEERS
        self.require("worst_within_node", within or num_worst_tokens == 0, f"{self.nodes} nodes")
        self.require("node_counts", within or num_tokens_per_rdma_rank is not None, "num_tokens_per_rdma_rank=None")
        host_waits = num_worst_tokens == 0
        self.require("counts_outside_capture", not (host_waits and self.capturing.active), "dispatch")
        self.require("ids_with_weights", (topk_idx is None) == (topk_weights is None), "one without the other")
        assert topk_idx is not None and topk_weights is not None, "not modelled"
        values, scales = x if isinstance(x, tuple) else (x, None)
        self.begin(previous_event, async_finish, allocate_on_comm_stream)
        per_rank, per_expert = self.on_stream(num_tokens_per_rank), self.on_stream(num_tokens_per_expert)
        in_rank = self.on_stream(is_token_in_rank)
        sent = _Sent(values, scales, topk_idx, topk_weights, in_rank, per_expert)
        self._check_dispatch(sent, per_rank)
        self._check_room(sent, config)
        self.dirty |= not within
        received, from_rank, lists = self._exchange(sent)
        counts = [-(-count // expert_alignment) * expert_alignment for count in lists]
        counts = counts if self.rules.on("list_is_aligned") else lists
        recv = self._results(sent, received, num_worst_tokens)
        prefix = torch.tensor(from_rank, dtype=_INT).cumsum(0).to(_INT)
        native = self._handle(is_token_in_rank, prefix, recv[-1])
        event = self.finish([*recv[:-1], *(part for part in native if part is not is_token_in_rank)], async_finish)
        counts = counts if host_waits or not self.rules.on("worst_without_list") else []
        return (recv[0] if recv[1] is None else recv[:2]), recv[2], recv[3], counts, native, event

    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, EventOverlap]:
        self.alive()
        self.unfilled()
        assert topk_weights is None and bias is None, "not modelled"
        self.get_combine_config(self.group_size)
        self.begin(previous_event, async_finish, allocate_on_comm_stream)
        within = self.group_size <= PEERS
        if within:
            prefixes, _, _, origin, in_rank, _ = (self.on_stream(part) for part in handle)
            prefix, tokens = prefixes[:, self.rank], origin
        else:
            in_rank, *_, prefix, meta, _, _ = (self.on_stream(part) for part in handle)
            tokens = meta.view(_INT)[:, 1]
        x = self.on_stream(x)
        fits = x.dim() == 2 and x.is_contiguous() and len(x) == len(tokens)
        self.require("combine_rows", fits, f"{tuple(x.shape)} {x.stride()} for {len(tokens)} tokens")
        self.require("combine_bf16", x.dtype is torch.bfloat16, x.dtype)
        self.require("row_units", x.shape[1] * x.itemsize % 16 == 0, x.shape)
        self.require("combine_columns", within or x.shape[1] % 256 == 0, x.shape)
        self.dirty |= not within
        out = self._ordered_sum(x, tokens, prefix.diff(prepend=prefix.new_zeros(1)).tolist(), len(in_rank))
        return out, None, self.finish([out], async_finish)

    def _check_dispatch(self, sent: _Sent, per_rank: Tensor) -> None:
        x, scales, size, num_experts = sent.x, sent.scales, self.group_size, len(sent.per_expert)
        row = x.shape[-1] * x.itemsize
        self.require("tokens_contiguous", x.dim() == 2 and x.is_contiguous(), f"{tuple(x.shape)} {x.stride()}")
        self.require("row_units", row % 16 == 0, f"{row} bytes")
        known = size in (2, 4, 8) or (size % PEERS == 0 and self.nodes in (2, 3, 4, 6, 8, 12, 16, 18, 20))
        self.require("normal_ranks", known, f"{size} ranks")
        self.require("experts_divide", num_experts % size == 0, f"{num_experts} experts, {size} ranks")
        each = num_experts // size
        if size <= PEERS:
            self.require("row_halves", row % 32 == 0 and row // 2 <= 8184, f"{row} bytes")
            self.require("experts_of_a_rank", each <= 128, each)
        else:
            with_routing = -(-(row + 8 + sent.num_scales * 4 + 8 * sent.ids.shape[1]) // 16) * 16
            self.require("row_between_nodes", with_routing <= 16376, f"{with_routing} bytes")
            self.require("experts_of_a_node", each * PEERS <= 512, each * PEERS)
            enough = self.num_qps_per_rank >= self.num_sms or self.num_qps_per_rank == self.num_sms // 2
            self.require("queues_between_nodes", enough, f"{self.num_qps_per_rank} queue pairs")
        mask = sent.in_rank
        self.require("mask_shape", mask.dtype is torch.bool and mask.shape == (len(x), size), mask.shape)
        self.require("layout_agrees", torch.equal(per_rank.to(torch.int64), mask.sum(0)), per_rank.tolist())
        shapes = sent.ids.shape == sent.weights.shape and len(sent.ids) == len(x) and sent.ids.is_contiguous()
        self.require("ids_with_weights", shapes, f"{tuple(sent.ids.shape)}, {tuple(sent.weights.shape)}")
        self.require("ids_dtype", sent.ids.dtype is self.library.topk_idx_t, sent.ids.dtype)
        floats = sent.weights.dtype is torch.float32 and sent.weights.is_contiguous()
        self.require("weights_float", floats, f"{sent.weights.dtype} {sent.weights.stride()}")
        if scales is not None:
            self.require("scales_of_bytes", x.itemsize == 1, x.dtype)
            rows = scales.dim() == 2 and len(scales) == len(x) and scales.dtype in (torch.float32, _INT)
            self.require("scales_rows", rows, f"{tuple(scales.shape)} {scales.dtype}")

    def _check_room(self, sent: _Sent, config: Config) -> None:
        size, channels, row = self.group_size, config.num_sms // 2, sent.x.shape[1] * sent.x.itemsize
        extra = sent.num_scales * 4 + sent.ids.shape[1] * (8 + 4)
        if size <= PEERS:
            need = size * size * 4 + channels * size * (16 + config.nvl_recv * (row + 4 + extra))
            self.require("nvlink_fits", need <= self.num_nvl_bytes, f"{self.num_nvl_bytes} bytes of {need}")
            return
        row = -(-(row + 8 + sent.num_scales * 4 + 8 * sent.ids.shape[1]) // 16) * 16
        need = channels * PEERS * (config.nvl_recv * row + (2 * self.nodes + 2) * 4)
        self.require("nvlink_fits", need <= self.num_nvl_bytes < INT_MAX, f"{self.num_nvl_bytes} bytes of {need}")
        need = 2 * channels * self.nodes * (config.rdma_queue * row + (PEERS * 2 + 2) * 4)
        self.require("rdma_fits", need <= self.num_rdma_bytes, f"{self.num_rdma_bytes} bytes of {need}")

    def _exchange(self, sent: _Sent) -> tuple[Tensor, list[list[int]], list[int]]:
        """Bytes of the received tokens by source rank, then token; tokens from and to each rank; tokens per expert."""
        each = len(sent.per_expert) // self.group_size
        target, token = sent.in_rank.t().nonzero(as_tuple=True)
        local = sent.ids[token].to(torch.int64)
        if self.rules.on("local_ids"):
            local = local - (target * each).unsqueeze(1)
            local = torch.where((local >= 0) & (local < each), local, -1)
        weights = sent.weights[token].float().masked_fill(local < 0, 0.0)
        columns = [sent.x[token]] + ([] if sent.scales is None else [sent.scales[token]])
        origin = torch.stack([torch.full_like(token, self.rank), token], 1).to(_INT)
        wire = packed(*columns, local, weights, origin)
        counts = sent.in_rank.sum(0).tolist()
        received = torch.cat(self.group.scatter_rows(list(torch.split(wire, counts))))
        told = self.group.ep.exchange([*counts, *sent.per_expert.tolist()])
        first = self.group_size + self.rank * each
        lists = [sum(row[first + slot] for row in told) for slot in range(each)]
        return received, [list(row[: self.group_size]) for row in told], lists

    def _results(
        self, sent: _Sent, received: Tensor, worst: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """x, scales, ids, weights and origins `[N, 2]`; with `worst`, room for so many."""
        top_k = sent.ids.shape[1]
        forms = [(sent.x.dtype, sent.x.shape[1]), (torch.int64, top_k), (torch.float32, top_k), (_INT, 2)]
        if sent.scales is not None:
            forms.insert(1, (sent.scales.dtype, sent.num_scales))
        x, *rest = unpacked(received, *forms)
        scales = rest.pop(0) if sent.scales is not None else None
        ids, weights, origin = rest
        ids = ids.to(self.library.topk_idx_t)
        if worst:
            missing = worst - len(x)
            x, weights = (torch.cat([part, garbage_(part.new_empty(missing, part.shape[1]))]) for part in (x, weights))
            ids = torch.cat([ids, ids.new_full((missing, top_k), -1)])
            origin = torch.cat([origin, origin.new_zeros(missing, 2)])
        return x, scales, ids, weights, origin

    def _handle(self, in_rank: Tensor, prefix: Tensor, origin: Tensor) -> tuple[Tensor, ...]:
        """`prefix [R, R]`: tokens from ranks up to i to rank j."""
        size, nodes, channels, tokens = self.group_size, self.nodes, self.num_sms // 2, len(in_rank)

        def table(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=_INT)

        if size <= PEERS:
            tables = (prefix, table(size, channels), table(size, channels), origin[:, 1].contiguous())
            return *tables, in_rank, table(tokens, size)
        meta = origin.contiguous().view(torch.uint8)
        ahead = (table(nodes, channels), table(size, channels), table(nodes, channels), table(nodes))
        behind = (meta, table(tokens, nodes), table(len(meta), PEERS))
        return in_rank, *ahead, table(size, channels), prefix[:, self.rank].contiguous(), *behind

    def _ordered_sum(self, x: Tensor, tokens: Tensor, counts: list[int], num_tokens: int) -> Tensor:
        """Rows home, added in fp32 in order of ranks; between nodes a node's sum is rounded first."""
        rows = torch.split(packed(x, tokens.unsqueeze(1))[: sum(counts)], counts)
        out = torch.zeros(num_tokens, x.shape[1])
        of_node = torch.zeros_like(out)
        for rank, block in enumerate(self.group.scatter_rows(list(rows))):
            values, home = unpacked(block, (x.dtype, x.shape[1]), (_INT, 1))
            of_node.index_add_(0, home.flatten().to(torch.int64), values.float())
            if self.nodes == 1 or rank % PEERS < PEERS - 1:
                continue
            out += of_node.to(torch.bfloat16).float()
            of_node.zero_()
        return (of_node if self.nodes == 1 else out).to(torch.bfloat16)
