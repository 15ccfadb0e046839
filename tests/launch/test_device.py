"""Which GPU a process takes."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.launch.build import ProcessParts
from moe_runtime.launch.compose import compose
from moe_runtime.launch.device import on_device, process_device


def test_the_processes_of_a_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [process_device("cuda", local_rank=rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert process_device("cpu", local_rank=3) == torch.device("cpu")
    with on_device(torch.device("cpu")):
        pass


def test_weights_go_to_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    composed = compose(["device=cuda"])
    for local_rank in (0, 5):
        parts = ProcessParts.open(composed, ranks_in_process=1, local_rank=local_rank)
        assert parts.device == torch.device("cuda", local_rank)
