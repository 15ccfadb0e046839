"""What a running engine records: windows, phases, every token's routes, and what it shows of itself meanwhile."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from moe_kernels import backends

from moe_runtime import LLM
from moe_runtime.balance import files, trace_writer
from moe_runtime.balance.trace import Trace, TraceWriter, read_trace, routed_loads
from moe_runtime.engine import snapshot_file
from moe_runtime.engine.engine import RankEngine
from moe_runtime.engine.snapshot_file import read_snapshot
from moe_runtime.engine.trace_thread import TraceThread
from moe_runtime.errors import ConfigError, EngineClosedError
from moe_runtime.launch import graphs as launch_graphs
from moe_runtime.launch import recording as launch_recording
from moe_runtime.launch.compose import compose
from moe_runtime.launch.executors import process
from tests.api.tiny import NUM_EXPERTS, NUM_MOE_LAYERS, TOP_K, greedy, wait_until_idle, write_tiny
from tests.doubles.cuda_graph import RecordedGraphs

PROMPTS = [[5, 6, 7] * 9, [9], [8, 8], [3, 4, 5, 6]]
LENGTH = 6
WORDS = ["num_threads=1", "engine.max_num_batched_tokens=16", "engine.max_num_seqs=8"]
WORDS += ["engine.prefix_caching=false", "balance.window_steps=3"]
NUM_TOKENS = sum(map(len, PROMPTS)) + len(PROMPTS) * (LENGTH - 1)
"""The last token of each output is never run."""
TWO_BATCHES = ["engine.two_batch_overlap=on", "engine.two_batch_tokens=4", "engine.two_batch_decode_tokens=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", text=False)


def record(
    folder: Path,
    trace: Path,
    mode: str,
    *words: str,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    length: int = LENGTH,
) -> Trace:
    """The trace of a run; its sums are those of `load_report`."""
    overrides = [*WORDS, f"balance.record={mode}", f"balance.trace={trace}", *words]
    with LLM(str(folder), overrides=overrides) as llm:
        llm.generate(prompts, greedy(length))
        report = llm.load_report()
    found = read_trace(trace)
    assert torch.equal(found.total_loads, report.expert_load)
    assert torch.equal(found.total_rank_loads, report.rank_load)
    assert found.header.complete
    return found


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("stat", ["ep=1"]),
        ("stat", ["ep=4", "tp=2"]),
        ("per_pass", ["ep=4"]),
        ("per_token", ["ep=4", "tp=2"]),
        ("per_token", ["ep=4", "tp=2", *TWO_BATCHES]),
        ("per_token", ["ep=2", "shared_experts=dispatched", "placement.num_redundant_experts=3"]),
        ("per_token", ["ep=2", "launcher=process"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:3]),
)
def test_windows_hold_the_whole_load(folder: Path, tmp_path: Path, mode: str, words: list[str]) -> None:
    trace = record(folder, tmp_path / "t", mode, *words)
    extra = "shared_experts=dispatched" in words
    assert trace.loads.shape[1:] == (NUM_MOE_LAYERS, NUM_EXPERTS + extra)
    assert trace.rank_loads.shape[1:] == (NUM_MOE_LAYERS, trace.header.ep)
    assert int(trace.num_tokens.sum()) == NUM_TOKENS
    per_layer = trace.num_tokens.unsqueeze(1).expand(-1, NUM_MOE_LAYERS) * (TOP_K + extra)
    assert torch.equal(trace.loads.sum(2), per_layer), "no padding is counted"
    assert torch.equal(trace.rank_loads.sum(2), per_layer)
    if mode == "per_pass":
        assert trace.window_steps.tolist() == [1] * trace.num_windows
        assert torch.equal(trace.first_step, trace.last_step)
        assert (trace.first_step.diff() > 0).all()
    else:
        ends = trace.last_step.tolist()
        assert all(steps <= 3 for steps in trace.window_steps.tolist()) and ends == sorted(ends)
    if mode == "per_token":
        assert torch.equal(routed_loads(trace), trace.loads), "routes replayed give the recorded loads"
        assert len(trace.routes) == NUM_TOKENS
    else:
        assert len(trace.routes) == 0


def test_phases_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """Two steps with prompt tokens, then decode steps; a window of three has both, in two rows."""
    trace = record(folder, tmp_path / "t", "stat", "ep=2", "engine.max_num_batched_tokens=16")
    assert trace.phases[:2] == ("mixed", "decode")
    assert trace.window_steps[:2].tolist() == [2, 1]
    assert int(trace.of_phase("mixed").num_tokens.sum()) >= sum(map(len, PROMPTS))
    assert trace.of_phase("decode").num_tokens.tolist() == [4, 12, 1], "the long prompt's output ends a step later"


def test_each_token_of_each_request_is_there_once(folder: Path, tmp_path: Path) -> None:
    trace = record(folder, tmp_path / "t", "per_token", "ep=4", "tp=2", "engine.batch_invariant=true")
    seen = sorted(zip(trace.request.tolist(), trace.position.tolist(), strict=True))
    assert seen == [(r, p) for r, prompt in enumerate(PROMPTS) for p in range(len(prompt) + LENGTH - 1)]
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    assert torch.equal(trace.is_prompt, trace.position < lengths[trace.request])
    groups: dict[int, set[int]] = {request: set() for request in range(len(PROMPTS))}
    for request, home in zip(trace.request.tolist(), trace.home.tolist(), strict=True):
        groups[request].add(home // 2)
    assert all(len(own) == 1 for own in groups.values()), "a request lives in one DP group"
    alone = record(folder, tmp_path / "alone", "per_token", "ep=1", "engine.batch_invariant=true")
    assert torch.equal(by_token(trace), by_token(alone)), "where a token runs does not change its experts"


def by_token(trace: Trace) -> torch.Tensor:
    """Routes in the order of request and position."""
    return trace.routes[torch.argsort(trace.request * 1000 + trace.position)]


def test_cached_tokens_have_no_routes_and_recomputed_ones_two(folder: Path, tmp_path: Path) -> None:
    prompt, words = [5, 6, 7, 8] * 4, ["ep=1", "engine.page_size=4", "engine.prefix_caching=true"]
    trace = record(folder, tmp_path / "cached", "per_token", *words, prompts=[prompt], length=2)
    assert sorted(trace.position.tolist()) == [*range(16), 16]
    with LLM(
        str(folder),
        overrides=[*WORDS, *words, "balance.record=per_token", f"balance.trace={tmp_path / 'twice'}"],
    ) as llm:
        llm.generate([prompt], greedy(2))
        llm.generate([prompt], greedy(2))
    again = read_trace(tmp_path / "twice")
    assert sorted(again.position[again.request == 1].tolist()) == [*range(12, 17)], "three pages were cached"
    pages = ["ep=1", "engine.page_size=4", "engine.kv_cache_bytes=7KiB", "engine.max_model_len=24"]
    preempted = record(folder, tmp_path / "few", "per_token", *pages, prompts=[[5] * 8, [6] * 8], length=12)
    key = preempted.request * 1000 + preempted.position
    assert len(set(key.tolist())) == 2 * (8 + 12 - 1) < len(key), "what was recomputed was routed again"
    assert torch.equal(routed_loads(preempted), preempted.loads)


@pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
def test_captured_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters and routes are written at fixed addresses: each replay adds to them and nothing is left out."""
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    monkeypatch.setattr(launch_graphs, "graph_api", lambda device: RecordedGraphs())
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 16}
    model = write_tiny(tmp_path / "model", text=False, max_position_embeddings=64, **sizes)
    words = ["dispatch=all_gather", "ep=2", "engine.cuda_graph_sizes=[2]", "engine.max_num_seqs=2"]
    words += ["engine.page_size=4", "engine.max_model_len=32", "engine.kv_cache_bytes=1MiB"]
    words += ["balance.record=per_token", f"balance.trace={tmp_path / 't'}"]
    with LLM(str(model), overrides=[*WORDS, *words]) as llm:
        llm.generate([[5, 6, 7], [9], [8]], greedy(3))
        report, snapshot = llm.load_report(), llm.snapshot()
    assert snapshot.graphs.replays >= 2 and snapshot.num_eager_decode_steps == 0
    trace = read_trace(tmp_path / "t")
    assert torch.equal(trace.total_loads, report.expert_load)
    assert torch.equal(trace.total_rank_loads, report.rank_load)
    assert torch.equal(routed_loads(trace), trace.loads)
    assert len(trace.routes) == 5 + 3 * 2
    assert {"decode", "mixed"} == set(trace.phases)


def test_a_window_ends_early_where_it_takes_too_much(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_recording, "_WINDOW_BYTES", 300)
    trace = record(folder, tmp_path / "t", "per_token", "ep=2", "balance.window_steps=100")
    assert trace.num_windows > 3 and torch.equal(routed_loads(trace), trace.loads)


def test_idle_steps_are_no_part_of_a_window(folder: Path, tmp_path: Path) -> None:
    words = [*WORDS, "ep=2", f"balance.trace={tmp_path / 't'}"]
    with LLM(str(folder), overrides=words) as llm:
        llm.generate([[5]], greedy(3))
        wait_until_idle(llm)
        llm.load_report()  # takes idle steps
        llm.load_report()
        llm.generate([[5]], greedy(3))
    trace = read_trace(tmp_path / "t")
    assert int(trace.window_steps.sum()) == 6 == int(trace.num_tokens.sum())
    assert int(trace.last_step[-1]) > 6


def test_a_full_disk_ends_the_trace_and_not_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = TraceWriter.add
    calls: list[int] = []

    def full(writer: TraceWriter, windows: object, tokens: object = None, changes: object = ()) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        add(writer, windows, tokens, changes)  # type: ignore[arg-type]
        writer.flush()

    monkeypatch.setattr(TraceWriter, "add", full)
    with LLM(str(folder), overrides=[*WORDS, "ep=2", f"balance.trace={tmp_path / 't'}"]) as llm:
        outputs = llm.generate([[5], [6]], greedy(12))
        window = llm.snapshot().window
        for _ in range(200):  # it is written beside the steps, so a later window tells
            if window is not None and window.trace_error is not None:
                break
            llm.generate([[5]], greedy(4))
            window = llm.snapshot().window
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 12]
    assert window is not None and window.trace_error is not None
    assert "the trace ended at step" in window.trace_error and "No space left" in window.trace_error
    trace = read_trace(tmp_path / "t")
    assert len(calls) == 2 and not trace.header.complete and int(trace.window_steps.sum()) == 3


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes of the other ranks."""
    found: list[subprocess.Popen[bytes]] = []
    wait = process.Children.wait_until_ready

    def started(own: process.Children) -> None:
        found.extend(own._processes)
        wait(own)

    monkeypatch.setattr(process.Children, "wait_until_ready", started)
    return found


@pytest.mark.parametrize(("launcher", "patience"), [("virtual", 0.5), ("process", 2)])
def test_a_disk_that_hangs_holds_no_step_up(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    children: list[subprocess.Popen[bytes]],
    launcher: str,
    patience: float,
) -> None:
    """For longer than ranks wait for each other, and so does the end, when they have gone."""
    go, write = threading.Event(), files.write_atomic

    def hang(file: Path, data: bytes) -> None:
        if file.name != "trace.json":
            go.wait(60)
        write(file, data)

    monkeypatch.setattr(trace_writer, "write_atomic", hang)
    monkeypatch.setattr(trace_writer, "PART_SECONDS", 0.0)
    if launcher == "virtual":
        monkeypatch.setattr(snapshot_file, "write_atomic", hang)
    monkeypatch.setattr(launch_recording, "_DISK_WAIT_S", patience + 0.5)
    words = [*WORDS, "ep=2", f"launcher={launcher}", f"comm_timeout_s={patience}", f"balance.trace={tmp_path / 't'}"]
    with LLM(str(folder), overrides=words) as llm:
        began = time.monotonic()
        while time.monotonic() - began < patience + 0.3:
            assert llm.generate([[5], [6]], greedy(12))[0].finished
        window, began = llm.snapshot().window, time.monotonic()
    assert time.monotonic() - began < 20, "at most `_DISK_WAIT_S` for the trace, and for the snapshot"
    assert [child.returncode for child in children] == [0] * (launcher == "process"), "rank 1 has ended well"
    assert window is not None and window.trace_error is None and not read_trace(tmp_path / "t").header.complete
    assert f"balance.trace: not all was written within {patience + 0.5:g} s of the run's end" in caplog.text
    assert launcher != "virtual" or "the last snapshot was not written: not within 1 s" in caplog.text
    go.set()
    until = time.monotonic() + 30
    while not read_trace(tmp_path / "t").header.complete and time.monotonic() < until:
        time.sleep(0.05)
    trace = read_trace(tmp_path / "t")
    assert trace.header.complete and int(trace.last_step[-1]) >= window.last_step, "the thread went on"


def test_other_ranks_hear_of_a_failure_before_the_disk_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[subprocess.Popen[bytes]]
) -> None:
    go, ended = threading.Event(), list[int | None]()
    close, flush = TraceThread.close, TraceWriter.flush

    def watched(trace: TraceThread) -> None:
        close(trace)
        ended.extend([child.poll() for child in children])

    def hang(writer: TraceWriter) -> None:
        go.wait(60)
        flush(writer)

    def broken(engine: RankEngine, *args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(TraceThread, "close", watched)
    monkeypatch.setattr(TraceWriter, "flush", hang)
    monkeypatch.setattr(RankEngine, "_sample", broken)
    monkeypatch.setattr(launch_recording, "_DISK_WAIT_S", 2.5)
    words = [*WORDS, "ep=2", "launcher=process", f"balance.trace={tmp_path / 't'}"]
    with LLM(str(folder), overrides=words) as llm, pytest.raises(EngineClosedError, match="broken"):
        llm.generate([[5], [6]], greedy(12))
    go.set()
    assert ended == [process.EXIT_TOLD], "rank 1 has been told, and has left"


def test_what_a_failed_run_had_recorded_stays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = RankEngine._sample

    def failing(engine: RankEngine, *args: object) -> object:
        if engine._step == 4:
            raise RuntimeError("broken")
        return sample(engine, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RankEngine, "_sample", failing)
    with LLM(str(folder), overrides=[*WORDS, "ep=2", f"balance.trace={tmp_path / 't'}"]) as llm:
        with pytest.raises(EngineClosedError):
            llm.generate([[5], [6]], greedy(12))
    trace = read_trace(tmp_path / "t")
    assert int(trace.window_steps.sum()) == 3 and not trace.header.complete
    assert read_snapshot(tmp_path / "t" / "snapshot.json")["engine"]["state"] == "failed"


def test_the_snapshot_file_follows_the_engine(folder: Path, tmp_path: Path) -> None:
    """Without a trace too; a reader sees one whole document or another."""
    file = tmp_path / "run" / "now.json"
    with LLM(str(folder), overrides=[*WORDS, "ep=4", "tp=2", f"snapshot_file={file}"]) as llm:
        llm.generate(PROMPTS, greedy(LENGTH))
        while not file.exists():
            time.sleep(0.01)
        first = read_snapshot(file)
        assert first["engine"]["state"] == "running"
        assert first["run"]["num_logical"] == NUM_EXPERTS and first["run"]["record"] == "stat"
        assert first["engine"]["mesh"] == {"pp": 1, "dp": 2, "tp": 2, "rank": 0, "ranks_per_node": 8}
        seen = llm.snapshot()
        assert seen.window is not None
    last = read_snapshot(file)
    assert last["engine"]["state"] == "closed" and last["engine"]["num_output_tokens"] == 4 * LENGTH
    window = last["window"]
    assert len(window["expert_load"]) == len(window["rank_load"]) == NUM_MOE_LAYERS
    assert sum(window["rank_load"][0]) == sum(window["expert_load"][0]) == window["num_tokens"] * TOP_K
    assert window["trace_error"] is None
    assert sorted(path.name for path in file.parent.iterdir()) == ["now.json"], "no draft is left"


def test_snapshot_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "is no snapshot"),
        (json.dumps({"format": "moe_runtime.snapshot", "version": 9}), "version=9; this program reads version 1"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_snapshot(file)
    with pytest.raises(ConfigError, match="Give the snapshot_file of a running engine"):
        read_snapshot(tmp_path / "none.json")
    for place, message in (
        (tmp_path, "must be a file, not a folder"),
        (file / "s", "cannot be written: .*another path"),
    ):
        with pytest.raises(ConfigError, match=f"snapshot_file='{place}': {message}"):
            snapshot_file.SnapshotFile(place, {}, within_s=1.0)


def test_off_counts_nothing(folder: Path) -> None:
    words = [word for word in WORDS if not word.startswith("balance.")]
    with LLM(str(folder), overrides=[*words, "ep=2", "balance.record=off"]) as llm:
        assert llm.generate([[5, 6]], greedy(3))[0].finished
        assert llm.snapshot().window is None
        with pytest.raises(ConfigError, match=r"balance.record=off: no loads are counted. Set balance.record=stat"):
            llm.expert_load()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["balance.record=per_token"], r"balance.record=per_token: goes to a trace, .*Set balance.trace=FOLDER"),
        (["balance.record=off", "balance.trace=FRESH"], r"balance.record=off: nothing would be in it"),
        (["balance.trace=USED"], r"balance.trace='.*' holds a trace already: one folder, one trace"),
        (["balance.trace=FRESH", "balance.trace_bytes=1000"], r"must hold four steps .*Nearest: balance.trace_bytes="),
        (
            ["balance.trace=FRESH", "balance.record=per_token", "balance.trace_bytes=32KiB"],
            r"balance.trace_bytes=32768: must hold .*lower engine.max_num_batched_tokens",
        ),
        (["balance.record=all"], r"balance.record=all: must be one of off, stat, per_pass, per_token"),
    ],
    ids=["no trace", "off", "used", "small", "small per token", "unknown"],
)
def test_bad_settings_are_told_before_anything_loads(
    folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "trace.json").write_text("{}")
    places = {"FRESH": str(tmp_path / "fresh"), "USED": str(tmp_path / "used")}
    words = [word.replace("FRESH", places["FRESH"]).replace("USED", places["USED"]) for word in words]
    with pytest.raises(ConfigError, match=message):
        compose([f"model={folder}", "ep=2", *words])
