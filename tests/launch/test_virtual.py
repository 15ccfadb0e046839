"""launcher=virtual: loading that is interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from moe_runtime import LLM
from moe_runtime.launch.build import LoadProgress
from moe_runtime.launch.compose import compose
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
