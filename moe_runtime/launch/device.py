"""Which device the ranks of a process compute on, and making it current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from moe_runtime.config import Device


def process_device(device: Device, *, local_rank: int = 0) -> torch.device:
    """The CPU, or a GPU by its number: those of this machine in turn, by the process's rank on it."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU current within the block, for the thread that enters it: kernels launch on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
