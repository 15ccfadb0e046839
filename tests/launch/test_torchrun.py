"""launcher=torchrun: one rank per process of a torchrun world, also over two nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_runtime import LLM
from tests.api.tiny import damage, greedy, tokens, write_tiny
from tests.launch.processes import children, descendants, finish, wait_gone

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43], [3, 3], [200, 100]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "my prompts,v2.jsonl"
    file.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in PROMPTS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with LLM(str(folder), ep=1, overrides=["dtype=float32"]) as llm:
        return [list(ids) for ids in tokens(llm.generate(PROMPTS, greedy(12)))]


def torchrun(arguments: Sequence[str], *, num_processes: int, node: Sequence[str] = ()) -> subprocess.Popen[str]:
    """An agent with its ranks. `node`: how it finds the other nodes; else it is the only one."""
    words = [f"--nproc-per-node={num_processes}", *(node or ["--standalone"]), *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def generate(folder: Path, prompts: Path, output: Path) -> list[str]:
    words = ["dtype=float32", "sampling.max_tokens=12", "sampling.ignore_eos=true", "comm_timeout_s=600"]
    return ["-m", "moe_runtime", f"model={folder}", f"prompts={prompts}", f"output={output}", *words]


def written(output: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in output.read_text(encoding="utf-8").splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_four_processes_same_tokens_as_one(
    folder: Path, prompts: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    output = tmp_path / "out(1).jsonl"
    process = torchrun([*generate(folder, prompts, output), "ep=4", "tp=2"], num_processes=4)
    out, err = finish(process, within_s=120)
    assert process.returncode == 0, err
    assert written(output) == expected
    assert out.count("ep=4 = dp=2 × tp=2, 4 torchrun ranks") == 1
    assert out.count(f"wrote {output}") == 1
    assert out.count("loading ") == 1
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_two_nodes(folder: Path, prompts: Path, expected: list[list[int]], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    port = free_port()
    agents = []
    for rank in range(2):
        node = ["--nnodes=2", f"--node-rank={rank}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        words = [*generate(folder, prompts, output), "ep=4", "tp=2", "ranks_per_node=2"]
        agents.append(torchrun(words, num_processes=2, node=[*node, "--rdzv-id=test", "--local-addr=127.0.0.1"]))
    ended = [finish(agent, within_s=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    assert written(output) == expected
    assert sorted(out.count("ep=4 = dp=2 × tp=2") for out, _ in ended) == [0, 1], "rank 0 alone speaks"


SCRIPT = """
import os, sys, threading
from moe_runtime import LLM, SamplingParams, EngineClosedError
from tests.launch.processes import listening_addresses
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
for run in range(2):
    with LLM(sys.argv[1], overrides=["dtype=float32"]) as llm:
        assert llm.topology.ep == llm.topology.ranks_per_node == 2
        assert listening_addresses(os.getpid()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        outputs = llm.generate([[5, 6, 7]] if run else [[5, 6, 7], [9]], params)
        if llm.owns_requests:
            print(run, [list(o.outputs[0].token_ids) for o in outputs], int(llm.expert_load().sum()) > 0, flush=True)
        else:
            assert outputs == []
    try:
        llm.generate([5], params)
    except EngineClosedError:
        pass
    else:
        raise AssertionError("closed")
llm = LLM(sys.argv[1], overrides=["comm_timeout_s=600"])  # nobody generates, rank 1 never closes
if llm.owns_requests:
    llm.close()
"""


@pytest.mark.slow
def test_a_script_with_three_runs(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    process = torchrun([str(script), str(folder)], num_processes=2)
    out, err = finish(process, within_s=90)
    assert process.returncode == 0, err
    assert out.splitlines() == [f"0 {expected[:2]} True", f"1 {expected[:1]} True"]
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("damage", "experts.7.up_proj"),
        ("truncate", "model.safetensors"),
        ("word", "Did you mean 'ep'?"),
    ],
)
def test_bad_input_is_told_once(change: str, message: str, tmp_path: Path) -> None:
    broken = write_tiny(tmp_path / "model")
    words = [f"model={broken}", "comm_timeout_s=600"]
    match change:
        case "damage":
            damage(broken, "model.layers.1.mlp.experts.7.up_proj.weight")
        case "truncate":
            file = broken / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
        case "word":
            words.append("epp=2")
    began = time.monotonic()
    process = torchrun(["-m", "moe_runtime", *words], num_processes=2)
    _, err = finish(process, within_s=150)
    assert time.monotonic() - began < 120
    assert process.returncode != 0
    errors = [line for line in err.splitlines() if line.startswith(("ConfigError", "CheckpointError"))]
    assert len(errors) == 1, err
    assert message in errors[0]


@pytest.mark.slow
def test_a_rank_that_is_killed(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [5, 6]}\n' * 4000, encoding="utf-8")
    words = [f"model={folder}", f"prompts={prompts}", "sampling.max_tokens=200", "comm_timeout_s=600"]
    process = torchrun(["-m", "moe_runtime", *words], num_processes=3)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("generating"):
        assert line, process.stderr.read() if process.stderr else ""
    ranks = [pid for pid in children(process.pid) if b"moe_runtime" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 3
    everybody = descendants(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    finish(process, within_s=100)
    assert process.returncode != 0
    wait_gone(everybody, within_s=1)
