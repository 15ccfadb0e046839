"""The process group on which an ep group's tensors travel, for libraries that bring kernels of their own."""

from __future__ import annotations

from typing import Any

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.torch_dist import TorchCommunicator
from moe_runtime.dispatch.missing import Missing
from moe_runtime.errors import ConfigError


def no_gpu_per_rank(device: torch.device, *, virtual: bool) -> Missing | None:
    """Why ranks as launched cannot use a GPU fabric, or None."""
    if device.type != "cuda":
        return Missing(f"device={device.type}, and it needs a GPU per rank", "Set device=cuda, or dispatch=all_to_all")
    if virtual:
        return Missing(
            "all ranks live in one process, and it needs a process per rank",
            "Launch with torchrun, or set launcher=process or dispatch=all_to_all",
        )
    return None


def device_group(ep: Communicator, fabric: str) -> Any:
    """The NCCL process group of `ep`. ConfigError where its ranks are no processes with a GPU each."""
    group = ep.device_group if isinstance(ep, TorchCommunicator) else None
    if group is None:
        raise ConfigError(
            f"dispatch={fabric}: needs one process with a GPU per rank (NCCL). "
            "Launch with torchrun and device=cuda, or use dispatch=all_to_all."
        )
    return group
