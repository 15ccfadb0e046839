"""Steps cut into two micro-batches: the same tokens, whatever is empty, and the run says how many there were."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import LLM
from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.generate import _show_speed
from moe_runtime.dispatch.base import Phase
from moe_runtime.engine.lockstep import LockstepLimits, Wish, agree, cut_rows
from moe_runtime.engine.plan import ChunkKind, SequenceChunk, StepPlan
from moe_runtime.launch.compose import compose
from moe_runtime.launch.shuffle import overlap_line, overlaps, overlaps_decode
from tests.api.tiny import greedy, tokens, write_tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17], [18, 19, 20, 21, 22]]
ON = ["engine.two_batch_overlap=on", "engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False)


def answers(folder: Path, *words: str) -> tuple[list[tuple[int, ...]], int, int]:
    """Tokens, steps in two micro-batches, and all steps."""
    with LLM(str(folder), overrides=["num_threads=1", "engine.page_size=4", *words]) as llm:
        outputs = llm.generate(PROMPTS, greedy(5))
        snapshot = llm.snapshot()
        text = StringIO()
        _show_speed(PlainConsole(text), llm, outputs, elapsed_s=1.0)
        assert ("ran as two micro-batches" in text.getvalue()) == bool(snapshot.num_two_batch_steps)
        return tokens(outputs), snapshot.num_two_batch_steps, llm.num_steps


@pytest.mark.parametrize(
    "words",
    [
        ["ep=1"],
        ["ep=4", "tp=2"],
        ["ep=4", "tp=1", "dispatch=all_gather"],
        ["ep=8", "tp=4", "engine.max_num_batched_tokens=6", "engine.max_num_seqs=3"],
        ["ep=4", "tp=1", "engine.dispatch_buffer_bytes=3KiB", "engine.padding=max"],
        ["ep=16", "tp=2", "shared_experts=dispatched", "placement.num_redundant_experts=7"],
    ],
    ids=" ".join,
)
def test_same_tokens(folder: Path, words: list[str]) -> None:
    plain, none, _ = answers(folder, *words)
    cut, some, steps = answers(folder, *words, *ON)
    assert none == 0
    assert 0 < some <= steps
    assert cut == plain


def test_a_lone_token_leaves_the_second_empty(folder: Path) -> None:
    """tp=1: rows 2 are the least that are cut; groups with one or none have an empty second micro-batch."""
    with LLM(str(folder), overrides=["ep=4", "tp=1", "num_threads=1", *ON]) as llm:
        outputs = llm.generate([[5, 6, 7], [8]], greedy(4))
        assert llm.snapshot().num_two_batch_steps >= 1
    with LLM(str(folder), overrides=["ep=1", "num_threads=1"]) as llm:
        assert tokens(llm.generate([[5, 6, 7], [8]], greedy(4))) == tokens(outputs)


def test_thresholds() -> None:
    limits = LockstepLimits(tp=2, two_batch_tokens=10, two_batch_decode_tokens=4)

    def cut(tokens: int, decode: bool) -> int:
        return agree([Wish(0, tokens, tokens if decode else 0), Wish()], limits=limits).num_micro_batches

    assert [cut(n, True) for n in (1, 2, 3, 4)] == [1, 1, 2, 2], "3 tokens are 4 rows"
    assert [cut(n, False) for n in (8, 9)] == [1, 2]
    assert LockstepLimits(tp=4, two_batch_decode_tokens=2).num_micro_batches(4, Phase.DECODE) == 1, "a row per rank"
    step = agree([Wish(0, 13, 0), Wish(0, 3, 0)], limits=limits)
    assert (step.padded_tokens, step.capacity, step.num_micro_batches) == ((14, 4), 4, 2)
    assert [cut_rows(rows, 2, tp=2) for rows in step.padded_tokens] == [(8, 6), (2, 2)]
    assert agree([Wish()], limits=limits).num_micro_batches == 1


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 9), max_size=5),
    at=st.integers(0, 50),
    wanted=st.integers(0, 9),
)
def test_a_cut_plan_is_the_same_tokens(lengths: list[int], at: int, wanted: int) -> None:
    chunks = tuple(
        SequenceChunk(
            i, 3 * i, tuple(range(10 * i, 10 * i + n)), (i,), ChunkKind.PREFILL, i % 2 == 0, max(0, n - wanted)
        )
        for i, n in enumerate(lengths)
    )
    plan = StepPlan(chunks)
    parts = plan.cut(at)
    assert parts[0].num_tokens == min(at, plan.num_tokens)

    def each(part: StepPlan) -> list[tuple[int, int, int, bool]]:
        return [
            (chunk.request_id, chunk.start + i, token, i >= chunk.logit_start)
            for chunk in part.chunks
            for i, token in enumerate(chunk.token_ids)
        ]

    assert each(parts[0]) + each(parts[1]) == each(plan)
    samples = [chunk.request_id for part in parts for chunk in part.chunks if chunk.sample]
    assert samples == [chunk.request_id for chunk in chunks if chunk.sample], "the last part samples"


def test_whether_is_told() -> None:
    config = compose(["ep=8"]).config
    assert not overlaps(config)
    assert overlap_line(config) == "off: on a CPU sending takes the cores that compute"
    assert overlap_line(compose([]).config) == "off: ep=1, nothing travels"
    over_nccl = replace(config, device="cuda", launcher="torchrun", ranks_per_node=4)
    assert overlap_line(over_nccl) == "two batches from 512 rows of a DP group with prompts on, in decode 128 rows"
    assert overlap_line(compose(["ep=8", "tp=4", *ON]).config).endswith(
        "from 8 rows of a DP group with prompts on, in decode 8 rows"
    )
    assert overlap_line(replace(over_nccl, ranks_per_node=8)).endswith("in decode never (one node)")
    assert not overlaps(replace(over_nccl, launcher="virtual"))
    for name in ("nvshmem", "symm_mem"):
        assert (
            overlap_line(replace(over_nccl, dispatch=name))
            == f"off: dispatch={name} moves rows on the stream that computes"
        )
    apart = replace(over_nccl, dispatch="all_to_all", decode_dispatch="nvshmem")
    assert overlap_line(apart).endswith("in decode never (nvshmem moves rows on the stream that computes)")
    assert overlaps(apart) and not overlaps_decode(apart)
    on = compose(["ep=8", *ON]).config
    assert (
        overlaps(on) and overlap_line(on) == "two batches from 2 rows of a DP group with prompts on, in decode 2 rows"
    )
