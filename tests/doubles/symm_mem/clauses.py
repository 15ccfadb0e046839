"""What torch's all-to-all of expert splits asks of its callers, and leaves to them.

Sources: pytorch/pytorch, torch/csrc/distributed/c10d/symm_mem, the revision with teams and with NVSHMEM's put with
signal, before pull 192300 (torch 2.13 has these signatures). `ext` stands for `nvshmem_extension.cu`, `mem` for
`NVSHMEMSymmetricMemory.cpp`.
"""

from __future__ import annotations

from tests.doubles.clauses import Clause, Clauses


def symm_mem_clauses() -> Clauses:
    """All clauses, on."""
    return Clauses(
        Clause("backend", "its memory is NVSHMEM's, chosen before the first allocation", "mem:500-510, ext:627"),
        Clause("same_size", "an allocation is collective, of one size", "mem:380 (nvshmem_malloc)"),
        Clause("nothing_zeroed", "fresh memory holds anything", "mem:380-382"),
        Clause("symmetric", "all four tensors lie in symmetric memory", "mem:428-431, ext:627-630,765-768"),
        Clause("same_order", "ranks make the same allocation known at the same time", "mem:444-449"),
        Clause("no_capture", "what allocates or waits for the host is not captured", "mem:380,444 (cudaMemset)"),
        Clause("ranks_out", "at most 32 ranks", "ext:634"),
        Clause("ranks_home", "at most 16 ranks on the way home", "ext:772"),
        Clause("slots_out", "at most 16 slots of a rank", "ext:671"),
        Clause("slots_home", "at most 32 slots of a rank on the way home", "ext:806"),
        Clause("align", "major_align is positive", "ext:638"),
        Clause("contiguous", "all four tensors are contiguous", "ext:646-650,782-786"),
        Clause("two_rows", "[2, P] splits with offsets, P a multiple of the ranks", "ext:653-658,789-793"),
        Clause("same_rows", "input and out have one dtype and one stride of rows", "ext:661-663,796-798"),
        Clause("int64", "splits and offsets are int64", "ext:664-666,799-801"),
        Clause("fits", "the splits are no more rows than the input has", "ext:420"),
        Clause("not_negative", "no split is negative", "ext:440"),
        Clause("room", "what comes must fit; nobody looks", "ext:567-573"),
        Clause("gaps", "rows that nothing was put in hold anything", "ext:559-574"),
        Clause("empty_slot", "a slot without rows takes major_align rows all the same", "ext:536"),
        Clause("no_exit", "others read the input until all have begun the next operation", "ext:446,569,580"),
        Clause("offsets_in_use", "the next operation writes its splits elsewhere", "ext:442-446,564-565"),
        Clause(
            "late_block",
            "block 0 ends by writing over the offsets by which blocks with a second split, or late ones, fetch",
            "ext:560-578,707; pull 192300",
        ),
    )
