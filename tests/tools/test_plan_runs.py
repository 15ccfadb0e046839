"""The planner from end to end: a demo trace predicted exactly, whole questions, their files and commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from moe_tools.plan.__main__ import main
from moe_tools.plan.replay import replay_trace

from moe_runtime import LLM, SamplingParams
from moe_runtime.balance.trace import Trace, read_trace
from moe_runtime.launch.compose import compose
from moe_runtime.launch.env import TorchrunEnv

PROMPTS = [[5, 7, 9, 11] * count for count in (1, 2, 3, 4, 5, 6)]


def _record(folder: Path, *, ep: int, choice: str, redundant: int, tp: int = 1) -> Trace:
    words = [
        f"tp={tp}",
        "balance.record=per_token",
        f"balance.trace={folder}",
        "balance.window_steps=4",
        "num_threads=1",
        f"placement.num_redundant_experts={redundant}",
        f"placement.replica_choice={choice}",
    ]
    with LLM("demo", ep=ep, overrides=words) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    return read_trace(folder)


@pytest.mark.parametrize(
    ("ep", "tp", "choice", "redundant"),
    [(8, 1, "static", 0), (16, 2, "nearest", 16), (8, 2, "round_robin", 8), (8, 1, "waterfill", 8)],
)
def test_rows_of_every_rank_are_predicted_exactly(
    tmp_path: Path, ep: int, tp: int, choice: str, redundant: int
) -> None:
    """Windows × layers × ranks: what the replay of the routes says is what the ranks have counted."""
    trace = _record(tmp_path / "trace", ep=ep, tp=tp, choice=choice, redundant=redundant)
    placement = trace.header.placement()
    assert placement is not None
    predicted = replay_trace(trace, placement, choice=choice)
    assert predicted.sum() == 8 * trace.header.num_layers * trace.routes.shape[0] > 0
    assert torch.equal(predicted, trace.rank_loads)
    other = placement.uniform(placement.num_layers, placement.num_logical, ep=ep, num_redundant=redundant + ep)
    assert not torch.equal(replay_trace(trace, other, choice=choice), trace.rank_loads), "another placement shows"


def test_a_trace_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _record(tmp_path / "trace", ep=4, choice="static", redundant=0)
    files = {key: tmp_path / f"plan.{key}" for key in ("json", "html", "placement")}
    words = [f"{key}={file}" for key, file in files.items()]
    question = ["model=demo", "hardware=h200", "ep=2,4", "tp=1", "redundant=0,4", "dispatch=all_to_all", "batch=4,8"]
    asked = [*question, "prompt_tokens=16", "output_tokens=8", "prefill_tokens=64", f"trace={tmp_path / 'trace'}"]
    assert main([*asked, *words]) == 0
    out = capsys.readouterr().out
    assert "trace " in out
    found = json.loads(files["json"].read_text(encoding="utf-8"))
    assert {one["batch"] for one in found["decode"]} == {8}, "all meet 50 ms: the largest batch"
    assert found["decode"][0]["memory_bytes"]["total"] < 10e9
    page = files["html"].read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "http://" not in page
    assert "https://" not in page.replace("https://github.com", "")
    assert main([f"trace={tmp_path / 'trace'}"]) == 2, "a trace of another model"
    assert "num_layers=3" in capsys.readouterr().err
    placed = compose(
        [*question[:1], f"ep={found['together'][0]['decode']['ep']}", f"placement.file={files['placement']}"]
    )
    assert placed.config.placement.file == str(files["placement"])


def test_the_winners_command_is_one_of_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=deepseek_v3", "ep=32", "tp=1", "redundant=32", "dispatch=deep_ep", "batch=64", "layers=1"]
    assert main([*words, "policy=eplb", "prefill_tokens=4096", "tpot_ms=null"]) == 0
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines() if "torchrun" in line]
    assert len(commands) == 3
    for line in commands:
        launch, _, rest = line[line.index("torchrun") :].partition(" -m moe_runtime ")
        assert "--nproc-per-node 8 --nnodes 4" in launch
        run = compose(shlex.split(rest), torchrun=TorchrunEnv(0, 32, 0, 8, "localhost", 29500))
        assert (run.config.ep, run.config.tp, run.config.dispatch) == (32, 1, "deep_ep")
        assert run.config.placement.num_redundant_experts == 32


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["model=deepseek_v4"], "model=deepseek_v4", 2),
        (["hardware=h300"], "no such entry", 2),
        (["trace=nowhere"], "nowhere", 2),
        (["prompt_tokens=163840"], "Lower one of them by 1024", 2),
        (["ep=8", "tp=1", "redundant=0", "dispatch=deep_ep", "hardware=h100", "layers=1"], "needs", 3),
        (["ep=16", "tp=3", "redundant=0", "dispatch=deep_ep", "layers=1"], "does not divide", 3),
    ],
)
def test_questions_without_an_answer(
    words: list[str], says: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    streams = capsys.readouterr()
    assert says in streams.out + streams.err
