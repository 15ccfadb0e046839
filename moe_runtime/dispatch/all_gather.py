"""Dispatch by all-gather, combine by reduce-scatter: fixed sizes, every token to every rank.

T tokens, C capacity, H hidden, K top-k, S = ep ranks, E local slots, R rows of this rank's slots.
Every rank brings C rows, its missing ones routed nowhere. On Triton a rank then sorts the assignments to its slots in
room for the worst case, S·C·min(K, E) rows, and the host waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.permute import unpermute
from moe_kernels.scaled import BlockScaled
from torch import Tensor
from torch.nn.functional import pad

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Rows
from moe_runtime.dispatch.rows import RowLayout, wire_order
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.types import NOWHERE, Pending, PhysicalRouting

ROUTE_BYTES = 8
"""An assignment travels as slot and weight, 4 bytes each."""

TOLERANCE = 1e-5
"""K terms regrouped by rank differ by at most 2(K-1)·2^-24 of the sum of their sizes (8e-7 at K=8; zeros add exactly).
The rest allows for terms that cancel to a twelfth of their sizes. For the same ep and slots the order is fixed, on CUDA
too: the same terms give the same bits."""


@dataclass(frozen=True, slots=True)
class AllGatherHandle:
    token_of: Tensor
    """[R] int64: row of the gathered `[S*C, H]` tokens that each wire row came from."""
    weights: Tensor
    """[R, 1] fp32."""
    capacity: int
    num_tokens: int
    position: Tensor | None


@dataclass(frozen=True, slots=True)
class SortedHandle:
    """Of a dispatch that stayed on the device."""

    row_of: Tensor
    """[S*C, min(K, E)] int64: row of each assignment of the gathered tokens, -1 where it is not to this rank."""
    weights: Tensor
    """[S*C, min(K, E)] fp32."""
    num_tokens: int
    position: None = None


Handle = AllGatherHandle | SortedHandle


class AllGatherDispatcher:
    """`Dispatcher[Handle]` over any communicator; each rank sums its own slots' share in fp32."""

    def __init__(self, ep: Communicator, rows: RowLayout, *, device: torch.device | str = "cpu") -> None:
        """`rows`: those of each rank."""
        self._ep = ep
        self._rows = rows
        self._first = torch.tensor([ep.rank * rows.num_slots], device=device)
        self._stays = rows.stays_on(self._first.device)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sums_at_home=False,
            tolerance=TOLERANCE,
            layouts=tuple(Layout),
            counts_on_host=not self._stays,
            graph_safe=self._stays,
            dedups_per_rank=True,
        )

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Pending[tuple[Rows, Handle]]:
        step.check(x)
        # Slot numbers are below 2^31: ids and weights travel as one int32 tensor [C, 2K].
        meta = torch.cat([routing.expert_ids.to(torch.int32), routing.weights.view(torch.int32)], dim=1)
        missing = step.capacity - x.shape[0]
        tokens = self._ep.all_gather_begin(pad(x, (0, 0, 0, missing)) if missing else x)
        routes = self._ep.all_gather_begin(pad(meta, (0, 0, 0, missing), value=NOWHERE) if missing else meta)
        return _Gathering(self, tokens, routes, step.capacity, x.shape[0])

    def combine_begin(self, y: Tensor, handle: Handle) -> Pending[Tensor]:
        sums = self._ep.reduce_scatter_begin(self.partial_sums(y, handle))
        return _Scattering(sums, handle.num_tokens, y.dtype)

    def partial_sums(self, y: Tensor, handle: Handle) -> Tensor:
        """This rank's share of all gathered tokens' sums, `[S*C, H] fp32`."""
        if isinstance(handle, SortedHandle):
            return unpermute(y, handle.row_of, handle.weights, out_dtype=torch.float32)
        terms = wire_order(y, handle.position).float() * handle.weights
        partial = terms.new_zeros(self._ep.size * handle.capacity, y.shape[-1])
        if partial.is_cuda:
            # index_add_ adds there by atomics, in any order; this sorts first.
            partial.index_put_((handle.token_of,), terms, accumulate=True)
        else:
            partial.index_add_(0, handle.token_of, terms)
        return partial

    def close(self) -> None: ...

    def _sort(self, tokens: Tensor | BlockScaled, routes: Tensor, num_tokens: int) -> tuple[Rows, Handle]:
        """The rows of this rank's slots, sorted by slot, then token, on the device."""
        top_k, num_slots = routes.shape[1] // 2, self._rows.num_slots
        slots = routes[:, :top_k] - self._first  # int64; other ranks' lie outside 0..E-1
        weights = routes[:, top_k:].view(torch.float32)
        if top_k > num_slots:
            # At most E assignments of a token are to E slots: fewer columns make less room.
            mine = (slots >= 0) & (slots < num_slots)
            slots, order = slots.masked_fill_(~mine, NOWHERE).sort(dim=1, descending=True, stable=True)
            slots, weights = slots[:, :num_slots].contiguous(), weights.gather(1, order[:, :num_slots])
        # Spread evenly, S·C·K assignments over S·E slots; the room says little of it.
        mean = max(1, -(-slots.shape[0] * top_k // (self._ep.size * num_slots)))
        rows, row_of = self._rows.sort(tokens, slots, expected_rows=mean)
        return rows, SortedHandle(row_of, weights.contiguous(), num_tokens)

    def select(
        self, tokens: Tensor | BlockScaled, routes: Tensor, capacity: int, num_tokens: int
    ) -> tuple[Rows, Handle]:
        """The rows of this rank's slots, sorted by slot, then token, out of all ranks' `tokens [S*C, H]` with their
        `routes [S*C, 2K] int32`: slots, then weights. In fp8 only where rows stay on the device."""
        if self._stays:
            return self._sort(tokens, routes, num_tokens)
        assert isinstance(tokens, Tensor), "rows in fp8 are sorted on the device"
        top_k, num_slots = routes.shape[1] // 2, self._rows.num_slots
        slots = routes[:, :top_k] - self._ep.rank * num_slots
        mine = ((slots >= 0) & (slots < num_slots)).nonzero()
        slot = slots[mine[:, 0], mine[:, 1]]
        if num_slots > 1:
            slot, order = slot.sort(stable=True)
            mine = mine[order]
        token_of = mine[:, 0]
        weights = routes[token_of, mine[:, 1] + top_k].view(torch.float32).unsqueeze(1)
        counts = torch.bincount(slot, minlength=num_slots).unsqueeze(0)
        rows, position = self._rows.lay_out(tokens.index_select(0, token_of), counts)
        return rows, AllGatherHandle(token_of, weights, capacity, num_tokens, position)


def step_bytes(spec: DispatchSpec) -> int:
    """What a rank receives and sends in the largest decode step: a row of each token there, one of fp32 sums back."""
    return spec.ep * spec.max_decode_tokens * (spec.row_bytes + torch.float32.itemsize * spec.hidden)


def buffer_bytes(spec: DispatchSpec) -> int:
    """All tokens with their routing, the rows of this rank's slots, and a second copy of these where there are gaps."""
    rows, tokens = spec.rows, spec.ep * spec.max_tokens
    per_token = min(spec.top_k, rows.num_slots)
    total = tokens * (spec.row_bytes + ROUTE_BYTES * spec.top_k + per_token * spec.row_bytes)
    return total if rows.dense else total + rows.worst_bytes(tokens, per_token, spec.row_bytes)


@dataclass(frozen=True, slots=True)
class _Gathering:
    """Tokens and routing on their way to all ranks."""

    dispatcher: AllGatherDispatcher
    tokens: Pending[Tensor]
    routes: Pending[Tensor]
    capacity: int
    num_tokens: int

    def wait(self) -> tuple[Rows, Handle]:
        return self.dispatcher.select(self.tokens.wait(), self.routes.wait(), self.capacity, self.num_tokens)


@dataclass(frozen=True, slots=True)
class _Scattering:
    """Partial sums on their way home."""

    sums: Pending[Tensor]
    num_tokens: int
    dtype: torch.dtype

    def wait(self) -> Tensor:
        return self.sums.wait()[: self.num_tokens].to(self.dtype)
