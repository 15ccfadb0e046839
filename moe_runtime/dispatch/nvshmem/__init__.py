"""Dispatch over NVSHMEM's symmetric memory: by our own kernels row by row, else from the host by whole allocations."""

from __future__ import annotations

from typing import Any, Literal

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher, Phase
from moe_runtime.dispatch.fabric import device_group
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.nvshmem import device as by_kernels
from moe_runtime.dispatch.nvshmem import host as by_calls
from moe_runtime.dispatch.nvshmem.detect import Library, find
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError

__all__ = [
    "Library",
    "buffer_bytes",
    "find",
    "graph_safe",
    "make",
    "max_capacity",
    "obstacle",
    "path_of",
    "sums_at_home",
]

Path = Literal["device", "host"]


def path_of(spec: DispatchSpec, *, bitcode: bool) -> Path | Missing:
    """Which of the two serves `spec`; `bitcode`: NVSHMEM's device library is there.

    The kernels wherever they reach all ranks: within a node by address, beyond it with the device library. The host's
    calls otherwise, for as many ranks as they take.
    """
    limit = by_kernels.unfit(spec)
    reaches = bitcode or spec.ep <= spec.ranks_per_node
    if limit is None and reaches:
        return "device"
    if by_calls.unfit(spec) is None:
        return "host"
    if limit is not None:
        return limit
    return Missing(
        f"ep={spec.ep} on nodes of {spec.ranks_per_node} ranks, and without libnvshmem_device.bc it takes at most "
        f"{by_calls.MAX_RANKS} ranks beyond a node",
        "pip install nvidia-nvshmem-cu13==3.4.5, or set dispatch=all_to_all",
    )


def obstacle(spec: DispatchSpec, *, limits_only: bool) -> Missing | None:
    """Why NVSHMEM cannot serve `spec`: its limits and, unless `limits_only`, what is not installed."""
    library = find()
    if isinstance(library, Missing) and not limits_only:
        return library
    path = path_of(spec, bitcode=limits_only or _bitcode(library))
    return path if isinstance(path, Missing) else None


def buffer_bytes(spec: DispatchSpec) -> int:
    """Most bytes on a rank, by the path that serves `spec` here. ConfigError where none does."""
    return by_kernels.buffer_bytes(spec) if _path(spec) == "device" else by_calls.buffer_bytes(spec)


def max_capacity(spec: DispatchSpec, phase: Phase) -> int | None:
    """Most tokens of a rank in one dispatch of any phase."""
    return by_kernels.max_capacity(spec) if _path(spec) == "device" else by_calls.max_capacity(spec)


def graph_safe(spec: DispatchSpec) -> bool:
    """Whether decode steps can be captured as CUDA graphs: with the kernels, not with the host's calls."""
    return _here(spec) == "device"


def sums_at_home(spec: DispatchSpec) -> bool:
    """With the kernels; the host's calls bring a rank's share, already summed."""
    return _here(spec) == "device"


def make(ep: Communicator, spec: DispatchSpec, *, device: torch.device | str) -> Dispatcher[Any]:
    """The dispatcher of the path that serves `spec` here. Collective.

    ConfigError where NVSHMEM is not there, ranks are no processes with a GPU each, sizes do not fit, or ranks found
    different things.
    """
    library = find()
    if isinstance(library, Missing):
        raise ConfigError(f"dispatch=nvshmem: {library}")
    group = device_group(ep, "nvshmem")
    path = _path(spec)
    found = ep.exchange([int(path == "device")])
    if len(set(found)) > 1:
        without = [rank for rank, (kernels,) in enumerate(found) if not kernels]
        raise ConfigError(
            f"dispatch=nvshmem: ranks {without} lack libnvshmem_device.bc, others have it. "
            "Install the same on all machines: pip install nvidia-nvshmem-cu13==3.4.5."
        )
    made = by_kernels.DeviceDispatcher if path == "device" else by_calls.HostDispatcher
    return made(ep, spec, library=library.module, group=group, device=device)


def _here(spec: DispatchSpec) -> Path | Missing:
    """As installed here; where nothing is, as the recommended wheels would serve it."""
    library = find()
    return path_of(spec, bitcode=isinstance(library, Missing) or _bitcode(library))


def _path(spec: DispatchSpec) -> Path:
    """The same. ConfigError where none serves `spec`."""
    path = _here(spec)
    if isinstance(path, Missing):
        raise ConfigError(f"dispatch=nvshmem: {path}")
    return path


def _bitcode(library: Library | Missing) -> bool:
    return isinstance(library, Library) and library.bitcode is not None
