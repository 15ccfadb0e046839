"""Which backend serves a device, and that one function says so."""

from __future__ import annotations

import pytest
import torch
from moe_kernels import backends
from moe_kernels.norm import rms_norm


@pytest.mark.parametrize(("device", "backend"), [("cpu", "torch"), ("meta", "torch"), ("cuda:1", "triton")])
def test_default_backend(device: str, backend: str) -> None:
    assert backends.default_backend(torch.device(device)) == backend


def test_operations_ask_the_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def recorded(device: torch.device) -> str:
        asked.append(device)
        return "torch"

    monkeypatch.setattr(backends, "default_backend", recorded)
    x = torch.ones(2, 4)
    assert backends.choose_backend(x, None, op="any") == "torch"
    assert asked == [x.device]
    rms_norm(x, x[0], 1e-6)
    assert len(asked) == 2
    rms_norm(x, x[0], 1e-6, backend="torch")
    assert len(asked) == 2, "what is named is not chosen"
