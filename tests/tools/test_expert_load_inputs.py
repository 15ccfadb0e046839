"""What `trace=` may name, and that it is of the model at hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_tools.expert_load import recording
from moe_tools.expert_load.planning import make_plan
from moe_tools.expert_load.progress import watched
from moe_tools.expert_load.run_file import read_run, repeated
from moe_tools.expert_load.source import open_source, placed
from moe_tools.expert_load.words import COMMANDS, parse_words
from safetensors.torch import save_file

from moe_runtime.balance.planner import plan_placement
from moe_runtime.balance.trace import read_header, read_trace, routed_loads
from moe_runtime.balance.trace_readers import read_vllm
from moe_runtime.cli.console import PlainConsole
from moe_runtime.errors import ConfigError
from moe_runtime.launch.data import data_path
from moe_runtime.launch.env import child_environment
from moe_runtime.parallel.placement import ExpertPlacement
from tests.tools.expert_load_cli import next_words, refused, run
from tests.tools.expert_load_traces import EP, EXPERTS, LAYERS, TOP_K, random_routes, write_trace

GROUPS = 4


def write_model(folder: Path, **changes: Any) -> Path:
    """The configuration of a model that the traces of `write_trace` fit, without weights."""
    config = json.loads((data_path("models", "demo") / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": LAYERS + 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    config |= {"n_group": GROUPS, "topk_group": 2, "num_nextn_predict_layers": 0, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_trace_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "load", model="base")
    plan = ("plan", f"trace={tmp_path / 'load'}", f"output={tmp_path / 'plan.json'}")
    tuned = f"model={write_model(tmp_path / 'tuned')}"
    said = refused(capsys, *plan, tuned)
    assert "the trace is of 'base', and this is 'tuned'" in said
    assert "fine_tune=true" in said
    out = run(capsys, *plan, tuned, "fine_tune=true")
    assert next_words(out)[-2:] == [tuned, "fine_tune=true"]
    run(capsys, *next_words(out))
    run(capsys, *plan, f"model={write_model(tmp_path / 'base')}")
    wider = f"model={write_model(tmp_path / 'wider', num_experts_per_tok=4)}"
    assert "with top_k=2, and this model has top_k=4" in refused(capsys, *plan, wider, "fine_tune=true")
    assert "Add model=NAME" in refused(capsys, *plan, "fine_tune=true")


def test_compare_refuses_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("base", "tuned"):
        write_trace(tmp_path / model, model=model)
    plan = tmp_path / "plan.json"
    plan.write_text(ExpertPlacement.uniform(LAYERS, EXPERTS, ep=EP).to_json(), encoding="utf-8")
    words = ["compare", f"trace={tmp_path / 'base'}", f"plan={plan}", f"measured={tmp_path / 'tuned'}"]
    assert "the trace is of 'base', and this is 'tuned'" in refused(capsys, *words)
    assert "exactly as predicted" in run(capsys, *words, "fine_tune=true")


def test_plans_keep_the_model_s_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As live rebalancing plans them: experts of a group on one node."""
    trace = write_trace(tmp_path / "load", model="base")
    file = tmp_path / "plan.json"
    model = f"model={write_model(tmp_path / 'base')}"
    assert "each of 4 groups" in run(capsys, "plan", f"trace={tmp_path / 'load'}", model, f"output={file}")
    found = ExpertPlacement.from_file(file, num_layers=LAYERS, num_logical=EXPERTS, ep=EP)
    wanted = plan_placement(trace.loads, ep=EP, ranks_per_node=2, num_groups=GROUPS, num_redundant=EP)
    assert found.phy2log.equal(wanted.phy2log)
    nodes = (found.phy2log // (EXPERTS // GROUPS)).view(LAYERS, 2, -1)
    assert all(len(set(node.tolist())) == GROUPS // 2 for layer in nodes for node in layer)
    for words in ((model, "groups=false"), ()):
        out = run(capsys, "plan", f"trace={tmp_path / 'load'}", *words, f"output={file}")
        assert ("n_group" in out) == (not words)
        found = ExpertPlacement.from_file(file, num_layers=LAYERS, num_logical=EXPERTS, ep=EP)
        assert found.phy2log.equal(plan_placement(trace.loads, ep=EP, ranks_per_node=2, num_redundant=EP).phy2log)


def test_a_budget_of_moves_keeps_the_slots(tmp_path: Path) -> None:
    trace = write_trace(tmp_path)
    assert make_plan(trace, move_budget=3).num_physical == EXPERTS
    with pytest.raises(ConfigError, match=f"Set ep={EP} placement.num_redundant_experts=0, or leave it out"):
        make_plan(trace, num_redundant=4, move_budget=3)


def test_vllm_s_routes_are_reported_and_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routes = random_routes().numpy()
    for number, own in enumerate(routes):
        np.savez(tmp_path / f"{number}.npz", prompt_routed_experts=own[:30], routed_experts=own[30:])
    trace = f"trace={tmp_path}"
    assert "Give num_routed" in refused(capsys, "report", trace, "ep=4")
    assert "does not record where experts were. Add ep=N" in refused(capsys, "report", trace, f"num_routed={EXPERTS}")
    model = f"model={write_model(tmp_path / 'base')}"
    out = run(capsys, "report", trace, model, "ep=4", "ranks_per_node=2", f"output={tmp_path / 'page.html'}")
    assert "base: 2 MoE layers of 16 experts" in out
    assert "As placed" in out
    assert "measured" not in out
    words = next_words(out)
    assert words[2:5] == [model, "ep=4", "ranks_per_node=2"]
    run(capsys, *next_words(run(capsys, *words)))
    assert "runs nothing" in refused(capsys, "report", trace, model, "ep=4", "dtype=float32")


def test_counts_of_tensorrt_llm_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads = write_trace(tmp_path / "load").loads
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    counts = {f"{window}_{layer}": row for window, own in enumerate(loads) for layer, row in enumerate(own.unbind())}
    save_file({name: row.contiguous() for name, row in counts.items()}, tmp_path / "rank0.safetensors")
    words = ("plan", f"trace={tmp_path}", "ep=4", f"output={tmp_path / 'plan.json'}")
    out = run(capsys, *words)
    assert "a model without a name: 2 MoE layers of 16 experts" in out
    assert "a new start" in out
    run(capsys, *next_words(out))
    where = (f"placement.file={tmp_path / 'plan.json'}", "placement.num_redundant_experts=4")
    assert "would overwrite what this command reads" in refused(capsys, *words, *where)
    assert "moves   0 slots" in run(capsys, *words[:-1], f"output={tmp_path / 'same.json'}", *where)


def test_completions_of_vllm_share_a_batch() -> None:
    """Which completions shared a step is not recorded; their tokens enter at all ranks in turn."""
    requests = [(own[:30], own[30:]) for own in random_routes().numpy()] * 30
    plain = read_vllm(requests, num_routed=EXPERTS)
    trace = placed(plain, ExpertPlacement.uniform(LAYERS, EXPERTS, ep=EP), model="m", ranks_per_node=2)
    assert trace.phases == ("decode", "mixed") * 2
    assert trace.window_steps.tolist() == [64, 64, 26, 26]
    assert trace.num_tokens.tolist() == [64 * 10, 64 * 30, 26 * 10, 26 * 30]
    assert routed_loads(trace).equal(trace.loads)
    assert trace.total_loads.equal(plain.total_loads)
    assert trace.rank_loads.equal(trace.loads.view(4, LAYERS, EP, -1).sum(-1))
    assert trace.home.bincount().tolist() == [900] * EP
    assert trace.first_step.tolist() == [0, 0, 64, 64]


def test_nothing_runs_before_all_words_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recording, "LLM", None)
    uniform = ExpertPlacement.uniform(LAYERS, EXPERTS, ep=EP).to_json()
    Path("plan.json").write_text(uniform, encoding="utf-8")
    Path("gap.json").write_text(uniform.replace("[0,", "[1,"), encoding="utf-8")
    assert "mkdir -p" in refused(capsys, "report", "ep=4", "output=none/a.html")
    assert "plan=none.json: cannot be read" in refused(capsys, "report", "ep=4", "plan=none.json")
    assert "plan=plan.json: is for 2 layers" in refused(capsys, "report", "ep=4", "plan=plan.json")
    assert "plan=gap.json: placement: logical expert 0 has no slot" in refused(capsys, "apply", "plan=gap.json")
    assert "plan.json is a file" in refused(capsys, "record", "ep=4", "output=plan.json/load")
    assert "draws its own" in refused(capsys, "record", "workload=synthetic", "prompts=plan.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gap.json", "plan.json"]


def test_a_run_that_fails_leaves_its_folder_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("record", "ep=2", "workload=synthetic", "requests=1", "prompt_tokens=9999", f"output={tmp_path / 'load'}")
    assert "must have at most" in refused(capsys, *words)
    assert not (tmp_path / "load").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["record", "ep=4", "ep=8"], "ep=8: ep=4 was given before"),
        (["record", "output=a", "output=b"], "output=b: output=a was given before"),
        (["plan", "tp=2"], "plan takes trace="),
        (["report", "--trace=load"], "is written as trace=load"),
        (["report", "trace", "load"], "is written as trace=runs/expert_load"),
        (["report", "trac=load"], "Did you mean 'trace'"),
        (["record", "job=doctor"], "python -m moe_runtime job=doctor"),
        (["record", "balance.trace=x"], "output= names the folder"),
    ],
)
def test_words_that_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=".*") as caught:
        parse_words(words)
    assert said in str(caught.value)


def test_a_repeated_run_leaves_out_what_was_that_run_s_own(tmp_path: Path) -> None:
    write_trace(tmp_path)
    launch = ["ep=4", "prompts=p", "balance.rebalance=on", "balance.threshold=0.5", "balance.window_steps=2"]
    launch += ["placement.replica_choice=nearest", "placement.num_redundant_experts=4", "snapshot_file=s"]
    run = {"version": 1, "launch": launch, "own": {"requests": "3"}}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    plan = ExpertPlacement.uniform(LAYERS, EXPERTS, ep=8)
    found = repeated(parse_words(["apply", "seed=1"]), tmp_path, read_header(tmp_path), plan)
    kept = ("prompts=p", "balance.window_steps=2", "placement.replica_choice=nearest")
    assert found.launch == (*kept, "ep=8", "tp=1", "ranks_per_node=2", "seed=1")
    assert found.own == {"requests": "3"}
    found = repeated(parse_words(["apply", "prompts=q"]), tmp_path, read_header(tmp_path), plan)
    assert [word for word in found.launch if word.startswith("prompts=")] == ["prompts=q"], "each key once"
    (tmp_path / "run.json").write_text(json.dumps(run | {"version": 2}), encoding="utf-8")
    assert read_run(tmp_path) is None


def test_a_model_that_only_has_the_name_gives_no_bytes(tmp_path: Path) -> None:
    write_trace(tmp_path, model="demo")
    assert open_source(parse_words(["report", f"trace={tmp_path}"])).facts is None
    assert read_trace(tmp_path).header.model == "demo"


def test_one_rank_s_record_leads_to_a_plan_for_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "routed.npy", random_routes().flatten(0, 1).numpy())
    words = ["report", f"trace={tmp_path / 'routed.npy'}", f"num_routed={EXPERTS}", "ep=1"]
    following = next_words(run(capsys, *words))
    assert following[2:] == [f"num_routed={EXPERTS}", "ep=8", f"output={tmp_path / 'plan.json'}"]
    run(capsys, *next_words(run(capsys, *following)))


def test_run_json_of_another_run_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "load", model="base")
    model = write_model(tmp_path / "base")
    file = tmp_path / "load" / "run.json"
    report = ("report", f"trace={tmp_path / 'load'}")
    file.write_text(json.dumps({"version": 1, "launch": [f"model={model}", "dtype=foo"], "own": {}}), encoding="utf-8")
    said = refused(capsys, *report)
    assert f"{file}: dtype=foo" in said and "or remove the file" in said
    other = write_model(tmp_path / "other")
    file.write_text(json.dumps({"version": 1, "launch": [f"model={other}"], "own": {}}), encoding="utf-8")
    assert open_source(parse_words(report)).facts is None, "base is not found by its name alone"


def test_the_console_script() -> None:
    """The entry point that the package declares exists, and answers --help."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["moe-expert-load"].partition(":")
    code = f"import sys; from {module} import {name}; sys.argv[1:] = ['--help']; {name}()"
    command = [sys.executable, "-P", "-c", code]
    said = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=60, check=True)
    assert all(f"\n{command}: " in said.stdout for command in COMMANDS)


def test_progress_is_told_at_a_calm_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with watched(PlainConsole(sys.stdout), "running 3 prompts", lambda: "step 7", calm_s=0.02):
        time.sleep(0.1)
    said = capsys.readouterr()
    assert said.out == "running 3 prompts …\n"
    assert set(said.err.splitlines()) == {"running 3 prompts: step 7"}
