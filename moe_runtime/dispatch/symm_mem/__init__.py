"""Dispatch by torch's symmetric memory: its all-to-all of expert splits over NVSHMEM.

Never chosen by dispatch=auto: see `dispatcher.py` for what the operators leave open.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher, Phase
from moe_runtime.dispatch.fabric import device_group
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.dispatch.symm_mem import sizes
from moe_runtime.dispatch.symm_mem.detect import Library, find
from moe_runtime.dispatch.symm_mem.sizes import buffer_bytes
from moe_runtime.errors import ConfigError

__all__ = ["Library", "buffer_bytes", "find", "graph_safe", "make", "max_capacity", "obstacle", "sums_at_home"]


def obstacle(spec: DispatchSpec, *, limits_only: bool) -> Missing | None:
    """Why it cannot serve `spec`: its limits and, unless `limits_only`, what this torch lacks."""
    library = None if limits_only else find()
    return library if isinstance(library, Missing) else sizes.unfit(spec)


def max_capacity(spec: DispatchSpec, phase: Phase) -> int | None:
    """Most tokens of a rank in one dispatch: as many as there is memory for."""
    return sizes.max_capacity(spec)


def graph_safe(spec: DispatchSpec) -> bool:
    """Splits stay on the device."""
    return True


def sums_at_home(spec: DispatchSpec) -> bool:
    return True


def make(ep: Communicator, spec: DispatchSpec, *, device: torch.device | str) -> Dispatcher[Any]:
    """Collective. ConfigError where it is not there, where ranks are no processes with a GPU each, and on sizes that it
    does not take."""
    if (missing := obstacle(spec, limits_only=False)) is not None:
        raise ConfigError(f"dispatch=symm_mem: {missing}")
    library = find()
    assert isinstance(library, Library), "an obstacle otherwise"
    from moe_runtime.dispatch.symm_mem.dispatcher import SymmMemDispatcher

    return SymmMemDispatcher(ep, spec, library=library.module, group=device_group(ep, "symm_mem"), device=device)
