"""Runner: what it makes of a plan, and which plans it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from moe_kernels.mla import LatentCache
from torch import Tensor

from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.plan import PENDING, ChunkKind, SequenceChunk, StepPlan
from moe_runtime.engine.runner import GroupStep, Runner
from moe_runtime.layers.step import StepInputs


class NoModel:
    @property
    def rotary(self) -> Rotary:
        return Rotary()

    def __call__(self, steps: Sequence[StepInputs], caches: tuple[LatentCache, ...]) -> Tensor:
        raise AssertionError("never run")


class Rotary:
    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions.float(), positions.float()


def inputs(*chunks: SequenceChunk, fp8: bool = False) -> StepInputs:
    cpu = torch.device("cpu")
    cache = LatentKVCache.zeros(1, num_pages=4, page_size=4, latent=6, rope=2, dtype=torch.float32, device=cpu, fp8=fp8)
    plan = StepPlan(chunks)
    step = GroupStep(Phase.MIXED, padded_tokens=8, capacity=8, num_chunks=1, chunk_tokens=8)
    return Runner(NoModel(), cache, 1, 0, one_form=False, device=cpu, num_heads=1).inputs(plan, step)


def test_tokens_and_their_cache_rows() -> None:
    found = inputs(
        SequenceChunk(1, 5, (7,), (2, 0), ChunkKind.DECODE, True, 0),
        SequenceChunk(2, 0, (8, 9), (3,), ChunkKind.PREFILL, True, 1),
    )
    assert found.num_tokens == 3
    assert found.token_ids.tolist() == [7, 8, 9, 0, 0, 0, 0, 0]
    assert found.cache_rows.tolist() == [0 * 4 + 1, 3 * 4, 3 * 4 + 1]
    assert found.logit_rows.tolist() == [0, 2]


def test_a_prompt_reads_its_own_rows_from_an_fp8_cache() -> None:
    first, later = (SequenceChunk(1, start, (8, 9), (3, 1), ChunkKind.PREFILL, True, 1) for start in (0, 3))
    assert inputs(first).expanded[0].cache_rows is None
    (chunk,) = inputs(first, fp8=True).expanded
    assert chunk.cache_rows is not None and chunk.cache_rows.tolist() == [[12, 13]]
    for fp8 in (False, True):
        (chunk,) = inputs(later, fp8=fp8).expanded
        assert chunk.cache_rows is not None and chunk.cache_rows.tolist() == [[12, 13, 14, 15, 4]]


def test_plans_made_ahead_are_refused() -> None:
    with pytest.raises(AssertionError, match="before the last step was committed"):
        inputs(SequenceChunk(1, 1, (PENDING,), (0,), ChunkKind.DECODE, True, 0))
