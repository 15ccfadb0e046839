"""The clauses of DeepEP V2 (`ElasticBuffer`), read at revision dd758ca (2.1.0). T tokens, R received rows."""

from __future__ import annotations

from typing import Final

from tests.doubles.clauses import Clause, Clauses

_PY: Final = "deep_ep/buffers/elastic.py"
_HPP: Final = "csrc/elastic/buffer.hpp"
_LAYOUT: Final = "deep_ep/include/deep_ep/common/layout.cuh"
_IMPLS: Final = "deep_ep/include/deep_ep/impls"

_RULES: Final = (
    # The buffer
    ("nccl_group", "the group's device backend is NCCL", "deep_ep/utils/comm.py:61"),
    ("made_outside_capture", "a buffer is not made while a CUDA graph is captured: it synchronises", f"{_PY}:365"),
    ("sizes_positive", "without num_bytes, num_max_tokens_per_rank and hidden are positive", f"{_HPP}:657"),
    ("destroy_if_explicit", "destroy() needs explicitly_destroy=True", f"{_PY}:373"),
    ("destroyed_at_end", "with explicitly_destroy=True a buffer that nobody destroys leaks", f"{_HPP}:146"),
    ("not_used_after_destroy", "a destroyed buffer has no runtime any more", f"{_PY}:377"),
    ("no_deterministic_fill", "deterministic algorithms do not fill uninitialised memory", "deep_ep/utils/envs.py:189"),
    # What a dispatch is given
    ("experts_divide", "num_experts is a multiple of the ranks", f"{_HPP}:805"),
    ("room_for_ranks", "at most 1024 ranks", f"{_LAYOUT}:38"),
    ("room_for_experts", "at most 2048 experts", f"{_LAYOUT}:39"),
    ("room_for_experts_of_a_rank", "at most 256 experts per rank", f"{_LAYOUT}:40"),
    ("hybrid_nodes", "between nodes, hybrid kernels reach 32", f"{_IMPLS}/hybrid_dispatch.cuh:336"),
    ("hybrid_ranks_of_a_node", "between nodes, hybrid kernels serve 64 ranks each", f"{_IMPLS}/hybrid_combine.cuh:178"),
    (
        "hybrid_counters",
        "there, a node's ranks and a rank's experts are 128 at most",
        f"{_IMPLS}/hybrid_dispatch.cuh:261",
    ),
    ("lanes_for_topk", "at most 32 choices per token", f"{_IMPLS}/dispatch.cuh:93"),
    ("x_contiguous", "x is contiguous", f"{_HPP}:754"),
    ("row_bytes", "a row of x has a multiple of 32 bytes", f"{_LAYOUT}:198"),
    ("tokens_fit", "T <= num_max_tokens_per_rank", f"{_HPP}:756"),
    ("same_sizes", "capacity, experts, hidden and top-k are equal on all ranks", f"{_PY}:35"),
    ("scales_rows", "there is a row of scales per token", f"{_HPP}:765"),
    ("scales_four_bytes", "scales are fp32 or four packed exponents", f"{_HPP}:767"),
    ("topk_dtype", "topk_idx has the dtype deep_ep.topk_idx_t", f"{_HPP}:777"),
    ("topk_contiguous", "topk_idx is contiguous", f"{_HPP}:778"),
    ("weights_contiguous", "topk_weights is contiguous", f"{_HPP}:785"),
    ("weights_float", "topk_weights is fp32", f"{_HPP}:786"),
    ("ids_in_range", "expert ids are below num_experts, or they count in others' memory", f"{_IMPLS}/dispatch.cuh:101"),
    ("ids_distinct", "the ids of a token are distinct", f"{_IMPLS}/dispatch_copy_epilogue.cuh:107"),
    ("dispatch_fits_buffer", "the buffer holds a dispatch of num_max_tokens_per_rank", f"{_HPP}:963"),
    ("padding_needs_expand", "do_zero_padding comes with do_expand", f"{_HPP}:731"),
    ("cached_without_topk", "with a handle, topk_idx is None", f"{_PY}:938"),
    ("cached_without_sync", "with a handle, do_cpu_sync is not True", f"{_PY}:939"),
    ("cached_same_sizes", "a handle serves its own experts, alignment and capacity", f"{_PY}:947"),
    ("cached_same_tokens", "a handle serves as many tokens as it was made with", f"{_HPP}:874"),
    # Streams
    ("event_type", "previous_event is an EventHandle, not an EventOverlap", f"{_HPP}:720"),
    ("event_with_comm_stream", "previous_event comes with allocate_on_comm_stream=True", f"{_HPP}:540"),
    (
        "event_after_inputs",
        "previous_event covers the inputs; what is written after it may be read too soon",
        f"{_HPP}:544",
    ),
    ("event_if_async", "there is an event to wait for only after an asynchronous call", "deep_ep/utils/event.py:43"),
    ("arrives_with_event", "results of an asynchronous call are there once its event was waited for", f"{_HPP}:563"),
    ("sync_outside_capture", "the host does not wait for counts while a CUDA graph is captured", f"{_HPP}:1020"),
    # What a dispatch gives
    ("order_is_open", "rows of an expert, and of a source rank, stand in any order", f"{_IMPLS}/dispatch.cuh:345"),
    ("gaps_uninitialised", "rows between experts hold anything without do_zero_padding", f"{_HPP}:1076"),
    ("rows_past_count", "without CPU sync there is room for the worst case; the rest holds anything", f"{_HPP}:1067"),
    ("ids_past_count", "the same for recv_topk_idx: what stands there looks like ids", f"{_HPP}:1103"),
    ("weights_past_count", "the same for recv_topk_weights", f"{_HPP}:1107"),
    ("no_list_without_sync", "without CPU sync the list of counts is empty", f"{_HPP}:1065"),
    ("list_is_aligned", "the list's counts are rounded up to the alignment", f"{_IMPLS}/dispatch.cuh:215"),
    (
        "local_ids",
        "recv_topk_idx counts from this rank's first expert; -1 is another's",
        f"{_IMPLS}/dispatch_copy_epilogue.cuh:106",
    ),
    ("compact_psum", "without do_expand, psum is over counts rounded up to the alignment", f"{_HPP}:1120"),
    (
        "compiled_for_capacity",
        "kernels are compiled for every capacity, size and alignment",
        "csrc/kernels/elastic/dispatch.hpp:227",
    ),
    # Combine
    ("combine_bf16", "combine takes bf16", f"{_HPP}:1203"),
    ("combine_contiguous", "combine's x is contiguous", f"{_HPP}:1202"),
    ("combine_hidden", "combine's hidden is a multiple of 256", f"{_IMPLS}/combine.cuh:109"),
    ("combine_compact_rows", "without do_expand, combine's x has the rows that dispatch gave", f"{_HPP}:1219"),
    (
        "combine_expanded_rows",
        "with do_expand too, though nobody looks: other rows are read out of bounds",
        f"{_IMPLS}/combine.cuh:135",
    ),
    ("combine_fits_buffer", "the buffer holds a combine of num_max_tokens_per_rank", f"{_HPP}:1254"),
    (
        "combine_unweighted",
        "combine sums; it never multiplies by topk_weights, it only carries them",
        f"{_IMPLS}/combine.cuh:216",
    ),
    (
        "partial_sums_bf16",
        "a rank's sum for a token is rounded to bf16 before it goes home",
        f"{_IMPLS}/combine_utils.cuh:165",
    ),
    ("node_sums_bf16", "between nodes, so is the sum of a node's ranks", f"{_IMPLS}/hybrid_combine.cuh:522"),
)


def clauses() -> Clauses:
    """All of them, on."""
    return Clauses(*(Clause(*rule) for rule in _RULES))
