"""What this machine can run of the dispatch fabrics, on one GPU.

    python -m moe_tools.bench fabric [--only NAME …] [--dry-run] [--record docs/measurements/gpu.jsonl]

Each part is a process with a deadline; one that fails or hangs does not stop the others. The exit code is 0 where
nothing failed and something ran, 1 otherwise. --dry-run measures nothing and says what would be skipped, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch

from moe_runtime.launch.env import child_environment
from moe_tools.bench.fabric.child import MEASURED, SKIPPED
from moe_tools.bench.fabric.parts import Measured, Part, no_gpu, parts
from moe_tools.bench.record import append_record

BUDGET_S: Final = 450.0
"""For all parts together: below 8 minutes."""
_SHOWN_LINES: Final = 25
"""Of a failed part's output."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part."""

    state: Literal["ran", "skipped", "failed"]
    why: str
    measured: tuple[Measured, ...] = ()
    output: str = ""


def main(arguments: Sequence[str]) -> None:
    """Run the parts one after the other; a table, a JSON line per measurement and one per part."""
    names = [part.name for part in parts()]
    parser = argparse.ArgumentParser(
        prog="python -m moe_tools.bench fabric", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    parser.add_argument("--record", type=Path, default=Path("docs/measurements/gpu.jsonl"))
    options = parser.parse_args(arguments)
    chosen = [part for part in parts() if part.name in options.only]
    if options.dry_run:
        for part in chosen:
            why = part.obstacle()
            print(f"{part.name:<14}" + (f"would be skipped: {why}" if why else f"would run, {part.deadline_s:.0f} s"))
        return
    end, outcomes = time.monotonic() + BUDGET_S, []
    for part in chosen:
        left = end - time.monotonic()
        outcome = Outcome("skipped", f"{BUDGET_S:.0f} s for all parts are spent") if left < 1 else run(part, left)
        outcomes.append(outcome)
        show(part, outcome)
        record(options.record, part, outcome)
    sys.exit(verdict(outcomes))


def verdict(outcomes: Sequence[Outcome]) -> str | None:
    """What ends the program with exit code 1, or None."""
    if failed := sum(outcome.state == "failed" for outcome in outcomes):
        return f"bench fabric: {failed} of {len(outcomes)} parts failed"
    if not any(outcome.state == "ran" for outcome in outcomes):
        return f"bench fabric: nothing ran ({no_gpu() or 'see above'})"
    return None


def run(part: Part, left_s: float) -> Outcome:
    """The part in a process of its own, which ends by its deadline, or when this process does."""
    deadline = min(part.deadline_s, left_s)
    ours, theirs = os.pipe()
    command = [sys.executable, "-P", "-m", "moe_tools.bench.fabric.child", part.name]
    try:
        process = subprocess.Popen(
            command, stdin=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**child_environment(), **part.environment}, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(ours)
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        return replace(outcome_of(output, 0), state="failed", why=f"not done in {deadline:.0f} s", output=output)
    finally:
        _kill(process)
        os.close(theirs)
    return outcome_of(output, process.returncode)


def _kill(process: subprocess.Popen[str]) -> None:
    """The child with the processes that it has started: they are one session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def outcome_of(output: str, code: int) -> Outcome:
    """What a child said, and with which exit code it ended."""
    measured, rest = [], []
    for line in output.splitlines():
        if line.startswith(SKIPPED):
            return Outcome("skipped", line.removeprefix(SKIPPED))
        if line.startswith(MEASURED):
            measured.append(Measured(**json.loads(line.removeprefix(MEASURED))))
        else:
            rest.append(line)
    text = "\n".join(rest)
    if code:
        last = next((line.strip() for line in reversed(rest) if line.strip()), "no output")
        return Outcome("failed", f"exit code {code}: {last}", tuple(measured), text)
    return Outcome("ran", "", tuple(measured), text)


def show(part: Part, outcome: Outcome) -> None:
    """Print what became of it."""
    print(f"{part.name}: {outcome.state}{': ' if outcome.why else ''}{outcome.why}", flush=True)
    for found in outcome.measured:
        shape = " ".join(f"{key}={value}" for key, value in found.shape.items())
        rate = f"{found.bytes_per_s / 1e9:9.2f} GB/s" if found.bytes else ""
        text = f"  {found.op:<34}{shape:<34}{found.us:10.1f} µs [{found.low_us:.1f}, {found.high_us:.1f}] {rate}"
        print(text + ("" if not found.checked else f"  {found.checked}"), flush=True)
    if outcome.state == "failed":
        for line in outcome.output.splitlines()[-_SHOWN_LINES:]:
            print(f"  | {line}", flush=True)


def record(path: Path, part: Part, outcome: Outcome) -> None:
    """A line per measurement, or one that says why there is none. Nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return
    shared = {"benchmark": "fabric", "part": part.name, "device": torch.cuda.get_device_name()}
    for found in outcome.measured:
        append_record(path, **shared, state="ran", bytes_per_s=found.bytes_per_s, **asdict(found))
    if outcome.state != "ran":
        append_record(path, **shared, state=outcome.state, why=outcome.why)
