"""Outputs of the first slots on their way while the others are computed: the same tokens, and the run says so."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from moe_runtime import LLM
from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.generate import _show_speed
from moe_runtime.engine.lockstep import LockstepLimits, Wish, agree
from moe_runtime.engine.plan import StepPlan
from moe_runtime.engine.runner import GroupStep
from moe_runtime.engine.step_header import decode_step, encode_step
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.launch.shuffle import split_line
from tests.api.tiny import greedy, tokens, write_tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17], [18, 19, 20, 21, 22]]
ON = "engine.single_batch_overlap=on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False)


def answers(folder: Path, *words: str) -> tuple[list[tuple[int, ...]], int, int]:
    """Tokens, steps that combined in two parts, and all steps."""
    with LLM(str(folder), overrides=["num_threads=1", "engine.page_size=4", *words]) as llm:
        outputs = llm.generate(PROMPTS, greedy(4))
        snapshot = llm.snapshot()
        text = StringIO()
        _show_speed(PlainConsole(text), llm, outputs, elapsed_s=1.0)
        assert ("combined in two parts" in text.getvalue()) == bool(snapshot.num_split_steps)
        return tokens(outputs), snapshot.num_split_steps, llm.num_steps


@pytest.mark.parametrize(
    "words",
    [
        ["ep=1", "dispatch=all_to_all"],
        ["ep=4", "tp=2"],
        ["ep=4", "tp=1", "dispatch=all_to_all", "decode_dispatch=all_gather"],
        ["ep=4", "tp=1", "engine.dispatch_buffer_bytes=3KiB", "engine.padding=max"],
        ["ep=8", "tp=2", "shared_experts=dispatched", "placement.num_redundant_experts=7"],
        ["ep=2", "tp=1", "engine.two_batch_overlap=on", "engine.two_batch_tokens=12"],
    ],
    ids=" ".join,
)
def test_same_tokens(folder: Path, words: list[str]) -> None:
    plain, none, _ = answers(folder, *words)
    split, some, steps = answers(folder, *words, ON, "engine.max_num_batched_tokens=6", "engine.max_num_seqs=3")
    assert none == 0
    assert 0 < some < steps, "steps with prompts, not those without"
    assert split == plain


def test_which_steps() -> None:
    """With prompts, and not those cut into two micro-batches."""
    limits = LockstepLimits(two_batch_tokens=8, split_combine=True)
    wishes = {(7, 0): True, (8, 0): False, (7, 7): False, (7, 6): True, (0, 0): False}
    for (count, decode), split in wishes.items():
        agreed = agree([Wish(0, count, decode), Wish()], limits=limits)
        assert agreed.split_combine is split, (count, decode)
        assert not agree([Wish(0, count, decode), Wish()], limits=replace(limits, split_combine=False)).split_combine
        step = GroupStep.of(agreed, 0)
        told, _, stop, report = decode_step(encode_step(step, StepPlan(()), stop=False, report=True))
        assert (told, stop, report) == (step, False, True), "told to the group's other ranks"


def test_whether_is_told(folder: Path) -> None:
    assert split_line(compose([]).config) == "off within a batch: no gain measured yet"
    off = compose(["engine.single_batch_overlap=off"]).config
    assert split_line(off) == "off within a batch: engine.single_batch_overlap=off"
    on = compose([f"model={folder}", "ep=2", ON]).config
    assert split_line(on) == "with prompts, if not cut: first experts' outputs travel beside the others' products"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ep=1"], "on: dispatch=local sends nothing. Set dispatch=all_to_all, or engine.single_batch_overlap=auto."),
        (
            ["ep=2", "dispatch=all_gather"],
            "dispatch=all_gather brings all outputs home at once. Set dispatch=all_to_all",
        ),
        (
            ["ep=8", "tp=1"],
            "with ep=8 a rank has one expert slot, and two parts need two. Lower ep to 4 or less, or set",
        ),
    ],
)
def test_never_ignored(folder: Path, words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"model={folder}", ON, *words])
    assert text in str(caught.value)
