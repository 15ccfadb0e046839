"""For every clause of DeepEP V1's double, an adapter that breaks it fails, and by that clause alone."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from moe_kernels.permute import unpermute

from moe_runtime.errors import CommunicationError
from tests.dispatch import legacy_mistakes as m
from tests.dispatch.legacy_fabric import bf16_case, on_ranks
from tests.dispatch.legacy_mistakes import MIXED, Mistake, at_construction, given, patched, skewed, unlimited
from tests.doubles.deep_ep.legacy_clauses import clauses


def normal(clause: str, method: str, **options: Any) -> Mistake:
    return Mistake(clause, phase=MIXED, method=method, **options)


def decode(clause: str, method: str, **options: Any) -> Mistake:
    return Mistake(clause, method=f"low_latency_{method}", **options)


def sized(**sizes: Any) -> Any:
    return lambda phase, size: bf16_case(size, phase, **sizes)


def as_double(ids: torch.Tensor) -> torch.Tensor:
    return ids.double()


MISTAKES = [
    # The buffer
    Mistake("made_outside_capture", in_capture=True),
    Mistake("buffer_aligned", **at_construction(num_nvl_bytes=2**28 + 64)),
    Mistake("nvlink_counted", **at_construction(num_nvl_bytes=2**31)),
    Mistake("rdma_counted", **at_construction(num_rdma_bytes=2**35)),
    Mistake("whole_nodes", size=12, patch=m.as_low_latency_only),
    Mistake("rdma_needs_nodes", phase=MIXED, **at_construction(low_latency_mode=False)),
    Mistake("destroy_if_explicit", **at_construction(explicitly_destroy=False)),
    Mistake("not_used_after_destroy", program=m.closed_first),
    Mistake("known_configuration", phase=MIXED, size=3, patch=unlimited, also=("normal_ranks",)),
    Mistake("no_deterministic_fill", patch=m.deterministic),
    # Streams
    Mistake("event_with_comm_stream", phase=MIXED, program=m.bare_events),
    normal("event_if_async", "dispatch", change=m.synchronous),
    normal("arrives_with_event", "combine", outcome=m.no_event, seen="AssertionError"),
    Mistake("counts_outside_capture", phase=MIXED, in_capture=True, also=("made_outside_capture",)),
    # Normal kernels
    normal("ids_two_dims", "get_dispatch_layout", change=given(topk_idx=skewed)),
    normal("ids_dtype", "get_dispatch_layout", change=given(topk_idx=torch.Tensor.int)),
    normal("layout_agrees", "dispatch", change=given(num_tokens_per_rank=lambda x: x.flip(0))),
    normal("node_counts", "dispatch", size=16, change=given(num_tokens_per_rdma_rank=None)),
    normal("tokens_contiguous", "dispatch", change=given(x=skewed)),
    Mistake("row_units", phase=MIXED, patch=patched("normal_hidden", lambda spec: 20), also=("row_halves",)),
    Mistake("row_halves", phase=MIXED, patch=patched("normal_hidden", lambda spec: 24)),
    Mistake("row_between_nodes", phase=MIXED, size=16, patch=unlimited, case=sized(hidden=8192, tokens=2)),
    normal("mask_shape", "dispatch", change=m.byte_mask),
    normal("experts_divide", "get_dispatch_layout", change=given(num_experts=lambda n: n + 1)),
    Mistake("experts_of_a_rank", phase=MIXED, patch=unlimited, case=sized(slots=129)),
    Mistake("experts_of_a_node", phase=MIXED, size=16, patch=unlimited, case=sized(slots=65)),
    normal("ids_with_weights", "dispatch", change=given(topk_weights=lambda x: x[:, :1]), harmless=False),
    normal("weights_float", "dispatch", change=given(topk_weights=as_double)),
    normal("scales_of_bytes", "dispatch", change=given(x=lambda x: (x, torch.ones(len(x), 1))), harmless=False),
    normal(
        "scales_rows",
        "dispatch",
        change=given(x=lambda x: (x[0], x[1].double())),
        quantize=True,
        program=m.dequantized,
    ),
    Mistake("nvlink_fits", phase=MIXED, **at_construction(num_nvl_bytes=2**15)),
    Mistake("rdma_fits", phase=MIXED, size=16, **at_construction(num_rdma_bytes=2**15)),
    Mistake("normal_ranks", phase=MIXED, size=3, patch=unlimited, also=("known_configuration",)),
    Mistake("queues_between_nodes", phase=MIXED, size=16, **at_construction(num_qps_per_rank=2)),
    normal("worst_within_node", "dispatch", size=16, change=given(num_worst_tokens=64), also=("worst_without_list",)),
    normal("worst_without_list", "dispatch", change=given(num_worst_tokens=64), seen="the library counted 0"),
    normal(
        "local_ids",
        "dispatch",
        change=m.synchronous,
        outcome=m.local_twice,
        also=("event_if_async",),
        seen="AssertionError",
    ),
    normal(
        "list_is_aligned", "dispatch", change=given(expert_alignment=1), alignment=4, seen="counted", harmless=False
    ),
    normal("combine_rows", "combine", change=given(x=skewed)),
    normal("combine_bf16", "combine", change=given(x=torch.Tensor.half)),
    Mistake("combine_columns", phase=MIXED, size=16, patch=patched("normal_hidden", lambda spec: 32)),
    Mistake(
        "combine_unweighted",
        phase=MIXED,
        patch=patched("unpermute", lambda y, row_of, weights: unpermute(y, row_of, torch.ones_like(weights))),
        seen="AssertionError",
        harmless=False,
    ),
    # Low latency
    Mistake("low_latency_mode", size=16, **at_construction(low_latency_mode=False)),
    decode("tokens_bf16", "dispatch", change=given(x=torch.Tensor.float)),
    Mistake("known_hidden", patch=patched("low_latency_hidden", lambda spec: 2176)),
    decode("ids_as_tokens", "dispatch", change=given(topk_idx=torch.Tensor.int)),
    decode("within_capacity", "dispatch", change=given(num_max_dispatch_tokens_per_rank=2), harmless=False),
    decode("experts_divide_too", "dispatch", change=given(num_experts=lambda n: n + 1), also=("areas_fit",)),
    Mistake("few_topk", patch=m.as_low_latency_only, case=sized(slots=6, top_k=12)),
    Mistake("few_experts", patch=m.as_low_latency_only, case=sized(slots=930, tokens=1)),
    Mistake("room_by_fours", patch=patched("low_latency_capacity", lambda spec: 3)),
    Mistake("areas_fit", **at_construction(num_rdma_bytes=2**16)),
    Mistake("queue_depth", program=m.short_queues),
    Mistake("queue_per_expert", **at_construction(num_qps_per_rank=1)),
    decode("hook_or_event", "dispatch", change=given(async_finish=True)),
    decode("ids_in_range", "dispatch", change=given(topk_idx=lambda x: x.masked_fill(x < 0, 4)), harmless=False),
    decode("ids_distinct", "dispatch", change=given(topk_idx=lambda x: x[:, :1].repeat(1, 2)), harmless=False),
    decode("arrives_with_hook", "combine", outcome=m.no_hook, seen="AssertionError"),
    Mistake("receive_before_next", program=m.two_begun, patch=m.not_settling),
    Mistake("two_live_results", program=m.rows_kept, case=sized(hidden=2048), seen="AssertionError"),
    decode("same_capacity", "dispatch", change=m.changing_capacity, also=("areas_fit",)),
    Mistake(
        "clean_after_normal",
        size=16,
        program=m.prompts_then_decode,
        patch=m.not_cleaning,
    ),
    Mistake("rows_past_count", program=m.mixing_experts, seen="AssertionError"),
    Mistake("order_is_open", size=4, program=m.ordered_rows, case=sized(tokens=6), seen="AssertionError"),
    decode(
        "scales_by_columns",
        "dispatch",
        outcome=m.rows_as_views,
        quantize=True,
        program=m.dequantized,
        seen="view size is not compatible",
    ),
    decode("combine_shape", "combine", change=given(x=torch.Tensor.float), also=("combine_out",)),
    decode("combine_ids", "combine", change=given(topk_weights=lambda x: x[:, :1].contiguous()), harmless=False),
    decode("combine_weights_float", "combine", change=given(topk_weights=as_double)),
    decode("combine_out", "combine", change=given(out=lambda x: x.float()), harmless=False),
    decode("same_ids", "combine", change=given(topk_idx=lambda x: x.clamp(min=0)), seen="AssertionError"),
    decode(
        "combine_weighted",
        "combine",
        change=given(topk_weights=torch.ones_like),
        seen="AssertionError",
        harmless=False,
    ),
]


def run(mistake: Mistake, monkeypatch: pytest.MonkeyPatch, *, off: tuple[str, ...]) -> None:
    fabric = mistake.make()
    with monkeypatch.context() as patch, ExitStack() as stack:
        if mistake.patch is not None:
            mistake.patch(patch)
        stack.enter_context(fabric.library.clauses.without(*off, *mistake.also))
        if mistake.in_capture:
            stack.enter_context(fabric.library.capturing())
        on_ranks(mistake.size, lambda ep: mistake.program(ep, fabric))


def test_every_clause_has_a_mistake() -> None:
    assert sorted(mistake.clause for mistake in MISTAKES) == sorted(clause.name for clause in clauses())


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_the_clause_catches_it(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = mistake.seen or f"ContractError.*: {mistake.clause}: "
    with pytest.raises(CommunicationError, match=seen):
        run(mistake, monkeypatch, off=())
    if mistake.harmless:
        run(mistake, monkeypatch, off=(mistake.clause,))
