"""The same laws over four real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moe_runtime.comm.process import host_store

WORLD = 4


def test_laws_hold_over_gloo() -> None:
    store = host_store(deadline_s=60.0)
    program = Path(__file__).with_name("gloo_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(WORLD), str(store.port)],
            cwd=program.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        texts = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(texts)
