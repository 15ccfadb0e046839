"""Double of `nvshmem.core` (NVSHMEM for Python) over any communicator, clause by clause from its sources."""

from tests.doubles.nvshmem.core import Core

__all__ = ["Core"]
