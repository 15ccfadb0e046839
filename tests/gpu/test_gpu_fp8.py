"""An fp8 checkpoint on a CUDA device: it stays fp8, takes the bytes that were stated, and answers as the CPU does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.answers import NEEDS_GPU, NEEDS_WHEELS, Bounds, assert_follows, run

pytestmark = [NEEDS_GPU, NEEDS_WHEELS]

PROMPTS = [[5, 9, 17, 33, 65], [7, 7, 7], list(range(3, 40)), [101, 2, 50, 90]]
NEW_TOKENS = 16
NEAR = Bounds(median=0.15, worst=1.0, margin=0.5, least_prefix=NEW_TOKENS // 4)
"""Rows quantised to e4m3 in front of every product: 3 % of logits of size 1."""
SLACK = 512
"""Bytes that the allocator rounds a tensor up to."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models.fp8_checkpoint import write_fp8

    return write_fp8(tmp_path_factory.mktemp("fp8"))


@pytest.mark.parametrize("words", [("ep=1", "dispatch=local"), ("ep=4", "tp=2", "dispatch=all_gather")], ids=" ".join)
def test_kept_fp8_answers_as_the_dequantised_on_a_cpu(folder: Path, words: tuple[str, ...]) -> None:
    want = run(folder, PROMPTS, ["device=cpu", "dtype=float32", "ep=1", "num_threads=2"], new_tokens=NEW_TOKENS)
    got = run(folder, PROMPTS, ["device=cuda", "num_threads=2", "fp8_weights=keep", *words], new_tokens=NEW_TOKENS)
    assert_follows(got, want, NEAR)


def test_device_bytes_are_those_stated(tmp_path: Path) -> None:
    """Weights, cache and rotary table, within the allocator's rounding; loading never holds a dequantised copy."""
    from moe_runtime import LLM
    from moe_runtime.launch.compose import compose
    from moe_runtime.launch.placing import num_local_slots
    from moe_runtime.launch.process_size import process_bytes
    from moe_runtime.launch.sizing import rotary_bytes
    from tests.models.fp8_checkpoint import write_fp8

    big = write_fp8(
        tmp_path, hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, num_experts_per_tok=4, n_group=8,
        topk_group=4,
    )  # fmt: skip
    words = ["device=cuda", "ep=1", "tp=1", "dispatch=local", "engine.kv_cache_bytes=4MiB", "engine.cuda_graphs=off"]
    composed = compose([f"model={big}", *words])
    config, model = composed.config, composed.model
    stated = process_bytes(config, model, num_local_slots=num_local_slots(config, model))
    stated += rotary_bytes(config.engine, model)
    square = torch.ones(16, 16, device="cuda")
    square.mm(square)  # cuBLAS takes its workspace from the same allocator
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with LLM(str(big), overrides=words):
        held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    # Counters and tables of slots are the only tensors that the statement leaves out: fewer than 100, below 64 KiB.
    assert stated <= held <= stated + 100 * SLACK + 64 * 1024, f"{held} bytes held, {stated} stated"
    # One expert at a time passes through; a dequantised layer of experts would be 50 MB.
    assert peak <= held + 8 * 1024 * 1024, f"{peak} bytes at the peak, {held} held"
