"""The expert-load tool's commands, as a person types them; one whole circle on the demo model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from moe_tools.expert_load.__main__ import main
from moe_tools.expert_load.top import bar, make_view
from moe_tools.expert_load.words import COMMANDS, parse_words

from moe_runtime.cli.app import ExitCode
from moe_runtime.cli.next_command import load_command
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.parallel.placement import ExpertPlacement
from tests.tools.expert_load_traces import EP, EXPERTS, LAYERS, write_trace


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a successful command prints."""
    code = main(words)
    said = capsys.readouterr()
    assert code is ExitCode.OK, said.err
    return said.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of bad input."""
    assert main(words) is ExitCode.BAD_INPUT
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err


def test_record_plan_apply_compare_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a plan the ranks receive exactly the rows that were predicted."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("def add(a, b):\nimport os\nclass A:\n", encoding="utf-8")
    out = run(capsys, "record", "ep=4", "prompts=prompts.txt", "sampling.max_tokens=6", "output=load")
    assert "next: python -m moe_tools.expert_load report trace=load output=load/report.html" in out
    out = run(capsys, "plan", "trace=load", "ep=4", "placement.num_redundant_experts=8", "output=plan.json")
    assert "8 of 264 spare" in out
    assert "a new start" in out
    assert "nothing was recorded" in refused(capsys, "compare", "trace=load", "plan=plan.json")
    out = run(capsys, "apply", "trace=load", "plan=plan.json")
    assert "3 prompts" in out
    assert "compare trace=load plan=plan.json measured=plan-applied" in out
    out = run(capsys, "compare", "trace=load", "plan=plan.json")
    assert "exactly as predicted" in out
    assert "chosen equally often in both runs" in out
    out = run(capsys, "top", "trace=load")
    assert "demo, closed" in out
    assert "hottest ranks" in out
    assert "holds a trace already" in refused(capsys, "record", "ep=4", "output=load")


def test_a_synthetic_workload_and_a_report_in_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("ep=2", "sampling.max_tokens=3", "output=page.html")
    out = run(capsys, "report", *words, "workload=synthetic", "requests=3", "prompt_tokens=9")
    assert "running 3 prompts" in out
    assert json.loads(Path("runs/expert_load/run.json").read_text())["own"]["requests"] == "3"
    assert "33 in" in out  # 3 prompts of 9 tokens; of 3 written tokens, the first two are read again
    assert "Planned" in out
    assert Path("page.html").stat().st_size > 20_000
    assert Path("page-experts.png").is_file()


def test_report_and_plan_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "load")
    plan = tmp_path / "plan.json"
    out = run(capsys, "plan", f"trace={tmp_path / 'load'}", "placement.num_redundant_experts=0", f"output={plan}")
    assert "slots" in out
    found = ExpertPlacement.from_file(plan, num_layers=LAYERS, num_logical=EXPERTS, ep=EP)
    assert found.num_physical == EXPERTS
    run(capsys, "report", f"trace={tmp_path / 'load'}", f"plan={plan}")
    assert "The plan of plan.json" in (tmp_path / "load" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recrod"], "Did you mean 'record'"),
        (["plan", "output=p.json"], "trace= is missing"),
        (["plan", "trace={load}", "output={load}"], "is a folder"),
        (["plan", "trace={load}", "output=p.json", "ep=x"], "whole number"),
        (["plan", "trace={load}", "output=p.json", "move_budget=-1"], "whole number of at least 0"),
        (["plan", "trace={load}", "output=p.json", "model=other"], "the trace is of 'demo'"),
        (["plan", "trace={load}", "output=p.json", "dtype=float32"], "plan takes trace="),
        (["report", "trace={load}", "ep=8"], "runs nothing"),
        (["report", "trace={load}", "requests=8"], "runs nothing"),
        (["report", "trace={none}"], "cannot be read"),
        (["report", "trace={load}", "plan={bad}"], "exactly the keys"),
        (["report", "trace={load}", "output={none}/x.html"], "mkdir -p"),
        (["record", "plan=p.json"], "belongs to report"),
        (["record", "trace="], "belongs to report"),
        (["record", "epp=3"], "Did you mean 'ep'"),
        (["record", "balance.record=off", "output={none}"], "nothing would be in it"),
        (["record", "requests=3", "output={none}"], "workload=synthetic"),
        (["record", "workload=zipf", "output={none}"], "prompts, synthetic"),
        (["compare", "trace={load}"], "plan= is missing"),
        (["apply", "plan={bad}", "output={none}"], "exactly the keys"),
        (["top"], "which engine"),
        (["top", "trace={load}"], "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "load")
    (tmp_path / "bad").write_text("{}", encoding="utf-8")
    places = {name: str(tmp_path / name) for name in ("load", "none", "bad")}
    assert said in refused(capsys, *(word.format_map(places) for word in words))


def test_a_cut_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path)
    part = next(tmp_path.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-40])
    assert "TraceError" in refused(capsys, "report", f"trace={tmp_path}")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--help")
    assert all(f"\n{command}: " in text for command in COMMANDS)


def test_own_words_never_reach_the_launch() -> None:
    words = parse_words(["record", "output=a=b, c", "ep=4"])
    assert words.own == {"output": "a=b, c"}
    assert words.launch == ("ep=4",)


def test_the_run_names_its_command() -> None:
    line = load_command(compose(["ep=4", "output=x.jsonl", "prompts=my file"]))
    assert line == "python -m moe_tools.expert_load report ep=4 'prompts=my file'"
    assert load_command(compose(["ep=1"])) is None


def snapshot(**changes: Any) -> dict[str, Any]:
    """As an engine writes it."""
    rebalance = {"activity": "moving", "num_layers_committed": 1, "layer": 2, "layer_progress": 0.5, "layers_left": 3}
    engine = {
        "mesh": {"dp": 2, "tp": 1, "pp": 1, "ranks_per_node": 8},
        "state": "running",
        "step": 7,
        "phase": "decode",
        "groups": [{"num_running": 2, "num_waiting": 1}] * 2,
        "num_finished_requests": 5,
        "num_output_tokens": 99,
        "uptime_s": 3700.0,
        "last_step_s": 0.0125,
        "output_tokens_per_s": 12.5,
        "rebalance": rebalance | {"num_layers_abandoned": 1},
    }
    window = {
        "first_step": 4,
        "last_step": 7,
        "num_tokens": 8,
        "expert_load": [[6, 2, 0, 0], [0, 0, 0, 0]],
        "rank_load": [[8, 0], [0, 0]],
        "trace_error": None,
    }
    return {"written_at": time.time(), "pid": 1, "run": {"model": "m"}, "engine": engine, "window": window} | changes


def test_top_shows_the_window() -> None:
    view = make_view(snapshot(), time.time())
    text = dict(view.pairs)
    assert text["requests"] == "4 running, 2 waiting, 5 finished"
    assert text["rebalancing"] == "moving, 1 layer moved so far; layer 2 at 50 %, 3 left; 1 abandoned"
    assert view.rows[0] == ("0", "0.500", bar(0.5), "2.00", "0 (8), 1 (0)", "0 (3.0×), 1 (1.0×), 2 (0.0×)")
    assert view.rows[1][1] == "–"
    assert not view.over


def test_top_tells_a_silent_engine() -> None:
    late = snapshot(written_at=time.time() - 60, pid=2**22 + 1, window=None)
    view = make_view(late, time.time())
    assert "silent for 60 s: its process has ended" in dict(view.pairs)["engine"]
    assert "no window" in dict(view.pairs)["loads"]
    with pytest.raises(ConfigError, match="not as an engine writes it"):
        make_view({"engine": {}}, 0.0)


def test_top_on_a_terminal() -> None:
    from moe_tools.expert_load.rich_top import render
    from rich.console import Console

    console = Console(width=110, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    console.print(render(make_view(snapshot(), time.time())))
    text = console.export_text()
    assert "0 (3.0×)" in text
    assert "[" not in text


@pytest.mark.parametrize(("part", "text"), [(0, ""), (1, "█" * 24), (0.5, "█" * 12), (1 / 48, "▌")])
def test_bars(part: float, text: str) -> None:
    assert bar(part) == text
