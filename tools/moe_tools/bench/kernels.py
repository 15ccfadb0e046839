"""Kernels on one GPU against their floors and their baselines.

python -m moe_tools.bench kernels [--only "MLA decode"] [--turns 30] [--record docs/measurements/gpu.jsonl]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from moe_tools.bench.dense_cases import dense_cases
from moe_tools.bench.floor import Hardware, hardware_of
from moe_tools.bench.gpu_cases import Case, cases
from moe_tools.bench.record import append_record
from moe_tools.bench.timing import Timing, measure


def main(arguments: Sequence[str]) -> None:
    """Time every case; a table on the screen, a JSON line per case."""
    parser = argparse.ArgumentParser(prog="python -m moe_tools.bench kernels", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose operation contains this text")
    parser.add_argument("--turns", type=int, default=30, help="timed calls of each contender")
    parser.add_argument("--record", type=Path, default=Path("docs/measurements/gpu.jsonl"))
    options = parser.parse_args(arguments)
    hardware = require_gpu()
    print(f"{hardware.name}, torch {torch.__version__}; µs, medians of {options.turns}; floor = datasheet")
    failed: list[str] = []
    for build in chain(cases(), dense_cases()):
        case = build()
        if options.only not in case.op:
            continue
        try:
            timings = measure(case.contenders, turns=options.turns, optional=case.contenders.keys() - {case.ours})
        except Exception as error:  # noqa: BLE001 - the other cases are still worth their figures
            failed.append(f"{case.op} {dict(case.shape)}")
            print(f"{failed[-1]} failed: {type(error).__name__}: {error}", flush=True)
        else:
            print(line(case, timings, hardware), flush=True)
            record(options.record, case, timings, hardware)
        del case, build
        torch.cuda.empty_cache()
    if failed:
        sys.exit(f"bench kernels: {len(failed)} cases failed: {'; '.join(failed)}")


def require_gpu() -> Hardware:
    """The GPU's datasheet entry; ends the program with a clear line where there is none."""
    if not torch.cuda.is_available():
        sys.exit("bench kernels needs a CUDA device, and torch sees none here.")
    name = torch.cuda.get_device_name()
    hardware = hardware_of(name)
    if hardware is None:
        sys.exit(f"bench kernels knows no floor for {name!r}: add its datasheet rates to moe_tools/bench/floor.py.")
    return hardware


def line(case: Case, timings: dict[str, Timing], hardware: Hardware) -> str:
    """Operation, shape, ours with its ratio to the floor, then the baselines and others' figures."""
    ours, floor = timings[case.ours], hardware.floor_us(case.work)
    shape = " ".join(f"{key}={value}" for key, value in case.shape.items())
    text = f"{case.op:<22}{shape:<32}{ours.us:9.1f} [{ours.low_us:.1f}, {ours.high_us:.1f}]"
    text += f"  floor {floor:.1f} ({hardware.bound(case.work)}) ×{ours.us / floor:.2f}"
    if case.target_us is not None:
        text += f"  target {case.target_us:.0f} {'met' if ours.us <= case.target_us else 'missed'}"
    others = [
        f"{name} {t.us:.1f}{'' if t.graph else ' (no graph)'}" for name, t in timings.items() if name != case.ours
    ]
    others += [f"{name} {us:.0f} (published)" for name, us in case.published_us.items()]
    return text + (f"  | {', '.join(others)}" if others else "")


def record(path: Path, case: Case, timings: dict[str, Timing], hardware: Hardware) -> None:
    """One JSON line."""
    floor = hardware.floor_us(case.work)
    append_record(
        path,
        device=torch.cuda.get_device_name(),
        benchmark="kernels",
        op=case.op,
        shape=dict(case.shape),
        bytes=case.work.num_bytes,
        flops=case.work.flops,
        arithmetic=case.work.arithmetic,
        floor_us=floor,
        target_us=case.target_us,
        published_us=dict(case.published_us),
        contenders={
            name: {"us": t.us, "low_us": t.low_us, "high_us": t.high_us, "graph": t.graph, "ratio": t.us / floor}
            for name, t in timings.items()
        },
    )
