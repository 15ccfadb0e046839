"""`bench slice`: its floors by hand, and every term run on tiny shapes, under Triton's interpreter without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moe_kernels import backends
from moe_tools.bench import layer_slice
from moe_tools.bench.floor import H200
from moe_tools.bench.slice_shapes import UNITS, V3, Unit, Widths, modelled_network_us
from moe_tools.bench.slice_terms import Slice, per_layer
from moe_tools.bench.timing import Timing

from tests.kernels.devices import DEVICE, ON_GPU

ROOT = Path(__file__).resolve().parents[2]
TINY = Widths(
    hidden=256, intermediate=128, dense_intermediate=128, experts=8, top_k=2, groups=4, heads=4, query_rank=128,
    latent=64, rope=16, nope=32, value=32, vocab=64, page=16, dtype=torch.bfloat16 if ON_GPU else torch.float32,
)  # fmt: skip
TINY_UNITS = (
    Unit("decode", ep=4, tp=2, slots=1, tokens=6, kv_len=20),
    Unit("decode", ep=4, tp=1, slots=2, tokens=4, kv_len=20),
    Unit("prefill", ep=4, tp=1, slots=2, tokens=20, kv_len=20),
)


def floors(unit: Unit) -> dict[str, float]:
    return {term.name: H200.floor_us(term.work) for term in Slice(unit, V3).terms()}


def test_floors_of_deepseek_v3() -> None:
    """Weights of 187 M numbers in attention and 44 M an expert, at 4.8 TB/s; 128 x 4096 pairs of 278.5 kFLOP."""
    decode = floors(UNITS[0])
    assert decode["routed experts"] == pytest.approx(293.6, abs=0.1)
    assert decode["MLA core"] == pytest.approx(147.6, abs=0.1)
    assert decode["shared expert"] == pytest.approx(9.175 + 128 * 2 * (4096 + 7168 + 7168 + 2048) / 4.8e6, abs=0.01)
    assert floors(UNITS[3])["MLA core"] == pytest.approx(125.8, abs=0.1)  # 32 heads: bound by the cache's bytes
    assert floors(UNITS[5])["routed experts"] == pytest.approx(2.0 * 32_768 * 3 * 7168 * 2048 / 1979e6, rel=1e-3)


def test_sums_count_layers() -> None:
    terms = Slice(UNITS[0], V3).terms()
    named = {term.name: term for term in terms}
    assert [per_layer(named[name], V3) for name in ("norms", "q_b", "routed experts", "dense MLP", "head")] == [
        2, 1, 1, 0, 0,
    ]  # fmt: skip
    found = layer_slice.sums(terms, [1.0] * len(terms), V3)
    assert found.step_ms * 1e3 == sum(term.per_step for term in terms)
    assert found.layer_us == len(terms) - 3 + 1  # without plan, dense MLP and head; the norms twice


def test_network_is_what_the_links_need() -> None:
    """128 tokens x 8 copies of 7392 + 14336 bytes: 7/8 of them over NVLink at EP8, 3/4 over the network at EP32."""
    num_bytes = 128 * 8 * (7392 + 14336)
    assert modelled_network_us(UNITS[0], V3, H200) == pytest.approx(num_bytes * 7 / 8 / 450e3)
    assert modelled_network_us(UNITS[1], V3, H200) == pytest.approx(num_bytes * 3 / 4 / 50e3)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_whole(unit: Unit) -> None:
    assert V3.heads % unit.tp == 0 and unit.tokens % unit.tp == 0
    assert unit.slots * unit.rows_per_slot(V3) == V3.top_k * unit.moe_tokens
    assert unit.phase == "decode" or unit.kv_len == unit.tokens


def test_dry_run_measures_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    layer_slice.main(["--dry-run", "--ep", "32", "--record", str(file)])
    text = capsys.readouterr().out
    assert "decode EP32 TP1: 8 slots × 128 rows" in text and "prefill EP32" in text and "EP8" not in text
    assert "modelled" in text and "measured" not in text.replace("nothing is measured", "")
    assert not file.exists()


@pytest.mark.parametrize("unit", TINY_UNITS, ids=lambda unit: f"{unit.phase}-tp{unit.tp}")
def test_every_triton_term_runs(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms of a tiny layer, one after the other, as the hardware run does."""
    monkeypatch.setattr(backends, "default_backend", lambda _: "triton")
    terms = Slice(unit, TINY, DEVICE).terms()
    assert len({term.name for term in terms}) == len(terms)
    with torch.inference_mode():
        layer_slice.whole_layer(terms, TINY)()
        for term in terms:
            if not per_layer(term, TINY):
                term.build()()


def test_report_and_records(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Times are stood in for: every term takes twice its floor."""
    unit, widths = UNITS[3], V3
    terms = Slice(unit, widths).terms()
    timings = {term.name: Timing(2 * H200.floor_us(term.work), 0.0, 0.0, graph=True) for term in terms}
    timings[layer_slice.ONE_LAYER] = replace(timings["norms"], us=300.0)
    layer_slice.show(unit, widths, terms, timings, H200)
    text = capsys.readouterr().out
    assert "×2.00" in text and "in one graph 300.0" in text and "extrapolated" in text and "network, modelled" in text
    layer_slice.record(tmp_path / "gpu.jsonl", unit, widths, terms, timings, H200)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert len(rows) == len(terms) + 1
    assert {"commit", "torch", "triton", "device", "bytes", "flops", "floor_us", "us", "ratio"} <= rows[0].keys()
    assert rows[-1]["extrapolated_step_ms"] == pytest.approx(2 * rows[-1]["step_floor_ms"])
    assert "modelled_network_us" in rows[-1]


def test_benchmarks_and_gpu_tests_import_on_a_bare_machine() -> None:
    """Nothing but torch, triton and pytest's family: the end-to-end tests skip, everything else is there."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("greenlet", "hydra", "omegaconf", "antlr4"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from moe_tools.bench import gpu_cases, kernels, layer_slice
layer_slice.main(["--dry-run", "--ep", "8"])
import pytest
kernel_tests = "tests/kernels tests/tools/test_slice.py tests/gpu".split()
plugins = "-p no:cacheprovider -p pytest_timeout".split()
sys.exit(pytest.main([*kernel_tests, "-q", "--collect-only", *plugins, "-k", "triton or gpu"]))
"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hydra brings a plugin
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "decode EP8" in done.stdout and "test_gpu_demo.py" in done.stdout
