"""The clauses of DeepEP V1 (`Buffer`), read at revision dd758ca (2.1.0). T tokens, K top-k, R ranks, C capacity."""

from __future__ import annotations

from typing import Final

from tests.doubles.clauses import Clause, Clauses

_PY: Final = "deep_ep/buffers/legacy.py"
_HPP: Final = "csrc/legacy/buffer.hpp"
_CONFIG: Final = "csrc/legacy/config.hpp"
_CU: Final = "csrc/kernels/legacy"

_RULES: Final = (
    # The buffer
    ("made_outside_capture", "a buffer is not made while a CUDA graph is captured: it synchronises", f"{_HPP}:252"),
    ("buffer_aligned", "both sizes are multiples of 128 bytes", f"{_HPP}:107"),
    ("nvlink_counted", "beside an RDMA buffer, the NVLink buffer is smaller than 2 GiB", f"{_HPP}:108"),
    ("rdma_counted", "the RDMA buffer is smaller than 32 GiB", f"{_HPP}:112"),
    ("whole_nodes", "fewer than 8 ranks, or a multiple of 8", f"{_HPP}:114"),
    ("rdma_needs_nodes", "an RDMA buffer needs more than 8 ranks, or low-latency mode", f"{_HPP}:115"),
    ("destroy_if_explicit", "destroy() needs explicitly_destroy=True", f"{_PY}:144"),
    ("not_used_after_destroy", "a destroyed buffer has no runtime any more", f"{_PY}:147"),
    ("known_configuration", "there are recommended configurations for some numbers of ranks only", f"{_PY}:259"),
    ("no_deterministic_fill", "deterministic algorithms do not fill uninitialised memory", "deep_ep/utils/envs.py:189"),
    # Streams
    ("event_with_comm_stream", "allocate_on_comm_stream needs a previous event and an async call", f"{_HPP}:512"),
    ("event_if_async", "there is an event to wait for only after an async call", "deep_ep/utils/event.py:43"),
    ("arrives_with_event", "results of an async call are there once its event was waited for", f"{_HPP}:670"),
    ("counts_outside_capture", "the host does not wait for counts while a CUDA graph is captured", f"{_HPP}:581"),
    # Normal kernels
    ("ids_two_dims", "topk_idx is [T, K], contiguous", f"{_HPP}:343"),
    ("ids_dtype", "topk_idx has the dtype deep_ep.topk_idx_t", f"{_HPP}:370"),
    (
        "layout_agrees",
        "the counts are those of is_token_in_rank, or a receiver waits for ever",
        f"{_CU}/intranode.cu:77",
    ),
    ("node_counts", "between nodes the counts per node are given too", f"{_HPP}:912"),
    ("tokens_contiguous", "x is [T, hidden], contiguous", f"{_HPP}:457"),
    ("row_units", "a row of x has a multiple of 16 bytes", f"{_HPP}:458"),
    ("row_halves", "within a node half a row is a multiple of 16 bytes, 8184 at most", f"{_CU}/intranode.cu:304"),
    ("row_between_nodes", "between nodes a row with its routing has at most 16376 bytes", f"{_CU}/internode.cu:578"),
    ("mask_shape", "is_token_in_rank is [T, R] bool", f"{_HPP}:460"),
    ("experts_divide", "num_experts is a multiple of the ranks", f"{_HPP}:468"),
    ("experts_of_a_rank", "at most 128 experts per rank within a node", f"{_CU}/intranode.cu:168"),
    ("experts_of_a_node", "at most 512 experts per node between nodes", f"{_CU}/internode.cu:227"),
    ("ids_with_weights", "topk_idx and topk_weights come together, as [T, K]", f"{_HPP}:481"),
    ("weights_float", "topk_weights is fp32, contiguous", f"{_HPP}:489"),
    ("scales_of_bytes", "scales come with one byte per value", f"{_HPP}:498"),
    ("scales_rows", "there is a row of scales, fp32 or int32, per token", f"{_HPP}:501"),
    ("nvlink_fits", "the NVLink buffer holds the queues of all channels", f"{_HPP}:627"),
    ("rdma_fits", "between nodes the RDMA buffer holds them too", f"{_CU}/internode.cu:430"),
    ("normal_ranks", "2, 4 or 8 ranks, or 2, 3, 4, 6, 8, 12, 16, 18 or 20 nodes of 8", f"{_CU}/launch.cuh:53"),
    ("queues_between_nodes", "between nodes a queue pair per channel, or per SM and more", f"{_CU}/internode.cu:497"),
    ("worst_within_node", "num_worst_tokens is for one node only", f"{_PY}:379"),
    ("worst_without_list", "with num_worst_tokens the list of counts is empty", f"{_HPP}:571"),
    ("local_ids", "recv_topk_idx counts from this rank's first expert; -1 is another's", f"{_CU}/intranode.cu:386"),
    ("list_is_aligned", "the list's counts are rounded up to expert_alignment", f"{_CU}/intranode.cu:87"),
    ("combine_rows", "combine's x has the rows that dispatch gave, contiguous", f"{_HPP}:746"),
    ("combine_bf16", "combine takes bf16", f"{_CU}/launch.cuh:104"),
    ("combine_columns", "combine between nodes takes a multiple of 256 columns", f"{_CU}/internode.cu:1588"),
    ("combine_unweighted", "combine sums rows as they are", f"{_CU}/intranode.cu:987"),
    # Low latency
    ("low_latency_mode", "low-latency calls need low_latency_mode=True", f"{_HPP}:1474"),
    ("tokens_bf16", "x is [T, hidden] bf16, contiguous; it is cast to fp8 on the way", f"{_HPP}:1478"),
    ("known_hidden", "hidden is 2048, 2560, 3072, 4096, 5120, 6144, 7168 or 8192", f"{_CU}/launch.cuh:113"),
    ("ids_as_tokens", "topk_idx is [T, K], contiguous, of deep_ep.topk_idx_t", f"{_HPP}:1480"),
    ("within_capacity", "T <= C", f"{_HPP}:1481"),
    ("experts_divide_too", "num_experts is a multiple of the ranks", f"{_HPP}:1483"),
    ("few_topk", "at most 11 choices per token", f"{_CU}/internode_ll.cu:501"),
    ("few_experts", "at most 14 experts per multiprocessor", f"{_CU}/internode_ll.cu:382"),
    ("room_by_fours", "R * C is a multiple of 4, with and without fp8", f"{_HPP}:1526"),
    ("areas_fit", "the RDMA buffer holds both send, receive and signal areas", f"{_HPP}:1503"),
    ("queue_depth", "NVSHMEM_QP_DEPTH >= 2 * (C + 1)", f"{_PY}:609"),
    ("queue_per_expert", "there is a queue pair per local expert", f"{_CU}/internode_ll.cu:284"),
    ("hook_or_event", "return_recv_hook and async_finish exclude each other", f"{_HPP}:1511"),
    ("ids_in_range", "expert ids are below num_experts, or rows go to memory of others", f"{_CU}/internode_ll.cu:257"),
    ("ids_distinct", "the ids of a token are distinct, or a block of C rows overflows", f"{_CU}/internode_ll.cu:255"),
    ("arrives_with_hook", "results are there once the hook was called", f"{_HPP}:1591"),
    ("receive_before_next", "a call clears the counters of an open receive, which hangs", f"{_CU}/internode_ll.cu:289"),
    ("two_live_results", "results stay good until the next but one low-latency call", f"{_PY}:564"),
    ("same_capacity", "C, hidden and experts stay: another C moves areas that others still read", f"{_CONFIG}:172"),
    ("clean_after_normal", "normal kernels between nodes leave counters that must be zero", f"{_PY}:542"),
    ("rows_past_count", "rows of a slot from its count on hold anything", f"{_HPP}:1516"),
    ("order_is_open", "rows of a slot, and of a source rank in it, stand in any order", f"{_CU}/internode_ll.cu:408"),
    ("scales_by_columns", "scales have rows adjacent in memory", f"{_HPP}:1539"),
    ("combine_shape", "combine's x is [experts of a rank, R * C, hidden], bf16, contiguous", f"{_HPP}:1615"),
    ("combine_ids", "combine's topk_idx and topk_weights have one shape, at most C rows", f"{_HPP}:1620"),
    ("combine_weights_float", "combine's topk_weights is fp32, contiguous", f"{_HPP}:1622"),
    ("combine_out", "combine's out is [T, hidden] in x's dtype, contiguous", f"{_HPP}:1658"),
    ("same_ids", "combine reads a row for each id it is given, sent or not", f"{_CU}/internode_ll.cu:1046"),
    ("combine_weighted", "combine multiplies by topk_weights", f"{_CU}/internode_ll.cu:708"),
)


def clauses() -> Clauses:
    """All of them, on."""
    return Clauses(*(Clause(*rule) for rule in _RULES))
