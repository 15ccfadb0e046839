"""The expert-load tool's commands, as a person types them; one whole circle on the demo model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from moe_tools.expert_load.words import COMMANDS, parse_words
from moe_tools.outputs import check_output

from moe_runtime.cli.next_command import load_command, next_command
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.parallel.placement import ExpertPlacement
from tests.tools.expert_load_cli import next_words, refused, run
from tests.tools.expert_load_traces import EP, EXPERTS, LAYERS, write_trace


def test_every_command_that_is_printed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a recording to its comparison; under a plan the ranks receive exactly the rows that were predicted."""
    monkeypatch.chdir(tmp_path)
    Path("my prompts.txt").write_text("def add(a, b):\nimport os\nclass A:\n", encoding="utf-8")
    words = ["record", "ep=4", "prompts=my prompts.txt", "sampling.max_tokens=6", "output=my load"]
    for command in ("record", "report", "plan", "apply", "compare"):
        assert words[0] == command
        out = run(capsys, *words)
        words = [] if command == "compare" else next_words(out)
    assert "exactly as predicted" in out
    assert "chosen equally often in both runs" in out
    used = shlex.split(next(line for line in out.splitlines() if line.startswith("use it: ")))[2:]
    assert used[:3] == ["python", "-m", "moe_runtime"]
    assert Path(str(compose(used[3:]).config.placement.file)).name == "plan.json"
    out = run(capsys, "top", "trace=my load")
    assert "demo, closed" in out
    assert "hottest ranks" in out
    assert "holds a trace already" in refused(capsys, "record", "ep=4", "output=my load")


def test_a_plan_for_other_ranks_is_applied_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("def add(a, b):\n", encoding="utf-8")
    few = ("prompts=prompts.txt", "sampling.max_tokens=3")
    run(capsys, "record", "ep=4", "tp=2", *few, "output=load")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = run(capsys, "plan", "trace=../load", "ep=3", "placement.num_redundant_experts=8", "output=plan.json")
    assert "a new start" in out
    assert "nothing was recorded" in refused(capsys, "compare", "trace=../load", "plan=plan.json")
    out = run(capsys, *next_words(out))
    assert "demo on ep=3 = dp=3 × tp=1" in out
    out = run(capsys, *next_words(out))
    assert "loads spread over replicas" in out
    out = run(capsys, "plan", "trace=../load", "ep=3", "ranks_per_node=3", "output=plan.json")
    assert next_words(out)[-2:] == ["ranks_per_node=3", "output=plan-applied-2"]
    Path("../load/run.json").unlink()
    out = run(capsys, "plan", "trace=../load", "ep=8", "output=other.json")
    words = next_words(out)
    assert words == ["apply", "plan=other.json", "model=demo", "ep=8"]
    assert compose(parse_words(words).launch).has_weights


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
        (["plan", "trace={load}", "output={load}/trace.json"], "would overwrite what belongs to the trace in"),
        (["plan", "trace={load}", "output={load}/snapshot.json"], "would overwrite what belongs to the trace in"),
        (["report", "trace={load}", "output={load}/part-00009.safetensors"], "is the ending of parts of traces"),
        (["report", "ep=2", "output={load}/trace.json"], "would overwrite what belongs to the trace in"),
        (["report", "trace={load}", "plan={bad}", "output={bad}"], "would overwrite what this command reads"),
        (["record", "output=/proc/x"], "no folder can be made in /proc"),
        (["plan", "trace={load}", "output=p.json", "ep=x"], "whole number"),
        (["plan", "trace={load}", "output=p.json", "move_budget=-1"], "whole number of at least 0"),
        (["plan", "trace={load}", "output=p.json", "model=other"], "no such folder"),
        (["plan", "trace={load}", "output=p.json", "dtype=float32"], "plan takes trace="),
        (["report", "trace={load}", "ep=8"], "runs nothing"),
        (["report", "trace={load}", "requests=8"], "runs nothing"),
        (["report", "trace={none}"], "cannot be read"),
        (["report", "trace={load}", "plan={bad}"], "exactly the keys"),
        (["report", "trace={load}", "output={none}/x.html"], "mkdir -p"),
        (["record", "plan=p.json"], "belongs to report"),
        (["record", "trace="], "belongs to report"),
        (["record", "epp=3"], "Did you mean 'ep'"),
        (["record", "balance.record=off", "output={none}"], "nothing would be recorded"),
        (["record", "requests=3", "output={none}"], "workload=synthetic"),
        (["record", "workload=zipf", "output={none}"], "prompts, synthetic"),
        (["compare", "trace={load}"], "plan= is missing"),
        (["compare", "trace={bad}", "plan={bad}"], "is no recording of this tool, and compare needs one"),
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


def test_no_output_replaces_what_is_read(tmp_path: Path) -> None:
    """By any name: links are followed. What is not read may be written again."""
    write_trace(tmp_path / "load")
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    (tmp_path / "link.json").symlink_to(tmp_path / "load" / "trace.json")
    (tmp_path / "hard.json").hardlink_to(tmp_path / "plan.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    reads = [tmp_path / "plan.json", tmp_path / "load", tmp_path / "model", None]
    for name in ("plan.json", "hard.json", "link.json", "load/trace.json", "model/config.json", "routes.npz"):
        with pytest.raises(ConfigError, match="would overwrite|is the ending of"):
            check_output("html", tmp_path / name, reads=reads)
    for name in ("load/plan.json", "model/plan.json", "trace.json", "new.html"):
        check_output("html", tmp_path / name, reads=reads)
    check_output("json", tmp_path / "plan.json", reads=[tmp_path / "load"])


@pytest.mark.slow
def test_the_documented_plan_of_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = f"trace={tmp_path / 'load'}"
    run(capsys, "record", "model=demo", "ep=32", f"output={tmp_path / 'load'}")
    spare, output = "placement.num_redundant_experts=32", f"output={tmp_path / 'plan.json'}"
    grouped = run(capsys, "plan", load, "ep=32", spare, output)
    free = run(capsys, "plan", load, "ep=32", spare, output, "groups=false")
    assert re.search(r"As recorded +measured +53 % +1\.90 ", grouped)
    assert re.search(r"Planned +predicted +81 % ", grouped)
    assert re.search(r"Planned +predicted +85 % ", free)
    docs = (Path(__file__).parents[2] / "docs" / "balance.md").read_text(encoding="utf-8")
    assert "with `groups=false` they need not (on the demo model: 85 % instead of 81 %)" in docs


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
    assert load_command(compose(["ep=4", "balance.record=off"])) == "python -m moe_tools.expert_load report ep=4"
    traced = compose(["ep=4", "balance.trace=my load", "balance.record=per_token", "balance.window_steps=2"])
    assert load_command(traced) == "python -m moe_tools.expert_load report trace='my load'"
    assert next_command(traced) == "python -m moe_runtime ep=320"
