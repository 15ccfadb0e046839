"""batch_invariant=true: what else runs, and where, changes no bit of a prompt's logits. One dimension at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest
import torch
from moe_kernels.permute import unpermute
from torch import Tensor

from moe_runtime.dispatch import all_to_all
from moe_runtime.errors import ConfigError
from moe_runtime.launch import sizing
from moe_runtime.launch.compose import compose
from moe_runtime.parallel.placement import ExpertPlacement
from tests.data import ROPE_DIM, random_prompts, write_checkpoint
from tests.invariance.runs import Answer, alone, assert_close, assert_same_bits, run

INVARIANT: Final = "engine.batch_invariant=true"
NEW_TOKENS: Final = 6
LENGTHS: Final = (5, 33, 70, 18, 5, 1)
"""One longer than a block of the attention (64 rows)."""

CHANGES: Final = MappingProxyType(
    {
        "hidden_size": 72,
        "moe_intermediate_size": 36,
        "intermediate_size": 84,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 20,
        "n_shared_experts": 2,
        "max_position_embeddings": 96,
    }
)
"""No width a multiple of 32."""


TWO_BATCHES: Final = ("engine.two_batch_overlap=on", "engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2")
SINGLE_BATCH: Final = "engine.single_batch_overlap=on"


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint, its prompts and the answers to each alone, by tp."""

    folder: Path
    prompts: list[list[int]]
    answers: dict[int, list[Answer]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = write_checkpoint(tmp_path_factory.mktemp("invariance"), "deepseek_v3", seed=7, changes=CHANGES)
    prompts = random_prompts(LENGTHS, seed=7)
    answers = {tp: alone(folder, prompts, [INVARIANT, f"ep={tp}", f"tp={tp}"], new_tokens=NEW_TOKENS) for tp in (1, 2)}
    return Base(folder, prompts, answers)


DIMENSIONS: Final = MappingProxyType(
    {
        "batch-mates": [],
        "local": ["dispatch=local"],
        "chunks": ["engine.max_num_batched_tokens=7", "engine.max_num_seqs=6"],
        "dispatch-chunks": ["ep=4", "engine.dispatch_buffer_bytes=24KiB"],
        "two-batches": ["ep=4", *TWO_BATCHES],
        "two-batches-in-chunks": ["ep=4", "engine.max_num_batched_tokens=7", "engine.max_num_seqs=6", *TWO_BATCHES],
        "single-batch": ["ep=4", SINGLE_BATCH],
        "single-batch-in-chunks": ["ep=8", "engine.dispatch_buffer_bytes=24KiB", SINGLE_BATCH],
        "single-batch-redundant": ["ep=4", "placement.num_redundant_experts=7", SINGLE_BATCH],
        "page-size": ["engine.page_size=5"],
        "redundant-static": ["ep=4", "placement.num_redundant_experts=7"],
        "redundant-turns": ["ep=4", "placement.num_redundant_experts=7", "placement.replica_choice=round_robin"],
        "redundant-waterfill": ["ep=4", "placement.num_redundant_experts=7", "placement.replica_choice=waterfill"],
        "redundant-nearest": [
            "ep=4",
            "placement.num_redundant_experts=7",
            "placement.replica_choice=nearest",
            "ranks_per_node=2",
        ],
        "padding-own": ["ep=4", "engine.padding=own"],
        "padding-max": ["ep=4", "engine.padding=max"],
        "ep2": ["ep=2"],
        "ep4": ["ep=4"],
        "ep8": ["ep=8"],
        "ep16": ["ep=16"],
        "ep32": ["ep=32"],
    }
)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_same_bits(base: Base, name: str) -> None:
    words = DIMENSIONS[name]
    mesh = [] if any(word.startswith("ep=") for word in words) else ["ep=1"]
    got = run(base.folder, [base.prompts], [INVARIANT, "tp=1", *mesh, *words], new_tokens=NEW_TOKENS)
    assert_same_bits(got, base.answers[1])


def test_same_bits_in_bf16(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "SMALL_MODEL_BYTES", 0)  # as a large model does: everything in bf16
    words = [INVARIANT, "dtype=bfloat16", "tp=1"]
    want = alone(base.folder, base.prompts, [*words, "ep=1"], new_tokens=NEW_TOKENS)
    assert torch.equal(want[1].logits, want[1].logits.bfloat16().float()), "the head is no bf16 product"
    got = run(base.folder, [base.prompts], [*words, "ep=8"], new_tokens=NEW_TOKENS)
    assert_same_bits(got, want)


@pytest.mark.parametrize("ep", [2, 8, 32])
def test_same_bits_at_tp_2(base: Base, ep: int) -> None:
    got = run(base.folder, [base.prompts], [INVARIANT, "tp=2", f"ep={ep}"], new_tokens=NEW_TOKENS)
    assert_same_bits(got, base.answers[2])


def test_same_bits_on_320_ranks(base: Base) -> None:
    words = [INVARIANT, "tp=1", "ep=320", "engine.kv_cache_bytes=1MiB"]
    got = run(base.folder, [base.prompts], words, new_tokens=2)
    want = [Answer(a.token_ids[:2], a.logits[:2], a.scores, 0, 0) for a in base.answers[1]]
    assert_same_bits(got, want)


def test_prefix_hits(base: Base) -> None:
    """The same prompts again find their pages, and one that shares a beginning only finds that."""
    longer = [*base.prompts[1][:20], *base.prompts[2]]
    words = [INVARIANT, "ep=1", "engine.page_size=4"]
    got = run(base.folder, [base.prompts, [*base.prompts, longer]], words, new_tokens=NEW_TOKENS, score_prompts=False)
    count = len(base.prompts)
    assert [answer.num_cached_tokens for answer in got[:count]] == [0] * count
    assert [answer.num_cached_tokens for answer in got[count:]] == [4, 32, 68, 16, 4, 0, 20]
    assert_same_bits(got[:count], base.answers[1])
    assert_same_bits(got[count:-1], base.answers[1])
    assert_same_bits(
        got[-1:], alone(base.folder, [longer], [INVARIANT, "ep=1"], new_tokens=NEW_TOKENS, score_prompts=False)
    )


def test_preemption(base: Base) -> None:
    """The cache holds the longest sequence and little more, so that others give their pages back."""
    chosen = [index for index, length in enumerate(LENGTHS) if length < 64]
    token_bytes = 3 * (32 + ROPE_DIM) * 4
    words = [INVARIANT, "ep=1", "engine.page_size=2", f"engine.kv_cache_bytes={44 * token_bytes}"]
    got = run(base.folder, [[base.prompts[index] for index in chosen]], words, new_tokens=NEW_TOKENS)
    assert sum(answer.num_preemptions for answer in got) > 0
    assert_same_bits(got, [base.answers[1][index] for index in chosen])


def test_all_gather_is_close(base: Base) -> None:
    """It sums by rank, not in top-k order: equal to its rounding."""
    got = run(base.folder, [base.prompts], [INVARIANT, "tp=1", "ep=4", "dispatch=all_gather"], new_tokens=NEW_TOKENS)
    assert_close(got, base.answers[1], tolerance=1e-5)


@pytest.mark.parametrize(
    "words", [[], ["engine.max_num_batched_tokens=7", "engine.max_num_seqs=6"], ["engine.padding=max"]], ids=str
)
def test_all_gather_gives_the_same_bits_on_as_many_ranks(base: Base, words: list[str]) -> None:
    common = [INVARIANT, "tp=1", "ep=4", "dispatch=all_gather"]
    want = alone(base.folder, base.prompts, common, new_tokens=NEW_TOKENS)
    assert_same_bits(run(base.folder, [base.prompts], [*common, *words], new_tokens=NEW_TOKENS), want)


def test_sums_by_rank_want_experts_once(base: Base, tmp_path: Path) -> None:
    """A second copy on another rank regroups a token's sums, and which copy serves it follows from its home."""
    common = [f"model={base.folder}", INVARIANT, "tp=1", "dispatch=all_gather"]
    twice = tmp_path / "twice.json"
    twice.write_text(ExpertPlacement.uniform(2, 16, ep=4, num_redundant=4).to_json())
    copies = {"placement.num_redundant_experts=4": (4, 4), "ep=3": (3, 2), f"placement.file={twice}": (4, 4)}
    for word, (ep, num) in copies.items():
        with pytest.raises(ConfigError, match=rf"all_gather with engine.batch_invariant=true and {num} copies"):
            compose([*common, f"ep={ep}", word])
        compose([*common[:-1], f"ep={ep}", word, "dispatch=all_to_all"])
    compose([*common, "ep=1", "placement.num_redundant_experts=4"])


def test_another_order_of_sums_is_noticed(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_slot(y: Tensor, row_of: Tensor, weights: Tensor) -> Tensor:
        order = row_of.argsort(dim=1)
        return unpermute(y, row_of.gather(1, order), weights.gather(1, order))

    monkeypatch.setattr(all_to_all, "unpermute", by_slot)
    got = run(base.folder, [base.prompts], [INVARIANT, "dispatch=all_to_all"], new_tokens=NEW_TOKENS)
    assert_close(got, base.answers[1], tolerance=1e-4)
    with pytest.raises(pytest.fail.Exception, match="logits differ"):
        assert_same_bits(got, base.answers[1])
