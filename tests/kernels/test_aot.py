"""Kernels compiled for sm_90 without a GPU: they build, and registers, spills and shared memory stay within limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from moe_kernels.aot import MAX_SHARED_BYTES, AotCase, Resources

ROOT = Path(__file__).resolve().parents[2]


def compile_in_process(report: Path, *arguments: str) -> list[Resources]:
    """In a process of its own: in this one Triton interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-m", "moe_kernels.aot", "--report", str(report), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return [Resources(**json.loads(line)) for line in report.read_text(encoding="utf-8").splitlines()]


def test_one_configuration_of_every_kernel_compiles(tmp_path: Path) -> None:
    resources = compile_in_process(tmp_path / "report.jsonl", "--quick")
    assert resources
    assert all(r.registers and r.cubin_bytes for r in resources)


@pytest.mark.slow
def test_every_configuration_compiles(tmp_path: Path) -> None:
    assert len(compile_in_process(tmp_path / "report.jsonl")) >= len(
        compile_in_process(tmp_path / "quick.jsonl", "--quick")
    )


def test_what_exceeds_a_limit_is_named() -> None:
    case = AotCase("norm", "wide", None, {}, {}, num_warps=4, max_registers=64)
    fine = Resources("norm", "wide", 64, 0, MAX_SHARED_BYTES, 1, wgmma=False, tma=False)
    assert fine.excess(case) is None
    spilled = Resources("norm", "wide", 65, 8, 0, 1, wgmma=False, tma=False)
    by_value = Resources("norm", "wide", 1, 0, 0, 1, wgmma=False, tma=False, narrow=16)
    assert by_value.excess(case) is None
    wide = replace(case, max_narrow=0)
    assert by_value.excess(wide) == "norm wide: 16 loads and stores by 1 or 2 bytes, at most 0"
    assert spilled.excess(case) == "norm wide: 65 registers, at most 64; 8 spilled bytes, at most 0"
