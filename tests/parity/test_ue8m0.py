"""`scale_fmt: ue8m0`: every activation that meets an FP8 weight is rounded by a scale that is a power of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_kernels.linear import scaled as linear_scaled
from moe_kernels.permute.triton import QUANTIZE
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from moe_models.kept_fp8 import kept_fp8
from moe_models.registry import load_config
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.launch.compose import compose
from moe_runtime.launch.kernels import kernel_report
from moe_runtime.launch.shuffle import whole_spec
from tests.data import random_prompts
from tests.invariance.runs import Answer, run
from tests.models.fp8_checkpoint import write_fp8

PROMPTS = random_prompts((5, 2), seed=3)
WORDS = ("fp8_weights=keep", "dtype=float32", "engine.cuda_graphs=off", "dispatch=local", "ep=1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8(tmp_path_factory.mktemp("plain"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def ue8m0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights: what they are multiplied by is what this is about."""
    folder = write_fp8(tmp_path_factory.mktemp("ue8m0"), num_hidden_layers=2)
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["quantization_config"]["scale_fmt"] = "ue8m0"
    file.write_text(json.dumps(values), encoding="utf-8")
    return folder


def answers(folder: Path) -> list[Answer]:
    return run(folder, [PROMPTS], WORDS, new_tokens=1, score_prompts=False)


def are_powers(scale: Tensor) -> bool:
    return bool((scale.frexp().mantissa == 0.5).all())


def test_linear_layers_round_so_on_a_cpu(plain: Path, ue8m0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor, **options: Any) -> BlockScaled:
        found = quantize_rows(x, **options)
        seen.append(found.scale.flatten())
        return found

    monkeypatch.setattr(linear_scaled, "quantize_rows", watched)
    wanted = answers(ue8m0)
    assert seen and are_powers(torch.cat(seen))
    seen.clear()
    others = answers(plain)
    assert seen and not are_powers(torch.cat(seen))
    assert not torch.equal(others[0].logits, wanted[0].logits)


def test_every_launch_on_triton_rounds_so(plain: Path, ue8m0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared and dense MLPs, experts and attention; close to torch, which does not round the experts' rows."""
    launched: set[tuple[str, bool]] = set()
    execute = GridExecutor.__call__

    def recorded(self: GridExecutor, *args: Any, **options: Any) -> None:
        if "UE8M0" in options and options.get("QUANT", True) and options.get("MODE", QUANTIZE) == QUANTIZE:
            launched.add((self.fn.__name__, options["UE8M0"]))
        execute(self, *args, **options)

    on_torch = answers(ue8m0)
    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    on_triton = answers(ue8m0)
    assert {"quantize_rows_kernel", "grouped_gemm_kernel"} <= {name for name, _ in launched}
    assert {power for _, power in launched} == {True}
    for ours, theirs in zip(on_triton, on_torch, strict=True):
        assert float((ours.logits - theirs.logits).norm() / theirs.logits.norm()) < 0.15
    launched.clear()
    answers(plain)
    assert {power for _, power in launched} == {False}


@pytest.mark.parametrize("power", [False, True])
def test_rows_are_sorted_into_such_fp8(power: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same bytes on torch and Triton."""
    x, slots = torch.randn(7, 256).bfloat16(), torch.tensor([[0, 2], [1, -1], [2, 0]] * 2 + [[1, 2]])
    layout, found = RowLayout(3, quantize=True, ue8m0=power), []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(backends, "default_backend", lambda device, backend=backend: backend)
        rows, row_of = layout.sort(x, slots)
        assert rows.scales is not None
        real = row_of[row_of >= 0]
        assert are_powers(rows.scales[real]) is power
        found.append((rows.data.view(torch.uint8)[real], rows.scales[real]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_it_reaches_the_dispatch_and_the_report(plain: Path, ue8m0: Path) -> None:
    for folder, power in ((plain, False), (ue8m0, True)):
        assert kept_fp8(load_config(folder), keep=True, tp=1, shared_dispatched=False).ue8m0 is power
        composed = compose([f"model={folder}", "device=cuda", "ep=2"], report=lambda _: None)
        assert whole_spec(composed.config, composed.model).rows.ue8m0 is power
        (quantise,) = (served for served in kernel_report(composed.config, composed.model) if served.op == "quantise")
        assert ("powers of two (scale_fmt=ue8m0)" in quantise.why) is power
    dequantised = compose([f"model={ue8m0}", "fp8_weights=dequantize"])
    assert not whole_spec(dequantised.config, dequantised.model).rows.ue8m0
