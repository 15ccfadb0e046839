"""The demo checkpoint, as text, against transformers: with its tokenizer, bf16 weights and MTP layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import pytest

from moe_runtime import LLM, SamplingParams
from moe_runtime.launch.data import data_path
from tests.parity.oracle import TOLERANCE, by_transformers

NEW_TOKENS: Final = 16
NUM_PROMPTS: Final = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: both sides read the same weights even while the model is trained anew."""
    return Path(shutil.copytree(data_path("models/demo"), tmp_path_factory.mktemp("demo") / "copy"))


def test_greedy_text_is_that_of_transformers(demo: Path) -> None:
    from transformers import AutoTokenizer

    lines = (demo / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]
    texts = [json.loads(line)["prompt"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(demo)
    want = by_transformers(demo, [tokenizer.encode(text) for text in texts], new_tokens=NEW_TOKENS)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(str(demo), ep=8, tp=2, overrides=["dtype=float32", "num_threads=1"]) as llm:
        outputs = llm.generate(texts, params)
    for text, output, theirs in zip(texts, outputs, want, strict=True):
        (ours,) = output.outputs
        assert list(output.prompt_token_ids) == tokenizer.encode(text)
        assert ours.token_ids == theirs.token_ids, text
        assert ours.text == tokenizer.decode(theirs.token_ids, skip_special_tokens=True)
        assert ours.logprobs is not None
        for row, token, expected in zip(ours.logprobs, ours.token_ids, theirs.logprobs[-NEW_TOKENS:], strict=True):
            assert row[token].logprob == pytest.approx(float(expected[token]), abs=TOLERANCE)
