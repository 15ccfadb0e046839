"""Offline throughput side by side with transformers: contenders load once and take turns, so drift hits all alike."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from moe_tools.bench.record import append_record


@dataclass(slots=True)
class Contender:
    """A process of `moe_tools.bench.contender` and what it measured."""

    name: str
    arguments: Sequence[str]
    launcher: Sequence[str] = ()
    process: subprocess.Popen[str] | None = None
    rows: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        command = [*(self.launcher or (sys.executable,)), "-m", "moe_tools.bench.contender", *self.arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def turn(self, *, counted: bool) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        row = self._answer()
        if counted:
            self.rows.append(row)

    def end(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(timeout=60)

    def _answer(self) -> dict[str, float]:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("BENCH "):
                answer: dict[str, float] = json.loads(line.removeprefix("BENCH "))
                return answer
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()} before it answered")

    @property
    def speed(self) -> list[float]:
        """Tokens/s of each counted turn."""
        return [row["tokens"] / row["seconds"] for row in self.rows]


def contenders(args: argparse.Namespace) -> list[Contender]:
    """ep=1: one process each, all experts implementations. ep=2 …: gloo processes, transformers' own EP."""
    common = ["--model", str(args.model), "--dtype", args.dtype]
    common += ["--prompts", str(args.prompts), "--prompt-tokens", str(args.prompt_tokens)]
    common += ["--new-tokens", str(args.new_tokens)]
    if args.ep == 1:
        mine = ["moe_runtime", *common, "--threads", str(args.threads)]
        found = [Contender("moe_runtime", mine)]
        for experts in args.experts:
            theirs = ["transformers", *common, "--threads", str(args.threads), "--experts", experts]
            found.append(Contender(f"transformers {experts}", theirs))
        return found
    threads = str(max(1, args.threads // args.ep))
    mine = ["moe_runtime", *common, "--threads", threads, "--override", f"ep={args.ep}"]
    mine += ["--override", "launcher=process", "--override", f"dispatch={args.dispatch}"]
    theirs = ["transformers", *common, "--threads", threads, "--ep", str(args.ep), "--experts", args.experts[0]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ep)]
    return [
        Contender(f"moe_runtime ep={args.ep}", mine),
        Contender(f"transformers ep={args.ep} all_to_all", theirs, torchrun),
    ]


def main(argv: Sequence[str]) -> None:
    """Print a table and append one JSON line per contender."""
    parser = argparse.ArgumentParser(prog="python -m moe_tools.bench throughput", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads in all")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "batched_mm", "eager"])
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--dispatch", default="all_to_all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    args = parser.parse_args(argv)
    runners = contenders(args)
    try:
        for runner in runners:
            runner.start()
        for turn in range(args.repeats + 1):
            for runner in runners:
                runner.turn(counted=turn > 0)
    finally:
        for runner in runners:
            runner.end()
    _report(runners, args)


def _report(runners: list[Contender], args: argparse.Namespace) -> None:
    base = statistics.median(runners[0].speed)
    print(f"{args.model}: {args.prompts} x {args.prompt_tokens} + {args.new_tokens} tokens, {args.dtype}, ", end="")
    print(f"{args.threads} threads, torch {version('torch')}, transformers {version('transformers')}")
    for runner in runners:
        speed = statistics.median(runner.speed)
        ratios = [a / b for a, b in zip(runners[0].speed, runner.speed, strict=True)]
        print(
            f"{runner.name:34s} {speed:9.1f} tok/s  [{min(runner.speed):.1f}, {max(runner.speed):.1f}]  "
            f"ours/this {base / speed:5.2f} (pairs {min(ratios):.2f}-{max(ratios):.2f})  "
            f"cpu {statistics.median(row['cpu_seconds'] for row in runner.rows):.2f} s"
        )
        if args.output is not None:
            append_record(
                args.output,
                bench="throughput",
                contender=runner.name,
                model=args.model.name,
                dtype=args.dtype,
                threads=args.threads,
                ep=args.ep,
                prompts=args.prompts,
                prompt_tokens=args.prompt_tokens,
                new_tokens=args.new_tokens,
                tokens_per_s=runner.speed,
                median_tokens_per_s=speed,
                ours_over_this=base / speed,
            )
