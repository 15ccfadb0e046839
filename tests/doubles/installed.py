"""A run in which a fabric's double is what is installed, on any communicator and on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch import deep_ep, fabric
from moe_runtime.dispatch.deep_ep.detect import Library
from tests.doubles.deep_ep import elastic, legacy
from tests.doubles.fabric_group import FabricGroup


def install_deep_ep(monkeypatch: pytest.MonkeyPatch, generation: int) -> Any:
    """The double of this generation, found as DeepEP."""
    module: Any = elastic.Library() if generation == 2 else legacy.library()
    found = Library(module, "double", (generation,))
    monkeypatch.setattr(fabric, "no_gpu_per_rank", lambda device, *, virtual: None)
    monkeypatch.setattr(deep_ep, "find", lambda: found)
    monkeypatch.setattr(deep_ep, "device_group", _group)
    return module


def _group(ep: Communicator, name: str) -> FabricGroup:
    return FabricGroup(ep)
