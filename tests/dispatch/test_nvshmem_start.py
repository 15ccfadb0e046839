"""NVSHMEM's start: what one rank finds wrong, all of them say, before they wait for one another."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.nvshmem.heap import Heap
from moe_runtime.errors import ConfigError
from tests.dispatch.contract import make_case
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.test_contract import on_ranks


def test_one_rank_that_shares_its_gpu_is_known_to_all() -> None:
    """NVSHMEM tells it to that rank alone; the others would wait for its allocations."""
    case = make_case(ep=2, slots=1, top_k=1, tokens=[1, 1])

    def program(ep: Communicator) -> None:
        backend = Nvshmem("host", case)
        core = backend.core(ep)
        status = core.init_status
        if ep.rank == 0:
            limited = {core.InitStatus.STATUS_IS_INITIALIZED: core.InitStatus.STATUS_LIMITED_MPG}
            core.init_status = lambda: limited.get(status(), status())  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="several ranks share a GPU"):
            backend.make_with(core, ep)

    on_ranks(2, program)


def test_one_rank_of_another_nvshmem_is_known_to_all() -> None:
    case = make_case(ep=2, slots=1, top_k=1, tokens=[1, 1])

    def program(ep: Communicator) -> None:
        backend = Nvshmem("host", case)
        running = backend.core(ep)
        backend.make_with(running, ep)
        if ep.rank == 1:
            running.n_pes = lambda: 4  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match=r"ranks \[1\] of the group differ so"):
            backend.make_with(running, ep)

    on_ranks(2, program)


def test_too_little_symmetric_memory_is_told_with_its_remedy() -> None:
    def program(ep: Communicator) -> None:
        core = Nvshmem("host", make_case(ep=1, slots=1, top_k=1, tokens=[1])).core(ep)
        heap = Heap(ep, core)

        def full(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            raise core.NvshmemError(f"Failed to allocate memory of bytes {shape[0]}")

        core.tensor = full  # type: ignore[method-assign, assignment]
        with pytest.raises(ConfigError, match=r"4096 bytes of symmetric memory on rank 0 .*NVSHMEM_SYMMETRIC_SIZE"):
            heap.allocate(4096)
        heap.close()

    on_ranks(1, program)
