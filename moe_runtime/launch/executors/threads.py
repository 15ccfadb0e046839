"""How many CPU threads the operations of a process use, for as long as its ranks run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_runtime.config import RuntimeConfig

SMALL_OPS_FROM = 8
"""Virtual ranks from which on one thread is faster: each rank's operations are too small to split."""


def threads_of_virtual_ranks(config: RuntimeConfig) -> int | None:
    """For all ranks together; None leaves torch's choice. One in batch-invariant mode, where sums depend on it."""
    if config.engine.batch_invariant:
        return 1
    return config.num_threads or (1 if config.ep >= SMALL_OPS_FROM else None)


def threads_per_process(config: RuntimeConfig, local_world: int) -> int:
    """`num_threads`, or this machine's cores shared out; one in batch-invariant mode."""
    if config.engine.batch_invariant:
        return 1
    return config.num_threads or max(1, (os.cpu_count() or 1) // local_world)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """`count` threads for torch within the block; None changes nothing.

    Enter it on the thread that runs the operations: OpenMP counts per thread, MKL for the whole process.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
