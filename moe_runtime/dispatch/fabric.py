"""What fabrics need from outside: an optional library, and the process group on which an ep group's tensors travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.torch_dist import TorchCommunicator
from moe_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a fabric cannot be used here, and what to do about it; both without a full stop."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}."


def device_group(ep: Communicator, fabric: str) -> Any:
    """The NCCL process group of `ep`. ConfigError where its ranks are no processes with a GPU each."""
    group = ep.device_group if isinstance(ep, TorchCommunicator) else None
    if group is None:
        raise ConfigError(
            f"dispatch={fabric}: needs one process with a GPU per rank (NCCL). "
            "Launch with torchrun and device=cuda, or use dispatch=all_to_all."
        )
    return group
