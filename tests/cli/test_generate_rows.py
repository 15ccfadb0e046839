"""The rows of the output file: what was asked for and no more, as plain JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moe_runtime.cli.app import ExitCode, main
from moe_runtime.cli.generate import _rows
from moe_runtime.cli.prompts import Prompt, write_lines
from moe_runtime.engine.request import CompletionOutput, Logprob, PositionLogprobs, RequestMetrics, RequestOutput

ALWAYS = {
    *("index", "completion", "prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"),
    *("queue_s", "ttft_s", "tpot_s", "total_s", "num_cached_tokens"),
}


def output(*parts: CompletionOutput, prompt_logprobs: list[PositionLogprobs | None] | None = None) -> RequestOutput:
    return RequestOutput(0, "ab", (5, 6), prompt_logprobs, list(parts), RequestMetrics(1.0), finished=True)


def rows(tmp_path: Path, *outputs: RequestOutput) -> list[dict[str, object]]:
    """As they are read again."""
    file = tmp_path / "out.jsonl"
    write_lines(file, _rows([Prompt("ab")] * len(outputs), outputs))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_plain_rows_are_short(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, output(CompletionOutput(0, "c", (7,), finish_reason="length")))
    assert row.keys() == ALWAYS


def test_what_only_some_rows_have(tmp_path: Path) -> None:
    position = {7: Logprob(-0.5, 1, "c"), 8: Logprob(-math.inf, 2, None)}
    first = CompletionOutput(0, "c", (7,), [position], -0.5, finish_reason="stop", stop_reason="d")
    second = CompletionOutput(1, "", (), [], 0.0, finish_reason="abort", error="not finite")
    one, two = rows(tmp_path, output(first, second, prompt_logprobs=[None, {6: Logprob(-1.0, 3, "b")}]))
    assert one.keys() == ALWAYS | {"stop_reason", "logprobs", "cumulative_logprob", "prompt_logprobs"}
    assert one["stop_reason"] == "d"
    assert one["logprobs"] == [
        {
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
            "8": {"logprob": None, "rank": 2, "decoded_token": None},
        }
    ]
    assert one["cumulative_logprob"] == -0.5
    assert one["prompt_logprobs"] == [None, {"6": {"logprob": -1.0, "rank": 3, "decoded_token": "b"}}]
    assert two["error"] == "not finite"
    assert "stop_reason" not in two
    assert two["cumulative_logprob"] == 0.0


def test_the_command_line_writes_what_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("def add(a, b):\n", encoding="utf-8")
    words = ["ep=1", "sampling.max_tokens=3", "sampling.ignore_eos=true", "sampling.skip_special_tokens=false"]
    words += ["sampling.logprobs=2", "sampling.prompt_logprobs=0", "sampling.include_stop_str_in_output=true"]
    assert main([f"prompts={prompts}", f"output={out}", *words]) == ExitCode.OK
    capsys.readouterr()
    (row,) = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(row["logprobs"]) == 3
    for token, position in zip(row["token_ids"], row["logprobs"], strict=True):
        assert position[str(token)]["rank"] >= 1
    assert len(row["prompt_logprobs"]) == len(row["prompt_token_ids"])
    assert row["cumulative_logprob"] < 0
