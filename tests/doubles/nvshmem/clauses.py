"""What NVSHMEM for Python asks of its callers, and leaves to them. Sources: NVIDIA/nvshmem at 2d7d25f0.

`core/` stands for `nvshmem4py/nvshmem/core/`.
"""

from __future__ import annotations

from tests.doubles.clauses import Clause, Clauses


def nvshmem_clauses() -> Clauses:
    """All clauses, on."""
    return Clauses(
        Clause("init_first", "memory is allocated after init", "core/memory.py:76"),
        Clause("init_method", "initializer_method is mpi, uid or emulated_mpi", "core/init_fini.py:170"),
        Clause("init_uid", "uid, rank and nranks are given, mpi_comm is not", "core/init_fini.py:221"),
        Clause("one_uid", "all ranks pass the unique id that one of them made", "core/init_fini.py:83-87,224-226"),
        Clause("same_size", "an allocation is collective, of one size", "core/memory.py:72"),
        Clause(
            "nothing_zeroed", "fresh memory holds anything", "src/host/mem/mem_heap.cpp:2288-2307 (calloc is another)"
        ),
        Clause("no_fp8", "torch dtypes that numpy has not are refused", "core/utils.py:34-43,147-148"),
        Clause(
            "base_pointer",
            "a tensor is found by the address at which its allocation begins",
            "core/interop/torch.py:65-67",
        ),
        Clause("whole_allocation", "a put moves the smaller of two allocations, whatever the view", "core/rma.py:120"),
        Clause("stream", "every call stands on a stream; there is no default", "core/rma.py:108-110,205-207"),
        Clause("signal_buffer", "a signal is a Buffer of at least 8 bytes", "core/rma.py:122-123"),
        Clause("late_data", "data of a put is there once its signal was waited for", "src/host/comm/putget.cpp:85-90"),
        Clause("in_flight", "data of a put may land as soon as it is issued", "src/host/comm/putget.cpp:85-90"),
        Clause("signal_comes", "a wait ends only if somebody sends what it waits for", "core/rma.py:190-210"),
        Clause(
            "limited_mpg", "no wait on a stream where processes share a GPU without MPS", "src/host/comm/sync.cpp:60-63"
        ),
        Clause("frozen_numbers", "a captured call replays the numbers it was captured with", "core/rma.py:124-132"),
        Clause(
            "no_capture",
            "allocation, free and barriers of the host are not captured",
            "src/host/mem/mem_heap.cpp:2300,2365",
        ),
        Clause(
            "own_view",
            "a view of one's own memory is one more reference, so free does not free",
            "core/nvshmem_types.py:394-399",
        ),
        Clause("mapped", "only memory of ranks within reach can be addressed", "core/nvshmem_types.py:389-392"),
        Clause("freed_once", "what is freed is allocated", "core/memory.py:101-103"),
        Clause("same_free", "free is collective", "core/memory.py:105"),
        Clause("free_all", "everything is freed before finalize", "core/memory.py:37-52"),
        Clause("no_use_after_free", "freed memory is no one's", "core/nvshmem_types.py:356-371"),
        Clause("finalize_once", "what is ended was started", "core/init_fini.py:299-302"),
    )
