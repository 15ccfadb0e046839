"""`bench fabric`: what it says without a GPU, how parts end, and what its checks are worth."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_tools.bench.fabric import clock, steps, symmetric
from moe_tools.bench.fabric import run as fabric
from moe_tools.bench.fabric.child import MEASURED, SKIPPED
from moe_tools.bench.fabric.exercise import Shape, Work, scaled_by_slot
from moe_tools.bench.fabric.parts import WHEELS, Measured, Part, parts
from moe_tools.bench.fabric.run import Outcome, outcome_of, run, verdict
from moe_tools.bench.fabric.shared import SharedMemory

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.process import host_store
from moe_runtime.dispatch.base import Layout, PaddedRows, Phase
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.nvshmem.device import DeviceDispatcher
from moe_runtime.launch.env import child_environment
from tests.dispatch.test_contract import on_ranks

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
NAMES = ["nccl", "symmetric-2", "symmetric-4", "steps", "nvshmem", "torch-splits", "deep_ep"]
PUT = Measured("put", 2.0, 1.0, 3.0, 8000, {"bytes": 8000})


def part(name: str, deadline_s: float = 30.0) -> Part:
    return replace(next(one for one in parts() if one.name == name), deadline_s=deadline_s)


@NO_GPU
def test_a_dry_run_names_every_part_and_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    fabric.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all("would be skipped: " in line for line in lines)
    assert "needs a CUDA device" in lines[0]
    fabric.main(["--dry-run", "--only", "steps"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_all_parts_together_end_within_eight_minutes() -> None:
    assert fabric.BUDGET_S < 8 * 60
    assert sum(one.deadline_s for one in parts()) < fabric.BUDGET_S + 60


@NO_GPU
def test_a_part_that_cannot_run_is_skipped_and_nothing_is_recorded(tmp_path: Path) -> None:
    outcome = run(part("nccl"), 60.0)
    assert (outcome.state, outcome.measured) == ("skipped", ())
    assert "needs a CUDA device" in outcome.why
    fabric.record(tmp_path / "gpu.jsonl", part("nccl"), outcome)
    assert not (tmp_path / "gpu.jsonl").exists()
    assert verdict([outcome, outcome]) is not None


def test_a_part_that_takes_too_long_has_failed() -> None:
    outcome = run(part("nccl", deadline_s=0.05), 60.0)
    assert (outcome.state, outcome.why) == ("failed", "not done in 0 s")


def test_a_child_ends_with_its_parent() -> None:
    code = "import time; from moe_tools.bench.fabric.child import watch_parent; watch_parent(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, env=child_environment())
    assert child.stdin is not None
    child.stdin.close()
    try:
        assert child.wait(timeout=30) == 1
    finally:
        child.kill()


def test_outcomes_are_read_from_what_a_child_says() -> None:
    lines = ["a library talks", MEASURED + json.dumps(asdict(PUT))]
    assert outcome_of("\n".join(lines), 0) == Outcome("ran", "", (PUT,), "a library talks")
    assert outcome_of(SKIPPED + "no wheels\n", 0) == Outcome("skipped", "no wheels")
    failed = outcome_of("\n".join([*lines, "Traceback", "ValueError: 5", ""]), 1)
    assert (failed.state, failed.why, failed.measured) == ("failed", "exit code 1: ValueError: 5", (PUT,))
    assert outcome_of("", -9).why == "exit code -9: no output"


def test_the_exit_code() -> None:
    ran, skipped, failed = (Outcome(state, "") for state in ("ran", "skipped", "failed"))
    assert verdict([ran, skipped]) is None
    assert "1 of 3 parts failed" in str(verdict([ran, skipped, failed]))
    assert "nothing ran" in str(verdict([skipped]))


def test_what_is_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    file, one = tmp_path / "gpu.jsonl", part("nvshmem")
    outcomes = [Outcome("ran", "", (PUT,)), Outcome("failed", "exit code 1: oh", output="a\nb")]
    for outcome in outcomes:
        fabric.show(one, outcome)
        fabric.record(file, one, outcome)
    text = capsys.readouterr().out
    assert "nvshmem: ran" in text and "4.00 GB/s" in text
    assert "nvshmem: failed: exit code 1: oh\n  | a\n  | b" in text
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["state"] for row in rows] == ["ran", "failed"]
    assert rows[0]["bytes_per_s"] == 4e9 and rows[0]["device"] == "NVIDIA H200" and rows[0]["us"] == 2.0


SMALL = Shape(Phase.MIXED, tokens=5, hidden=16, top_k=2, slots=4)


def test_dispatchers_are_compared_with_local() -> None:
    def program(ep: Communicator) -> list[str]:
        said = []
        for name in ("all_to_all", "all_gather"):
            for layout in Layout:
                spec = SMALL.spec
                spec = replace(spec, rows=replace(spec.rows, layout=layout))
                said.append(Work.random(SMALL, "cpu").check(make_dispatcher(name, ep, spec)))
        return said

    (said,) = on_ranks(1, program)
    assert isinstance(said, list)
    assert said[:2] == ["bits of local"] * 2 and all("away from local" in text for text in said[2:])


@dataclass(frozen=True)
class OneRowOff:
    """Gives the last token another result."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def combine_begin(self, y: torch.Tensor, handle: Any) -> Any:
        y = y.clone()
        y[0] += 1
        return self.inner.combine_begin(y, handle)


@pytest.mark.parametrize("name", ["all_to_all", "all_gather"])
def test_a_wrong_dispatcher_is_seen(name: str) -> None:
    def program(ep: Communicator) -> None:
        with pytest.raises(AssertionError, match="local"):
            Work.random(SMALL, "cpu").check(OneRowOff(make_dispatcher(name, ep, SMALL.spec)))

    on_ranks(1, program)


def test_every_slot_has_its_own_factor() -> None:
    rows = PaddedRows(torch.ones(3, 2, 4), torch.tensor([2, 1, 0], dtype=torch.int32), weights=torch.full((3, 2), 2.0))
    assert scaled_by_slot(rows)[:, 0, 0].tolist() == [2.0, 2.0625, 2.125]


def test_parts_but_the_steps_need_no_wheels() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(('greenlet', 'hydra', 'omegaconf', 'safetensors')));"
    code = block + "from moe_tools.bench.fabric import exercise, run, symmetric; import moe_runtime.dispatch.symm_mem"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60, env=child_environment())


class FakeMemory:
    """torch's symmetric memory of one process, on the CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def set_backend(self, name: str) -> None:
        assert name == "CUDA"

    def empty(self, *size: int, dtype: torch.dtype, device: object) -> torch.Tensor:
        self.buffer = torch.full(size, 7, dtype=dtype)
        return self.buffer

    def rendezvous(self, tensor: torch.Tensor, group: object) -> FakeMemory:
        handle = FakeMemory()
        handle.buffer, handle.calls = tensor, self.calls
        return handle

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.buffer[: shape[0]].view(dtype)

    def put_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
        self.calls.append(f"put {rank} {channel}")

    def wait_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
        self.calls.append(f"wait {rank} {channel}")

    def barrier(self, channel: int, timeout_ms: int) -> None:
        self.calls.append("barrier")


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return 0.002


@NO_GPU
def test_the_program_of_processes_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process and everything on the CPU: its own order, what it compares, what it says."""
    memory = FakeMemory()
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    monkeypatch.setattr(symmetric, "import_module", lambda name: memory)
    monkeypatch.setattr(symmetric, "DEVICE", "cpu")
    monkeypatch.setattr(symmetric, "SIZES", (8, 1024))
    small = Shape(Phase.DECODE, tokens=2, hidden=8, top_k=1, slots=1, dtype=torch.float32)
    monkeypatch.setattr(symmetric, "DISPATCHED", small)
    for name, fake in (("Event", FakeEvent), ("synchronize", lambda: None), ("set_device", lambda device: None)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(clock, "TURNS", 1)
    monkeypatch.setattr(clock, "_WARMUPS", 0)
    found = list(symmetric.measure(0, 1, host_store(deadline_s=10.0)))
    copies = ["put into get_buffer", "get from get_buffer"] * 2
    assert [one.op for one in found] == [*copies, "signal and answer", "barrier", "dispatch, scale, combine"]
    assert found[2].bytes_per_s == 1024 / 2e-6 and found[-1].checked == "bits of local"
    assert memory.calls == ["put 0 0", "wait 0 1", "barrier"]


def test_symmetric_memory_offers_what_is_called() -> None:
    assert symmetric.lacks() is None


def test_virtual_steps_answer_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra")
    assert "greenlet" in WHEELS
    monkeypatch.setattr(steps, "NEW_TOKENS", 2)
    monkeypatch.setattr(steps, "TURNS", 1)
    found = steps.answers("device=cpu", "engine.cuda_graphs=off")
    assert [len(tokens) for tokens in found.tokens] == [2] * steps.RANKS
    assert len(found.step_us) == 1 and found.captures == 0
    assert steps.shuffled_bytes() == 3 * 64 * (128 * 6 + 64)


@dataclass(frozen=True)
class OneHeap:
    """Stands for torch's symmetric memory: the ranks' allocations, all in this process, in order."""

    ep: Communicator
    made: dict[int, list[torch.Tensor]]

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.made[self.ep.rank].append(torch.full((size,), 7, dtype=dtype))
        return self.made[self.ep.rank][-1]

    def rendezvous(self, tensor: torch.Tensor, group: object) -> Any:
        number = next(i for i, one in enumerate(self.made[self.ep.rank]) if one is tensor)
        self.ep.barrier()
        return OneHandle(number, self.made)


@dataclass(frozen=True)
class OneHandle:
    number: int
    made: dict[int, list[torch.Tensor]]

    def get_buffer(self, rank: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return self.made[rank][self.number].view(dtype).view(shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on CPU tensors")
def test_our_kernels_run_over_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    made: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    shape = Shape(Phase.DECODE, tokens=2, hidden=8, top_k=1, slots=1, dtype=torch.float32, ep=2)

    def program(ep: Communicator) -> str:
        library = SharedMemory(ep, OneHeap(ep, made), None, device="cpu")
        dispatcher = DeviceDispatcher(ep, shape.spec, library=library)
        work = Work.random(shape, "cpu", rank=ep.rank)
        said = work.check(dispatcher)
        dispatcher.close()
        return said

    assert on_ranks(2, program) == ["bits of local"] * 2
