"""launcher=virtual: loading that is interrupted, and what is left after the end."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moe_runtime import LLM
from moe_runtime.launch.build import LoadProgress
from moe_runtime.launch.compose import compose
from moe_runtime.loading.source import CheckpointSource
from tests.api.tiny import NUM_MOE_LAYERS, write_tiny


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_loading_ends_the_loading(tmp_path: Path) -> None:
    composed = compose([f"model={write_tiny(tmp_path / 'model')}", "ep=8"])
    before = set(threading.enumerate())
    loaded: list[LoadProgress] = []

    def on_progress(progress: LoadProgress) -> None:
        loaded.append(progress)
        if len(loaded) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt):
        LLM.from_composed(composed, on_progress=on_progress)
    assert len(loaded) < 8 * (1 + NUM_MOE_LAYERS), "the rest is not loaded"
    assert set(threading.enumerate()) == before


def test_weights_are_released_by_close_though_the_object_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = CheckpointSource.read, list[weakref.ref[Tensor]]()

    def watched(source: CheckpointSource, *place: Any, **kind: Any) -> Tensor:
        seen.append(weakref.ref(tensor := read(source, *place, **kind)))
        return tensor

    monkeypatch.setattr(CheckpointSource, "read", watched)
    llm = LLM(str(write_tiny(tmp_path / "model", text=False)), overrides=["ep=2", "engine.kv_cache_bytes=1MiB"])
    assert any(tensor() is not None for tensor in seen)
    llm.close()
    gc.collect()
    assert not [tensor() for tensor in seen if tensor() is not None]
