"""A double of torch's symmetric memory over NVSHMEM with its all-to-all of expert splits, over any communicator."""

from tests.doubles.symm_mem.calls import SymmMem
from tests.doubles.symm_mem.clauses import symm_mem_clauses

__all__ = ["SymmMem", "symm_mem_clauses"]
