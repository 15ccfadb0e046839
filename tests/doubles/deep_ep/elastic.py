"""A double of DeepEP V2: `Library` stands for the module deep_ep, `ElasticBuffer` for its class.

Not modelled: bias, `allow_multiple_reduction=False`, the order of
several streams, numbers of multiprocessors and queue pairs. T tokens, S ranks, K top-k, E experts per rank, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.doubles.deep_ep import elastic_results as results
from tests.doubles.deep_ep import elastic_wire as wire
from tests.doubles.deep_ep.elastic_bytes import Ranks, combine_bytes, dispatch_bytes, hint
from tests.doubles.deep_ep.elastic_clauses import clauses
from tests.doubles.deep_ep.elastic_results import Call, EPHandle
from tests.doubles.deep_ep.events import Capture, Clock, EventHandle, EventOverlap, hide
from tests.doubles.fabric_group import FabricGroup


class Library:
    """`seed` draws the orders in which rows arrive; NVLink joins the ranks of each of `nodes` nodes."""

    __version__ = "2.1.0"
    topk_idx_t = torch.int64
    EventHandle = EventHandle
    EventOverlap = EventOverlap

    def __init__(self, *, seed: int = 0, nodes: int = 1) -> None:
        self.clauses = clauses()
        self.seed = seed
        self.nodes = nodes
        self.capturing = Capture()
        self.jit_builds: set[tuple[object, ...]] = set()
        """What was compiled: a kernel's name and the numbers that it was compiled for."""
        self.live = 0
        """Buffers that wait for their destroy()."""
        self.clock: Clock | None = None
        self.ElasticBuffer: Any = type("ElasticBuffer", (ElasticBuffer,), {"library": self})

    def get_physical_domain_size(self, group: FabricGroup) -> tuple[int, int]:
        return self.nodes, group.size() // self.nodes

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block it is known when inputs were written (one rank only: others' operations count too)."""
        self.clock = Clock()
        with self.clock:
            yield
        self.clock = None

    def check_end(self) -> None:
        self.clauses.require("destroyed_at_end", self.live == 0, f"{self.live} buffers are left")


class ElasticBuffer:
    library: ClassVar[Library]

    def __init__(
        self,
        group: FabricGroup,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        require = self.library.clauses.require
        require("nccl_group", group.backend == "nccl", f"a group over {group.backend}")
        require("made_outside_capture", not self.library.capturing.active, "made inside a capture")
        require("room_for_ranks", group.size() <= 1024, f"{group.size()} ranks")
        if num_bytes is None:
            sizes = (num_max_tokens_per_rank, hidden)
            require("sizes_positive", min(sizes) > 0, f"num_max_tokens_per_rank, hidden = {sizes}")
            num_bytes = self.get_buffer_size_hint(
                group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, allow_hybrid_mode
            )
        self.ranks = self._ranks(group, allow_hybrid_mode)
        self.group, self.num_bytes, self.num_max_tokens_per_rank = group, num_bytes, num_max_tokens_per_rank
        self.explicitly_destroy, self.deterministic = explicitly_destroy, deterministic
        self.timeouts = (num_cpu_timeout_secs, num_gpu_timeout_secs)
        self.alive, self.calls = True, 0
        self.library.live += explicitly_destroy
        group.ep.barrier()

    @classmethod
    def _ranks(cls, group: FabricGroup, hybrid: bool) -> Ranks:
        nodes, per_node = cls.library.get_physical_domain_size(group)
        return Ranks(nodes, per_node, True) if hybrid else Ranks(1, nodes * per_node, nodes == 1)

    @classmethod
    def get_buffer_size_hint(
        cls,
        group: FabricGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
    ) -> int:
        return hint(cls._ranks(group, allow_hybrid_mode), num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)

    @classmethod
    def capture(cls) -> EventHandle:
        clock = cls.library.clock
        return EventHandle(time=None if clock is None else clock.now)

    def destroy(self) -> None:
        self.library.clauses.require("destroy_if_explicit", self.explicitly_destroy, "explicitly_destroy=False")
        if self.alive:
            self.group.ep.barrier()
            self.library.live -= self.explicitly_destroy
        self.alive = False

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        previous_event: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        require, on = self.library.clauses.require, self.library.clauses.on
        data, scales = x if isinstance(x, tuple) else (x, None)
        self._begin(previous_event, allocate_on_comm_stream, [data, scales, topk_idx, topk_weights])
        require("padding_needs_expand", do_expand or not do_zero_padding, "do_zero_padding without do_expand")
        require("cached_without_topk", handle is None or topk_idx is None, "a handle and topk_idx")
        cached = handle if topk_idx is None else None
        ids = topk_idx if cached is None else cached.topk_idx
        assert ids is not None, "neither topk_idx nor a handle"
        if cached is not None:
            sizes = (cached.num_experts, cached.expert_alignment, cached.num_max_tokens_per_rank)
            given = (num_experts, expert_alignment, num_max_tokens_per_rank)
            same = all(value is None or value == own for value, own in zip(given, sizes, strict=True))
            require("cached_without_sync", not do_cpu_sync, "a handle and do_cpu_sync=True")
            require("cached_same_sizes", same, f"a handle for {sizes}, used with {given}")
            num_experts, expert_alignment, num_max_tokens_per_rank = sizes
        assert num_experts is not None, "num_experts is needed without a handle"
        ranks = self.group.size()
        call = Call(
            rank=self.group.rank(),
            ranks=ranks,
            nodes=self.ranks.nodes,
            experts=num_experts,
            slots=num_experts // ranks,
            top_k=ids.shape[1],
            capacity=self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank,
            alignment=1 if expert_alignment is None else expert_alignment,
            sync=cached is None and do_cpu_sync is not False,
            expand=do_expand,
            zero_padding=do_zero_padding,
            column_major_scales=use_tma_aligned_col_major_sf,
        )
        self._check_dispatch(call, data, scales, ids, topk_weights)
        require("cached_same_tokens", cached is None or len(data) == len(ids), f"{len(data)} tokens for {len(ids)}")
        seed = self._draw() if cached is None else cached.truth.seed
        shuffle = torch.Generator().manual_seed(seed) if on("order_is_open") and not self.deterministic else None
        weights = None if topk_weights is None else topk_weights.float()
        if scales is not None and scales.element_size() != 4:
            scales = scales.float()
        arrived = wire.send(self.group, data, scales, ids.long(), weights, slots=call.slots, shuffle=shuffle)
        if cached is None:
            truth = results.truth_of(call, arrived, shuffle, seed)
            made = results.handle_of(self.library.clauses, call, truth, ids.clone() if do_handle_copy else ids)
        else:
            made = cached
        got = results.received(self.library.clauses, call, made, arrived)
        own = [] if cached else [x for x in made.tensors if x is not ids]
        late = [got.x, got.scales, got.ids, got.weights, *own]
        event = self._end(late, async_with_compute_stream)
        return (got.x if got.scales is None else (got.x, got.scales)), got.ids, got.weights, made, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        previous_event: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        require, on = self.library.clauses.require, self.library.clauses.on
        self._begin(previous_event, allocate_on_comm_stream, [x, topk_weights])
        require("combine_bf16", x.dtype is torch.bfloat16, x.dtype)
        require("combine_contiguous", x.is_contiguous(), f"strides {x.stride()}")
        require("combine_hidden", x.shape[1] % 256 == 0, f"hidden {x.shape[1]}")
        rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        form = "expanded" if handle.do_expand else "compact"
        require(f"combine_{form}_rows", len(x) == rows, f"{len(x)} rows for {rows}")
        top_k, capacity = handle.topk_idx.shape[1], handle.num_max_tokens_per_rank
        needed = combine_bytes(self.ranks, capacity, x.shape[1], top_k)
        require("combine_fits_buffer", needed <= self.num_bytes, f"{needed} bytes in a buffer of {self.num_bytes}")
        self._compile("combine", capacity, handle.num_experts, x.shape[1], top_k, handle.do_expand)
        truth = handle.truth
        if topk_weights is not None and not on("combine_unweighted"):
            x = (x.float() * topk_weights.view(len(x), -1)[:, :1].nan_to_num()).to(x.dtype)
        if handle.do_expand:
            terms = x[truth.place.clamp(min=0)]
            partial = wire.add_up(terms, truth.place >= 0)
        else:
            partial = x[: len(truth.local)].float()
        if on("partial_sums_bf16"):
            partial = partial.bfloat16()
        home = handle.topk_idx
        node_of = None
        if self.ranks.nodes > 1 and on("node_sums_bf16"):
            node_of = home // (handle.num_experts // self.ranks.nodes)
        combined = wire.send_back(self.group, partial, truth.arrived, truth.master, home, node_of).bfloat16()
        carried = None if topk_weights is None else torch.full(handle.topk_idx.shape, float("nan"))
        return combined, carried, self._end([combined], async_with_compute_stream)

    def _begin(self, previous: object, on_comm_stream: bool, inputs: list[Tensor | None]) -> None:
        require, clock = self.library.clauses.require, self.library.clock
        require("not_used_after_destroy", self.alive, "used after destroy()")
        settings: Any = torch.utils.deterministic
        fills = torch.are_deterministic_algorithms_enabled() and settings.fill_uninitialized_memory
        require("no_deterministic_fill", not fills, "torch.use_deterministic_algorithms(True) fills memory")
        require("event_type", previous is None or isinstance(previous, EventHandle), type(previous).__name__)
        require("event_with_comm_stream", previous is None or on_comm_stream, "allocate_on_comm_stream=False")
        if clock is not None and isinstance(previous, EventHandle) and previous.time is not None:
            late = max(clock.written(x) for x in inputs if x is not None)
            seen = f"an event after operation {previous.time}, an input written by operation {late}"
            require("event_after_inputs", late <= previous.time, seen)

    def _end(self, late: list[Tensor | None], asynchronous: bool) -> EventOverlap:
        on = self.library.clauses.on
        if not asynchronous:
            return EventOverlap(None if on("event_if_async") else EventHandle())
        return EventOverlap(hide(late) if on("arrives_with_event") else EventHandle())

    def _draw(self) -> int:
        self.calls += 1
        return hash((self.library.seed, self.group.rank(), self.calls))

    def _compile(self, *kernel: object) -> None:
        if self.library.clauses.on("compiled_for_capacity"):
            self.library.jit_builds.add(kernel)

    def _check_dispatch(
        self, call: Call, x: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor | None
    ) -> None:
        require = self.library.clauses.require
        require("experts_divide", call.experts % call.ranks == 0, f"{call.experts} experts on {call.ranks} ranks")
        require("room_for_experts", call.experts <= 2048, f"{call.experts} experts")
        require("room_for_experts_of_a_rank", call.slots <= 256, f"{call.slots} experts per rank")
        if self.ranks.nodes > 1:
            per_node = self.ranks.per_node
            require("hybrid_nodes", self.ranks.nodes <= 32, f"{self.ranks.nodes} nodes")
            require("hybrid_ranks_of_a_node", per_node <= 64, f"{per_node} ranks of a node")
            require("hybrid_counters", per_node + call.slots <= 128, f"{per_node} and {call.slots}")
        require("lanes_for_topk", call.top_k <= 32, f"{call.top_k} choices")
        require("x_contiguous", x.is_contiguous(), f"strides {x.stride()}")
        row, packs = x.shape[1] * x.element_size(), 0 if scales is None else scales.shape[1]
        require("row_bytes", row % 32 == 0, f"{row} bytes")
        require("tokens_fit", len(x) <= call.capacity, f"{len(x)} tokens, capacity {call.capacity}")
        if scales is not None:
            require("scales_rows", len(scales) == len(x), f"{len(scales)} rows of scales for {len(x)} tokens")
            require("scales_four_bytes", scales.element_size() == 4, scales.dtype)
        require("topk_dtype", ids.dtype is self.library.topk_idx_t, ids.dtype)
        require("topk_contiguous", ids.is_contiguous(), f"strides {ids.stride()}")
        require("ids_in_range", bool((ids < call.experts).all()), f"an id of {call.experts} or more")
        chosen = ids.sort(dim=1).values
        twice = (chosen[:, 1:] == chosen[:, :-1]) & (chosen[:, 1:] >= 0)
        require("ids_distinct", not twice.any(), "a token chose an expert twice")
        if weights is not None:
            require("weights_contiguous", weights.is_contiguous(), f"strides {weights.stride()}")
            require("weights_float", weights.dtype is torch.float32, weights.dtype)
        sizes = (call.capacity, call.experts, row, packs, call.top_k)
        everyone = set(self.group.ep.exchange(sizes))
        require("same_sizes", len(everyone) == 1, f"capacity, experts, bytes, scales, top-k: {everyone}")
        needed = dispatch_bytes(self.ranks, call.capacity, row, packs, call.top_k)
        require("dispatch_fits_buffer", needed <= self.num_bytes, f"{needed} bytes in a buffer of {self.num_bytes}")
        waits = call.sync and self.library.capturing.active
        require("sync_outside_capture", not waits, "do_cpu_sync=True inside a capture")
        self._compile("dispatch", *sizes, call.alignment, call.sync)
        self._compile("dispatch_copy_epilogue", *sizes, call.alignment, call.expand, call.zero_padding)
