"""Runs on a latent cache in fp8 against runs on a plain one: what differs is the rounding of the cached latents.

e4m3 rounds a value by up to 1/16, 2 to 3 % in the mean; the model here sums 3 layers of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch
from moe_kernels.mla import ScaledLatent
from torch import Tensor

from moe_runtime.engine.runner import Runner
from tests.data import random_prompts, write_checkpoint
from tests.invariance.runs import Answer, Prompts, assert_close, run

FP8: Final = "engine.kv_cache_dtype=fp8"
NEW_TOKENS: Final = 4
ROUNDING: Final = 0.1
"""Of logits, relative, in the median over tokens; measured here: 0.04. A wrong scale is far beyond it."""
CHUNKED: Final = ("engine.max_num_batched_tokens=7", "engine.max_num_seqs=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent of one whole group of 128 and a short one."""
    return write_checkpoint(tmp_path_factory.mktemp("fp8-cache"), "deepseek_v3", seed=7, changes={"kv_lora_rank": 160})


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return random_prompts((1, 9, 37, 22), seed=3)


@pytest.fixture(scope="module")
def plain(folder: Path, prompts: Prompts) -> list[Answer]:
    return answers(folder, prompts)


@pytest.fixture(scope="module")
def fp8(folder: Path, prompts: Prompts) -> list[Answer]:
    return answers(folder, prompts, FP8)


def answers(folder: Path, prompts: Prompts, *words: str) -> list[Answer]:
    return run(folder, [prompts], ["dtype=float32", *words], new_tokens=NEW_TOKENS, score_prompts=False)


def away(ours: list[Answer], theirs: list[Answer]) -> float:
    """Median relative error of the logits, while both runs write the same tokens."""
    errors = [
        (a.logits[i] - b.logits[i]).norm() / b.logits[i].norm()
        for a, b in zip(ours, theirs, strict=True)
        for i in range(NEW_TOKENS)
        if a.token_ids[:i] == b.token_ids[:i]
    ]
    return float(torch.stack(errors).median())


def test_the_rounding_is_small(plain: list[Answer], fp8: list[Answer]) -> None:
    assert 1e-3 < away(fp8, plain) < ROUNDING


@pytest.mark.parametrize("words", [("ep=4", "tp=2"), ("engine.page_size=5", "ep=2")], ids=" ".join)
def test_the_mesh_changes_the_order_of_sums_alone(
    folder: Path, prompts: Prompts, fp8: list[Answer], words: tuple[str, ...]
) -> None:
    assert_close(answers(folder, prompts, FP8, *words), fp8, tolerance=2e-4)


def test_a_prompt_reads_rounded_rows_however_it_is_cut(
    folder: Path, prompts: Prompts, fp8: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_close(answers(folder, prompts, FP8, *CHUNKED), fp8, tolerance=2e-4)
    init = Runner.__init__

    def as_computed(runner: Runner, *args: object, **options: object) -> None:
        """Mutant: a chunk that is its own context reads its rows before they are rounded."""
        init(runner, *args, **options)  # type: ignore[arg-type]
        object.__setattr__(runner.cache, "fp8", False)

    monkeypatch.setattr(Runner, "__init__", as_computed)
    with pytest.raises(AssertionError, match="logit"):
        assert_close(answers(folder, prompts, FP8), fp8, tolerance=2e-4)


def test_scales_of_another_group_are_noticed(
    folder: Path, prompts: Prompts, plain: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ScaledLatent.read

    def rolled(cache: ScaledLatent, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return read(ScaledLatent(cache.data, cache.scale.roll(1, 2), cache.rope), rows, dtype)

    monkeypatch.setattr(ScaledLatent, "read", rolled)
    assert away(answers(folder, prompts, FP8), plain) > ROUNDING
