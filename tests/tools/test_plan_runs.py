"""The planner from end to end: a demo trace predicted exactly, whole questions, their files and commands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from moe_tools.plan.__main__ import main
from moe_tools.plan.advice import advice
from moe_tools.plan.answer import Answer, Decode, Prefill, Refused
from moe_tools.plan.costs import CostModel
from moe_tools.plan.deployment import Layout, deploy, layouts
from moe_tools.plan.document import as_json
from moe_tools.plan.evaluate import Evaluator, evaluate, largest
from moe_tools.plan.hardware import load_machine
from moe_tools.plan.recording import repeated
from moe_tools.plan.report import TOGETHER_HEAD, lines, shape_text, starts_note, term_cells, units_text, waits_ms
from moe_tools.plan.settings import parse_words
from moe_tools.plan.timing import decode_shape

from moe_runtime import LLM, SamplingParams
from moe_runtime.balance.replay import replay
from moe_runtime.balance.trace import Trace, read_trace
from moe_runtime.cli.doctor import doctor
from moe_runtime.launch.compose import compose
from moe_runtime.launch.env import TorchrunEnv
from moe_runtime.parallel.placement import ExpertPlacement

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
    found = repeated(trace)
    assert found is not None
    assert found.rows == 8 * trace.header.num_layers * trace.routes.shape[0] > 0
    assert (found.differ, found.first) == (0, None)
    assert str(found).endswith(f"equal in all {trace.num_windows} windows x 3 layers x {ep} ranks ({found.rows} rows)")
    rows = trace.rank_loads.clone()
    rows[1, 2, 3] += 5
    found = repeated(replace(trace, header=trace.header, rank_loads=rows))
    measured = int(rows[1, 2, 3])
    assert f"first window 1, layer 2, rank 3: {measured - 5} replayed, {measured} measured" in str(found)
    other = placement.uniform(placement.num_layers, placement.num_logical, ep=ep, num_redundant=redundant + ep)
    assert not replay(trace, other, choice=choice).equals(trace), "another placement shows"


def test_a_trace_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _record(tmp_path / "trace", ep=4, choice="static", redundant=0)
    files = {key: tmp_path / f"plan.{key}" for key in ("json", "html", "placement")}
    words = [f"{key}={file}" for key, file in files.items()]
    question = ["model=demo", "hardware=h200", "ep=2,4", "tp=1", "redundant=0,4", "dispatch=all_to_all", "batch=4,8"]
    asked = [*question, "prompt_tokens=16", "output_tokens=8", "prefill_tokens=64", f"trace={tmp_path / 'trace'}"]
    assert main([*asked, *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"replayed under .* measured: equal in all \d+ windows x 3 layers x 4 ranks", out)
    found = json.loads(files["json"].read_text(encoding="utf-8"))
    assert {one["batch"] for one in found["decode"]} == {8}, "all meet 50 ms: the largest batch"
    assert found["decode"][0]["memory_bytes"]["total"] < 10e9
    assert found["prefill"][0]["bounds"]["experts"] == "starts", "370 us of starts for 16 tokens"
    page = files["html"].read_text(encoding="utf-8")
    assert all(f"{key}=" in page for key in ("placement.file", "dispatch"))
    commands = _commands(out)
    assert set(commands) == {"one unit", "decode", "prefill"}
    for command in commands.values():  # each with the placement of its own ranks and slots
        placed = compose([word for word in shlex.split(command) if word != "device=cuda"])
        assert placed.config.placement.file is not None
        text = Path(placed.config.placement.file).read_text(encoding="utf-8")
        assert ExpertPlacement.from_json(text, name="its file").ep == placed.config.ep
    assert found["recording_replayed"]["differ"] == 0 < found["recording_replayed"]["rows"]
    assert "replayed under the recording" in page
    assert main([*asked, *words, "tpot_ms=0.01"]) == 3
    assert "placement: nothing fits" in capsys.readouterr().out
    header = tmp_path / "trace" / "trace.json"
    before = header.read_bytes()
    for key in files:
        assert main([*asked, f"{key}={header}"]) == 2
        assert "belongs to the trace" in capsys.readouterr().err
    assert header.read_bytes() == before


QUESTIONS = (
    ("h200", "ep=32", "redundant=32", "tp=1", "dispatch=deep_ep"),
    ("h200", "ep=16", "redundant=0", "tp=4", "dispatch=all_gather"),
    ("b200", "ep=8", "redundant=0", "tp=2", "dispatch=all_to_all"),
    ("gb200", "ep=48", "redundant=32", "tp=1", "dispatch=deep_ep"),
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_command_is_one_that_the_launch_takes(
    question: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    hardware, *words = question
    asked = ["batch=16", "layers=1", "policy=eplb", "prefill_tokens=4096", "tpot_ms=null"]
    assert main([*words, *asked, f"hardware={hardware}"]) == 0
    out = capsys.readouterr().out
    commands = _commands(out)
    assert set(commands) == {"one unit", "decode", "prefill"}
    ep, hosts = int(words[0].removeprefix("ep=")), load_machine(hardware).host_ranks
    for command in commands.values():
        each = min(ep, hosts)
        launch = TorchrunEnv(0, ep, 0, each, "localhost", 29500)
        assert doctor([*shlex.split(command), "job=doctor"], torchrun=launch) == 0, capsys.readouterr().out
        run = compose(shlex.split(command), torchrun=launch)
        assert f"tp={run.config.tp}" in words
        assert f"redundant={run.config.placement.num_redundant_experts}" in words
    assert f"--nproc-per-node {min(ep, hosts)}" in out
    assert ("--nnodes" in out) == (ep > hosts)


def _commands(out: str) -> dict[str, str]:
    """Name → the launch's words."""
    found = {}
    for line in out.splitlines():
        name, found_one, command = line.partition(": ")
        if found_one and command.strip().startswith("torchrun"):
            found[name.strip()] = command.partition(" -m moe_runtime ")[2]
    return found


def _answer(*words: str) -> Answer:
    usual = {"layers": "1", "tp": "1", "redundant": "0", "dispatch": "deep_ep"}
    asked = usual | dict(word.split("=", 1) for word in words)
    return evaluate(Evaluator(parse_words([f"{key}={text}" for key, text in asked.items()])))


def test_figures_of_one_unit_belong_to_its_command() -> None:
    """However large a prefill unit's steps may be, the unit that does both runs what its own command allows."""
    wide, narrow = (_answer("ep=16", "batch=32", f"prefill_tokens={tokens}") for tokens in (16384, 2048))
    (one,), (other,) = wide.together, narrow.together
    assert (one.tpot_ms, one.ttft_ms, one.tokens_per_s) == (other.tpot_ms, other.ttft_ms, other.tokens_per_s)
    assert one.decode.deployment == one.prefill.deployment == other.decode.deployment
    engine = one.decode.deployment.config.engine
    assert engine.max_num_batched_tokens == one.decode.batch + one.prefill.tokens == 32 + 2048
    assert one.mixed_ms == pytest.approx(one.decode.tpot_ms + one.prefill.step.us / 1e3)
    assert one.decode.tpot_ms < one.tpot_ms < one.mixed_ms == one.ttft_ms
    assert one.share == 32 * 2048 / 1024 / 2048
    assert wide.prefills[0].tokens == 16384


def test_layouts_are_named_by_their_slots() -> None:
    """256 experts on 72 ranks fill 288 slots, whether 0 or 32 copies were asked for: one layout, not two."""
    plan = parse_words(["ep=72,64", "tp=1", "redundant=0,32", "dispatch=deep_ep"])
    found = dict(layouts(plan, Evaluator(plan).model, num_logical=256))
    assert [(one.ep, one.redundant) for one in found] == [(72, 32), (64, 0), (64, 64)]


def test_a_larger_buffer_takes_fewer_dispatches() -> None:
    words = ["ep=32", "batch=8", "redundant=32"]
    usual, large = (_answer(*words, *more).prefills[0] for more in ((), ("dispatch_buffer_bytes=36GiB",)))
    assert usual.step.agreed.num_chunks > 1
    assert "dispatch_buffer_bytes=" in shape_text(usual)
    assert large.step.agreed.num_chunks == 1
    assert large.tokens_per_s > 1.2 * usual.tokens_per_s
    assert large.memory.dispatch > 4 * usual.memory.dispatch
    assert f"engine.dispatch_buffer_bytes={36 * 2**30}" in large.deployment.words()


def test_where_decode_steps_are_cut_is_part_of_the_command() -> None:
    words = ["ep=16", "batch=64", "redundant=32", "tpot_ms=null"]
    usual, early = (_answer(*words, *more).decodes[0] for more in ((), ("two_batch_decode_tokens=32",)))
    assert (usual.step.agreed.num_micro_batches, early.step.agreed.num_micro_batches) == (1, 2)
    assert not any("two_batch" in word for word in usual.deployment.words())
    assert "engine.two_batch_decode_tokens=32" in early.deployment.words()


def test_prompts_that_do_not_fit_into_steps_are_told() -> None:
    question = ("ep=16", "prompt_tokens=4096", "output_tokens=64", "tpot_ms=null")
    answer = _answer(*question, "batch=64")
    (refused,) = answer.refused
    assert (refused.phase, refused.rule, refused.least) == ("one unit", "prompts", 4096)
    assert "room for 2048" in refused.reason
    assert "Set batch=32," in advice(answer)[0]
    assert _answer(*question, "batch=32").together


def test_a_larger_batch_of_another_shape_is_looked_at() -> None:
    """From a number of tokens on a step is cut in two, which overlaps and may be shorter than that of a few less."""
    evaluator = Evaluator(parse_words(["layers=1", "tpot_ms=null"]))
    layout = Layout(16, 1, 32, "deep_ep")
    made = {
        batch: deploy(layout, evaluator.plan, evaluator.base, evaluator.model, evaluator.machine, batch=batch,
                      batched_tokens=batch)
        for batch in range(8, 168, 8)
    }  # fmt: skip
    whole = [batch for batch in made if decode_shape(made[batch], batch)[0] == 1]
    assert 0 < len(whole) < len(made), "both shapes occur"
    passing = {*whole[:3], max(whole) + 8, max(whole) + 16}

    def judge(batch: int) -> Decode | Refused:
        if batch not in passing:
            return Refused(layout, "decode", "slow", "tpot_ms", 1.0)
        return Decode(made[batch], batch, step)

    some = evaluator.decode(layout)
    assert isinstance(some, Decode)
    step = some.step
    found = largest(layout, "decode", made, judge)
    assert isinstance(found, Decode)
    assert found.batch == max(passing)


def test_remedies_are_ones_that_work() -> None:
    slow = _answer("ep=16", "tpot_ms=0.5")
    (said,) = [line for line in advice(slow) if line.startswith("decode")]
    word = next(word for word in said.split() if word.startswith("tpot_ms=") and word != "tpot_ms=0.5.").rstrip(",")
    assert _answer("ep=16", word).decodes
    assert "a smaller batch=" not in said
    (said,) = [line for line in advice(_answer("ep=16", "tpot_ms=0.5", "batch=16")) if line.startswith("decode")]
    assert "or try a smaller batch=, other ep=" in said
    small = _answer("ep=8", "hardware=h100")
    (said,) = [line for line in advice(small) if "decode" in line]
    assert "needed" in said
    assert "Set ep=16," in said
    assert _answer("ep=16", "hardware=h100").decodes
    together = next(one for one in slow.refused if one.phase == "one unit")
    assert together.rule == "tpot_ms"
    assert any("fits" in line and "one unit" in line for line in advice(small))


def test_the_parts_of_a_step_add_up_and_waiting_is_told() -> None:
    answer = _answer("ep=16", "batch=32")
    units: list[Decode | Prefill] = [*answer.decodes, *answer.prefills]
    for one in units:
        parts = sum(one.step.terms.values()) + one.step.summary.exposed_us[0]
        assert parts == pytest.approx(one.step.us, rel=1e-6)
    assert waits_ms(answer.prefills[0]) > 0, "drawn routes leave a mean rank waiting"
    assert "waits" in term_cells(answer.prefills[0])[-1][0]
    assert answer.prefills[0].step.bounds["experts"] == "arithmetic"
    assert answer.decodes[0].step.bounds["experts"] == "bytes"


def test_the_fastest_unit_for_both_has_all_its_figures() -> None:
    answer = _answer("ep=16", "batch=32")
    one = answer.together[0]
    assert sum(one.parts_us.values()) == pytest.approx(one.tpot_ms * 1e3, rel=1e-6)
    steps = one.decode.step, one.prefill.step
    assert one.network_bytes == pytest.approx(steps[0].network_bytes + one.share * steps[1].network_bytes)
    text = "\n".join(lines(answer))
    assert f"one unit, {one.decode.deployment.layout}, batch 32: the mean step" in text
    assert {"GB/rank", "network MB/rank/step", "imbalance", "bound by"} <= set(TOGETHER_HEAD)
    (found,) = json.loads(as_json(answer))["together"]
    assert found["memory_bytes"]["total"] == one.memory.total
    assert found["step_without_prompts"]["terms_us"] == dict(steps[0].terms)
    assert found["prompts_of_a_step"]["bounds"] == dict(steps[1].bounds)
    assert found["bounds"]["experts"] == "bytes, prompts: arithmetic"


def test_figures_of_small_models_are_said_to_be_absurd() -> None:
    assert not starts_note(_answer("ep=16", "batch=32"))
    assert "far too fast" in starts_note(_answer("model=demo", "ep=8", "prompt_tokens=64", "output_tokens=64"))
    idle = _answer("ep=64", "redundant=0", "batch=1", "prompt_tokens=1", "output_tokens=64", "prefill_tokens=16")
    assert "far too fast" in starts_note(idle), "a wide model with next to nothing to do"


def test_a_search_times_steps_as_the_clock_does() -> None:
    evaluator = Evaluator(parse_words(["layers=1", "tpot_ms=null", "batch=256", "ep=32", "prefill_tokens=16384"]))
    layout = Layout(32, 1, 32, "deep_ep")
    found = evaluator.decode(layout), evaluator.prefill(layout)
    for one in found:
        assert not isinstance(one, Refused)
        assert one.step.us == pytest.approx(one.step.summary.step_us, rel=1e-9)
    assert isinstance(found[1], Prefill)
    assert (found[1].step.agreed.num_micro_batches, found[1].step.agreed.num_chunks > 1) == (2, True)


def test_a_term_is_bound_by_the_mean_of_the_layers() -> None:
    evaluator, layout = Evaluator(parse_words(["layers=3", "batch=8"])), Layout(16, 1, 0, "deep_ep")
    found = evaluator.decode(layout)
    assert isinstance(found, Decode)
    costs = CostModel(found.deployment, evaluator.routes, evaluator.replay(16, 0))
    _, layer = costs.micro_batch(8, found.step.agreed, decode=True, length=1000)
    ((counts, scale),) = costs.kept.counts.values()
    assert scale == 1
    assert layer.most_rows == pytest.approx(sum(int(own.rows.max()) for own in counts) / 3)
    assert layer.most_active == pytest.approx(sum(int(own.active.max()) for own in counts) / 3)
    assert layer.most_rows != int(counts[0].rows.max()), "the layers differ"


def test_progress_is_told_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    evaluate(Evaluator(parse_words(["ep=16", "tp=1,3", "redundant=0", "batch=8", "layers=1"])), on_layout=seen.append)
    assert [text.split(",")[0] for text in seen] == [f"{number} of 6" for number in range(1, 7)]
    assert main(["ep=16", "tp=3", "redundant=0", "layers=1"]) == 3
    assert "layouts …" in capsys.readouterr().err


def test_whole_units_keep_up() -> None:
    (apart,) = _answer("ep=16", "batch=32").apart
    prefills, decodes, rate = apart.whole_units()
    assert prefills / decodes >= apart.prefill_units - 1e-6
    assert 0.9 * apart.tokens_per_s < rate <= apart.tokens_per_s
    assert f"{prefills} for {decodes}" in units_text(apart)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("json=/nonexistent/a.json", "there is no folder"),
        ("html=.", "is a folder"),
        ("json=a html=a", "is also json="),
        ("json=tests/__init__.py model=tests/__init__.py", "what this command reads"),
        ("json=", "Write json=plan.json"),
    ],
)
def test_files_are_looked_at_before_the_work(
    word: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_tools.plan.evaluate.evaluate", lambda *_: pytest.fail("evaluated first"))
    assert main(word.split()) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["model=deepseek_v4"], "model=deepseek_v4", 2),
        (["hardware=h300"], "no such entry", 2),
        (["trace=nowhere"], "nowhere", 2),
        (["prompt_tokens=163840"], "Nearest: prompt_tokens=163839", 2),
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
