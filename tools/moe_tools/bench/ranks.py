"""What a step costs at 1 … 1024 virtual ranks in one process: seconds per decode step and peak memory."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from moe_tools.bench.record import append_record


def measure(model: str, ep: int, *, prompts: int, new_tokens: int) -> dict[str, float]:
    """In this process: load, generate, and the median wall and CPU seconds of the decode steps."""
    started = time.perf_counter()
    from moe_runtime import LLM, SamplingParams

    with LLM(model, ep=ep, overrides=["engine.prefix_caching=false"]) as llm:
        loaded = time.perf_counter()
        stamps: list[tuple[float, float]] = []
        ids = [[7 + (11 * row + 3 * column) % 900 for column in range(16)] for row in range(prompts)]
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for _ in llm.stream(ids[0], params):
            stamps.append((time.perf_counter(), time.process_time()))
        alone = statistics.median(b[0] - a[0] for a, b in pairwise(stamps))
        before, cpu_before = time.perf_counter(), time.process_time()
        steps = llm.num_steps
        llm.generate(ids, params)
        elapsed, cpu = time.perf_counter() - before, time.process_time() - cpu_before
        steps = llm.num_steps - steps
    return {
        "ep": ep,
        "tp": llm.topology.tp,
        "load_s": loaded - started,
        "one_sequence_step_s": alone,
        "step_s": elapsed / steps,
        "step_cpu_s": cpu / steps,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(argv: Sequence[str]) -> None:
    """A fresh process per size, so that peak memory is its own."""
    parser = argparse.ArgumentParser(prog="python -m moe_tools.bench ranks", description=main.__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 8, 32, 64, 128, 320, 1024])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        print(json.dumps(measure(args.model, args.one, prompts=args.prompts, new_tokens=args.new_tokens)))
        return
    print(f"{args.prompts} prompts of 16 tokens, {args.new_tokens} new tokens")
    print("   ep  tp   load s   s/step (1 sequence)   s/step (all)   CPU s/step   µs/rank   peak MiB")
    for ep in args.ep:
        command = [sys.executable, "-m", "moe_tools.bench", "ranks", "--one", str(ep), "--model", args.model]
        command += ["--prompts", str(args.prompts), "--new-tokens", str(args.new_tokens)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(run.stdout.splitlines()[-1])
        print(
            f"{row['ep']:5d} {row['tp']:3d} {row['load_s']:8.2f} {row['one_sequence_step_s']:21.4f} "
            f"{row['step_s']:14.4f} {row['step_cpu_s']:12.4f} {row['step_cpu_s'] / ep * 1e6:9.0f} "
            f"{row['rss_mib']:10.0f}",
            flush=True,
        )
        if args.output is not None:
            append_record(args.output, bench="ranks", model=args.model, prompts=args.prompts, **row)
