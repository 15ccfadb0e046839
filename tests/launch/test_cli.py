"""The command line as a person meets it: help, doctor, generate, exit codes, prompt and result files."""

from __future__ import annotations

import io
import json
import logging
import time
from pathlib import Path

import pytest

from moe_runtime.cli import app
from moe_runtime.cli.app import ExitCode, main
from moe_runtime.cli.console import PlainConsole, open_console, printable
from moe_runtime.cli.help import help_text
from moe_runtime.cli.next_command import next_command
from moe_runtime.cli.rich_console import RichConsole
from moe_runtime.config import keys
from moe_runtime.launch.compose import compose
from moe_runtime.launch.data import preset_names


def test_help_explains_every_key_in_a_line() -> None:
    lines = help_text().splitlines()
    for key in keys():
        (line,) = [line for line in lines if line.startswith(f"  {key.name} ")]
        assert key.help in line
        assert line.endswith("]")
        for choice in key.choices:
            assert choice in line
    for name in preset_names():
        assert any(line.startswith(f"  {name} ") for line in lines)
    for code in ExitCode:
        assert any(line.startswith(f"  {code.value} ") for line in lines), code


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["ep=8", "--help"]])
def test_help_and_version_exit_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == ExitCode.OK
    assert "placement.num_redundant_experts" in capsys.readouterr().out
    assert main(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("moe_runtime 0.")


@pytest.mark.parametrize(
    "words", [["--ep", "320"], ["epp=3"], ["model=nowhere"], ["prompts=no such file"], ["ep=8", "tp=3"]]
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == ExitCode.BAD_INPUT
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("ConfigError: ")
    assert streams.err.count("\n") == 1


def test_what_is_logged_shows_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the command line only: a program that uses the library decides for itself."""
    log = logging.getLogger("moe_runtime")
    assert not log.handlers and log.level == logging.NOTSET

    def job(words: object) -> ExitCode:
        logging.getLogger("moe_runtime.engine.rebalance").info("rebalance: %s", "step 40: move")
        logging.getLogger("moe_runtime.engine.rebalance").warning("rebalance: %s", "step 41: \x1bc")
        logging.getLogger("moe_runtime").debug("not this")
        return ExitCode.OK

    monkeypatch.setattr(app, "main", job)
    try:
        with pytest.raises(SystemExit):
            app.run()
    finally:
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
    assert capsys.readouterr() == ("", "rebalance: step 40: move\nrebalance: step 41: \\x1bc\n")


def _doctor(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["job=doctor", *words]) == ExitCode.OK
    return capsys.readouterr().out


def test_doctor_on_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = _doctor(capsys, "ep=320")
    for part in (
        "ep=320 = dp=80 × tp=4",
        "319   39    7      79  3   319",
        "320 = 1 on each of 320 ranks",
        "no conflicts",
    ):
        assert part in text
    assert "next: python -m moe_runtime ep=320" in text


def test_doctor_at_671b_from_the_configuration_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = _doctor(capsys, "model=deepseek_v3", "preset=v3_decode_ep320")
    assert "256 routed + 1 shared, dispatched, in each of 58 MoE layers" in text
    # 58 layers × 3 matrices × 7168 × 2048 × 2 bytes
    assert "experts           4.758 GiB" in text
    # 61 layers × (512 + 64) × 2 bytes
    assert "KV per token      68.62 KiB" in text
    assert "deep_ep" in text
    assert "4.758 GiB" in _doctor(capsys, "model=deepseek_v3", "preset=v3_decode_ep320", "fp8_weights=dequantize")
    text = _doctor(capsys, "model=deepseek_v3", "preset=v3_prefill_ep32")
    assert "288 = 9 on each of 32 ranks" in text


def test_doctor_states_the_bytes_of_weights_that_stay_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    text = _doctor(capsys, "model=deepseek_v3", "device=cuda", "ep=8", "tp=1")
    # 58 layers × 32 slots × 3 matrices × (7168 × 2048 + 4 × 56 × 16) bytes
    assert "experts           76.14 GiB" in text
    assert "weights in all    95.07 GiB in FP8 as stored, with scales, else as bfloat16" in text
    text = _doctor(capsys, "model=deepseek_v3", "device=cuda", "ep=128", "tp=128")
    assert "dequantised when loaded: q_b_proj (tp=128 cuts it every 192 rows, inside blocks of 128)" in text


def test_doctor_lists_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["job=doctor", "ep=8", "tp=3", "epp=1", "engine.dispatch_buffer_bytes=3", "engine.kv_cache_bytes=1"]
    assert main(words) == ExitCode.BAD_INPUT
    text = capsys.readouterr().out
    assert "4 problems" in text
    for part in ("Nearest: tp=4", "Did you mean 'ep'?", "one token to top-8 experts", "one page of 16 tokens"):
        assert part in text
    assert main(["job=doctor", "model=nowhere", "tp=0"]) == ExitCode.BAD_INPUT
    assert "2 problems" in capsys.readouterr().out


def test_doctor_looks_at_the_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": 1}', encoding="utf-8")
    assert main(["job=doctor", f"prompts={prompts}", f"output={tmp_path}", "sampling.top_p=0"]) == ExitCode.BAD_INPUT
    text = capsys.readouterr().out
    for part in ("3 problems", "sampling.top_p is 0", "line 1: has ['text'] but no \"prompt\"", "is a folder"):
        assert part in text
    prompts.write_text('{"prompt": "a"}', encoding="utf-8")
    assert main(["job=doctor", f"prompts={prompts}", f"output={prompts}"]) == ExitCode.BAD_INPUT
    assert "is the file of prompts" in capsys.readouterr().out


def test_doctor_shows_what_runs_at_once_and_all_slot_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "decode   8 tokens per rank" in _doctor(capsys, "engine.max_num_batched_tokens=8")
    words = ["model=deepseek_v2_lite", "shared_experts=dispatched", "placement.num_redundant_experts=1"]
    assert "2 with 1 to 2 slots each" in _doctor(capsys, *words)


def test_doctor_of_thousands_of_ranks_takes_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert "4000 ranks" in _doctor(capsys, "ep=4000", "placement.num_redundant_experts=40000")
    assert time.monotonic() - began < 20, "2 s on an idle machine"


def test_generate_from_file_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "my prompts,v2.txt", tmp_path / "out(1).jsonl"
    prompts.write_text("def add(a, b):\n\nimport os\n", encoding="utf-8")
    words = ["ep=2", f"prompts={prompts}", f"output={output}", "sampling.max_tokens=3", "sampling.ignore_eos=true"]
    assert main(words) == ExitCode.OK
    text = capsys.readouterr().out
    for part in ("ep=2 = dp=2 × tp=1", "  def add(a, b):█", "tokens/s", "balancedness", "next: python -m moe_runtime"):
        assert part in text
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["def add(a, b):", "import os"]
    for row in rows:
        assert len(row["token_ids"]) == 3
        assert row["finish_reason"] == "length"
        assert row["ttft_s"] <= row["total_s"]
    assert sorted(tmp_path.iterdir()) == [prompts, output]


def test_generate_says_what_is_in_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n", encoding="utf-8")
    words = ["ep=2", f"prompts={prompts}", "sampling.max_tokens=1", "engine.kv_cache_dtype=fp8"]
    assert main([*words, "decode_dispatch=all_gather", "engine.two_batch_overlap=on"]) == ExitCode.OK
    text = capsys.readouterr().out
    for part in (
        "not deep_ep, nvshmem, symm_mem: device=cpu, and it needs a GPU per rank",
        "dispatch  all_to_all and all_gather, 0 redundant experts",
        "overlap   two batches from 512 rows",
        "KV cache  latents in FP8 with scales",
    ):
        assert part in text


def test_a_prompt_that_can_never_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt": [5] * 3000}), encoding="utf-8")
    assert main([f"prompts={prompts}"]) == ExitCode.BAD_INPUT
    assert "RequestError: " in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_both_consoles_show_the_same_words(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    console = open_console(stream)
    assert isinstance(console, RichConsole if stream.isatty() else PlainConsole)
    command = "next: " + "word " * 40 + "end"
    console.line(command)
    console.pairs("mesh", [("ep", "[red]8[/red]")])
    console.table("ranks", ("rank", "node"), [("0", "1")])
    console.text("[bold]prompt", "answer\x1b[2J\n")
    with console.progress("loading", 2) as advance:
        advance(1, "rank 0")
    console.error("wrong: [x]")
    text = stream.getvalue()
    for part in (command, "[red]8[/red]", "rank", "node", "[bold]prompt", "answer", "\\x1b[2J", "wrong: [x]"):
        assert part in text
    assert stream.isatty() or "\x1b" not in text


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\x1b[31m\tb\n\x07\x9b") == "a\\x1b[31m\tb\n\\x07\\x9b"


def test_next_commands_can_be_typed() -> None:
    assert next_command(compose(["ep=8", "model=demo"])) == "python -m moe_runtime model=demo ep=320"
    assert next_command(compose(["ep=320"])) == "python -m moe_runtime preset=v3_decode_ep320"
    assert "job=doctor model=deepseek_v3 preset=ep128" in next_command(compose(["preset=ep128"]))
    quoted = next_command(compose(["prompts=my prompts,v2.txt"]))
    assert "'prompts=my prompts,v2.txt'" in quoted


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        (["launcher=process", "ep=2", "engine.kv_cache_bytes=1GiB"], "ep=320"),
        (["dispatch=local", "ranks_per_node=1", "seed=3"], "seed=3 ep=320"),
        (["ep=2", "placement.num_redundant_experts=512"], "ep=320"),
        (["job=doctor", "model=deepseek_v3", "preset=ep128"], "preset=ep128"),
        (["job=doctor", "model=deepseek_v3", "engine.max_model_len=100000"], ""),
    ],
)
def test_next_commands_run_here(words: list[str], suggested: str) -> None:
    assert next_command(compose(words)) == f"python -m moe_runtime {suggested}".rstrip()
