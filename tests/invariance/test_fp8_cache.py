"""batch_invariant=true on a latent cache in fp8: a row's rounding depends on that row alone, and all read rounded rows.

So batch, chunks, prefix hits, preemption, page size and mesh change no bit, as on a plain cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest
import torch
from moe_kernels.mla import ScaledLatent
from torch import Tensor

from tests.data import ROPE_DIM, random_prompts, write_checkpoint
from tests.invariance.runs import Answer, alone, assert_same_bits, run

FP8: Final = ("engine.batch_invariant=true", "engine.kv_cache_dtype=fp8")
NEW_TOKENS: Final = 4
LENGTHS: Final = (5, 70, 33, 1)
"""One longer than a block of the attention (64 rows)."""
RANK: Final = 136
"""A whole group of 128 and a short one."""


@dataclass(frozen=True, slots=True)
class Base:
    folder: Path
    prompts: list[list[int]]
    answers: list[Answer]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    changes = {"kv_lora_rank": RANK, "q_lora_rank": 20, "num_hidden_layers": 2, "max_position_embeddings": 96}
    folder = write_checkpoint(tmp_path_factory.mktemp("fp8"), "deepseek_v3", seed=7, changes=changes)
    prompts = random_prompts(LENGTHS, seed=7)
    return Base(folder, prompts, alone(folder, prompts, [*FP8, "ep=1"], new_tokens=NEW_TOKENS))


CASES: Final = MappingProxyType(
    {
        "batch-mates": ["ep=1"],
        "chunks": ["ep=1", "engine.max_num_batched_tokens=7", "engine.max_num_seqs=4", "engine.page_size=5"],
        "ep4": ["ep=4", "tp=1"],
    }
)


@pytest.mark.parametrize("name", CASES)
def test_same_bits(base: Base, name: str) -> None:
    assert_same_bits(run(base.folder, [base.prompts], [*FP8, *CASES[name]], new_tokens=NEW_TOKENS), base.answers)


def test_prefix_hits(base: Base) -> None:
    words = [*FP8, "ep=1", "engine.page_size=4"]
    got = run(base.folder, [base.prompts] * 2, words, new_tokens=NEW_TOKENS, score_prompts=False)
    count = len(base.prompts)
    assert [answer.num_cached_tokens for answer in got] == [0] * count + [4, 68, 32, 0]
    assert_same_bits(got[:count], base.answers)
    assert_same_bits(got[count:], base.answers)


def test_preemption(base: Base) -> None:
    """The cache holds the longest sequence and little more, so that others give their pages back."""
    token_bytes = 2 * (RANK + 2 * 4 + ROPE_DIM * 4)
    words = [*FP8, "ep=1", "engine.page_size=2", f"engine.kv_cache_bytes={78 * token_bytes}"]
    got = run(base.folder, [base.prompts], words, new_tokens=NEW_TOKENS)
    assert sum(answer.num_preemptions for answer in got) > 0
    assert_same_bits(got, base.answers)


def test_a_scale_shared_by_rows_is_noticed(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ScaledLatent.write_

    def shared(cache: ScaledLatent, rows: Tensor, values: Tensor) -> None:
        """All rows of a call as wide as the widest of them."""
        write(cache, rows, values)
        scale = cache.scale.flatten(0, 1)
        widest = scale.index_select(0, rows).amax(dim=0, keepdim=True)
        latent = (values[:, : cache.data.shape[2]] / widest.repeat_interleave(128, 1)[:, : cache.data.shape[2]]).to(
            torch.float8_e4m3fn
        )
        scale.index_copy_(0, rows, widest.expand(len(rows), -1).contiguous())
        cache.data.flatten(0, 1).view(torch.uint8).index_copy_(0, rows, latent.view(torch.uint8))

    monkeypatch.setattr(ScaledLatent, "write_", shared)
    want = alone(base.folder, base.prompts[1:2], [*FP8, "ep=1"], new_tokens=1)
    got = run(base.folder, [base.prompts[1:2]], [*FP8, *CASES["chunks"]], new_tokens=1)
    with pytest.raises(pytest.fail.Exception, match="logits differ"):
        assert_same_bits(got, want)
