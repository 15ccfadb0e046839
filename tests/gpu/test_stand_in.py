"""What the GPU tests are made of, tried out where there is no GPU: the same functions between two runs on the CPU.

The second run of each pair is what a GPU run would be; imports, words and figures are those of the GPU tests.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moe_kernels import backends

from tests.gpu import test_gpu_demo as demo
from tests.gpu.answers import NEEDS_WHEELS, Answer, Bounds, Run, assert_follows, assert_same_bits, run
from tests.kernels.devices import ON_GPU

pytestmark = NEEDS_WHEELS

TIGHT = Bounds(median=1e-4, worst=1e-3, margin=1e-3, least_prefix=4)
PROMPTS = [[3, 4, 5], [9, 8, 7, 6]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    from tests.api.tiny import write_tiny

    folder = write_tiny(tmp_path_factory.mktemp("tiny"), text=False)
    return folder, run(folder, PROMPTS, ["ep=1", "num_threads=1"], new_tokens=5)


@pytest.mark.parametrize("words", [("ep=1", "dispatch=local"), ("ep=4", "tp=1", "dispatch=all_gather")], ids=" ".join)
def test_runs_are_compared(words: tuple[str, ...], oracle: tuple[Path, Run]) -> None:
    folder, want = oracle
    got = run(
        folder, PROMPTS, ["num_threads=1", "engine.cuda_graphs=off", "engine.max_model_len=64", *words], new_tokens=5
    )
    assert (got.captures, got.replays) == (0, 0)
    assert got.answers[0].logits.shape == (5, 258)
    assert_follows(got, want, TIGHT)
    assert_same_bits(want, want)


@pytest.mark.skipif(ON_GPU, reason="the GPU tests run the kernels themselves")
def test_a_run_through_interpreted_kernels(oracle: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The route that device=cuda takes, on CPU tensors."""
    folder, want = oracle
    monkeypatch.setattr(backends, "default_backend", lambda _: "triton")
    words = ["num_threads=1", "engine.cuda_graphs=off", "ep=1", "dispatch=local", *demo.FIXED]
    assert_follows(run(folder, PROMPTS, words, new_tokens=5), want, TIGHT)


def test_wrong_runs_fail(oracle: tuple[Path, Run]) -> None:
    _, want = oracle
    first = want.answers[0]
    off = Run((replace(first, logits=first.logits + 0.1), *want.answers[1:]), 0, 0)
    with pytest.raises(AssertionError, match="logits off by"):
        assert_follows(off, want, TIGHT)
    with pytest.raises(pytest.fail.Exception, match="logits differ, first at new token 0, id 0"):
        assert_same_bits(off, want)
    other = Run((Answer((0, *first.token_ids[1:]), first.logits), *want.answers[1:]), 0, 0)
    with pytest.raises(AssertionError, match="another token at 0"):
        assert_follows(other, want, TIGHT)


@pytest.mark.parametrize("words", demo.LAYOUTS, ids=" ".join)
def test_the_words_of_the_gpu_tests_are_known(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_runtime.launch.compose import compose

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    graphs = ("engine.cuda_graphs=on", "engine.cuda_graph_sizes=[4]")
    made = compose([f"model={demo.DEMO}", *demo.ON_GPU[:1], demo.IN_FP8, *demo.FIXED, *graphs, *words])
    assert made.config.device == "cuda" and made.config.launcher == "virtual"


def test_prompts_are_those_of_the_demo_model() -> None:
    assert [len(ids) for ids in demo.prompts(2)] == [28, 18]
