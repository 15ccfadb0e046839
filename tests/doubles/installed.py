"""A run in which a fabric's double is what is installed, on any communicator and on CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch import deep_ep, fabric, nvshmem, symm_mem
from moe_runtime.dispatch.deep_ep.detect import Library
from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
from moe_runtime.dispatch.nvshmem.host import HostDispatcher
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.dispatch.symm_mem.dispatcher import SymmMemDispatcher
from tests.doubles.deep_ep import elastic, legacy
from tests.doubles.fabric_group import FabricGroup
from tests.doubles.nvshmem import Core
from tests.doubles.nvshmem.clauses import nvshmem_clauses
from tests.doubles.symm_mem import SymmMem, symm_mem_clauses


def install_deep_ep(monkeypatch: pytest.MonkeyPatch, generation: int) -> Any:
    """The double of this generation, found as DeepEP."""
    module: Any = elastic.Library() if generation == 2 else legacy.library()
    found = Library(module, "double", (generation,))
    monkeypatch.setattr(fabric, "no_gpu_per_rank", lambda device, *, virtual: None)
    monkeypatch.setattr(deep_ep, "find", lambda: found)
    monkeypatch.setattr(deep_ep, "device_group", _group)
    return module


def install_nvshmem(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The double found as NVSHMEM, one library per rank, and served by this path."""
    kinds: dict[str, Any] = {"host": HostDispatcher, "device": DeviceDispatcher}

    def make(ep: Communicator, spec: DispatchSpec, *, device: torch.device | str) -> Any:
        return kinds[path](ep, spec, library=Core(ep, nvshmem_clauses()), group=None, device=torch.device(device))

    monkeypatch.setattr(fabric, "no_gpu_per_rank", lambda device, *, virtual: None)
    monkeypatch.setattr(nvshmem, "find", lambda: nvshmem.Library(None, "double", "double", None))
    monkeypatch.setattr(nvshmem, "path_of", lambda spec, *, bitcode: path)
    monkeypatch.setattr(nvshmem, "make", make)


def install_symm_mem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double found as torch's symmetric memory, one library per rank."""

    def make(ep: Communicator, spec: DispatchSpec, *, device: torch.device | str) -> Any:
        library, group = SymmMem(ep, symm_mem_clauses()), _NamedGroup(ep)
        return SymmMemDispatcher(ep, spec, library=library, group=group, device=torch.device(device))

    monkeypatch.setattr(fabric, "no_gpu_per_rank", lambda device, *, virtual: None)
    unused: Any = None  # `make` takes a library per rank
    monkeypatch.setattr(symm_mem, "find", lambda: symm_mem.Library(unused, "double"))
    monkeypatch.setattr(symm_mem, "make", make)


@dataclass(frozen=True)
class _NamedGroup(FabricGroup):
    group_name: str = "ep"


def _group(ep: Communicator, name: str) -> FabricGroup:
    return FabricGroup(ep)
