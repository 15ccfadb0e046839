"""What recording loads costs: CPU time in the recorder over CPU time in steps, on the demo model, on one thread.

CPU time, since a machine that others use too stops a thread now and then, and a recorder's call takes microseconds. The
clock's own time is taken off.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from moe_runtime import LLM, SamplingParams
from moe_runtime.balance.load import LoadRecorder
from moe_runtime.engine.recording import Recording
from moe_runtime.engine.snapshot_file import SnapshotFile
from moe_runtime.engine.trace_thread import TraceThread
from moe_tools.bench.record import append_record

_TIMED = (
    (LoadRecorder, "record"),
    (LoadRecorder, "record_received"),
    (Recording, "after"),
    (SnapshotFile, "offer"),
    (SnapshotFile, "_write"),
    (TraceThread, "_do"),
)


@dataclass(slots=True)
class Clock:
    """CPU seconds and calls in what is watched."""

    seconds: float = 0.0
    calls: int = 0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began
                self.calls += 1

        return timed


def clock_seconds() -> float:
    """What a watched call of nothing takes."""
    clock = Clock()
    nothing = clock.watch(lambda: None)
    for _ in range(20_000):
        nothing()
    return clock.seconds / clock.calls


@contextmanager
def watched() -> Iterator[Clock]:
    """The clock of everything that records."""
    clock = Clock()
    with ExitStack() as patches:
        for owner, name in _TIMED:
            patches.enter_context(mock.patch.object(owner, name, clock.watch(getattr(owner, name))))
        yield clock


def measure(
    words: Sequence[str], *, num_prompts: int, num_tokens: int, repeats: int, traced: bool
) -> dict[str, float | int]:
    """µs per step, µs per call and the share in per cent, of the fastest of `repeats` batches."""
    prompts = [[5 + number, 6, 7, 8, 9, 10] for number in range(num_prompts)]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    rows: list[tuple[float, float, float]] = []
    own = clock_seconds()
    with tempfile.TemporaryDirectory() as folder, watched() as clock:
        trace = [f"balance.trace={Path(folder) / 'trace'}"] if traced else []
        with LLM("demo", overrides=[*words, *trace, "engine.prefix_caching=false"]) as llm:
            llm.generate(prompts, params)
            for _ in range(repeats):
                before, began, seconds, calls = llm.num_steps, time.process_time(), clock.seconds, clock.calls
                llm.generate(prompts, params)
                busy, steps, count = time.process_time() - began, llm.num_steps - before, clock.calls - calls
                spent = clock.seconds - seconds - own * count
                rows.append((1e6 * busy / steps, 1e6 * spent / count, 100 * spent / busy))
    step, call, share = min(rows)
    return {"step_us": step, "call_us": call, "share_percent": share, "calls_per_step": count // steps}


def main(words: Sequence[str]) -> None:
    """Print a table and append it to the measurements."""
    parser = argparse.ArgumentParser(prog="python -m moe_tools.bench recorder", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("docs/measurements/cpu.jsonl"))
    args = parser.parse_args(words)
    cases = [("stat", False, ep, n) for ep, n in ((1, 1), (1, 16), (1, 64), (8, 16))]
    cases += [(mode, True, 1, 16) for mode in ("stat", "per_pass", "per_token")]
    print("record      trace   ep  sequences   step µs  recorder µs/call  share of step")
    for mode, traced, ep, count in cases:
        row = measure(
            [f"balance.record={mode}", f"ep={ep}", "num_threads=1"],
            num_prompts=count,
            num_tokens=args.new_tokens,
            repeats=args.repeats,
            traced=traced,
        )
        print(
            f"{mode:<10}  {'yes' if traced else 'no':<5}  {ep:>3}  {count:>9}  {row['step_us']:>8.0f}  "
            f"{row['call_us']:>16.2f}  {row['share_percent']:>11.2f} %"
        )
        append_record(args.output, benchmark="recorder", record=mode, traced=traced, ep=ep, sequences=count, **row)
