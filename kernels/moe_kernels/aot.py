"""Ahead-of-time compilation of every shipped kernel configuration, without a GPU, and what each one takes.

    python -m moe_kernels.aot [--quick] [--jobs 2] [--report FILE.jsonl]

A kernel module lists its configurations in `aot_cases()`. Triton keeps compiled kernels by source and options, so a
second run costs a second. Exit status 1 where a kernel does not build or exceeds its limits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

MODULES: Final = (
    *("norm", "quant", "gate", "permute", "put_rows", "swiglu", "rope", "latent", "mla"),
    *("grouped_gemm", "experts"),
)
"""Packages of `moe_kernels` whose `triton.py` has `aot_cases`."""

MAX_SHARED_BYTES: Final = 232_448
"""What one block may take on sm_90: 227 KiB."""


@dataclass(frozen=True, slots=True)
class AotCase:
    """One configuration of one kernel.

    `signature`: Triton type of each run-time argument ("*bf16", "i32", "tensordesc<bf16[16,64]>"); `constants`: the
    constexpr arguments; `aligned`: run-time arguments divisible by 16, as a launch would find them. `quick`: compiled
    in the ordinary test run, one case per kernel; `fp_fusion`: whether a product and a sum may be rounded once.
    """

    op: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    fp_fusion: bool = True
    aligned: tuple[str, ...] = ()
    quick: bool = False
    max_registers: int = 255
    max_spill_bytes: int = 0
    max_shared_bytes: int = MAX_SHARED_BYTES
    max_narrow: int | None = None
    """Loads and stores of global memory by 1 or 2 bytes; None: any number."""
    linked: Mapping[str, str] = field(default_factory=dict)
    """Device libraries to link with: name -> path of the bitcode."""
    asserts: bool = False
    """Whether the kernel's assertions stand, as in launches with `debug`."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What the compiled kernel takes: registers per thread, spilled bytes per thread, shared memory per block."""

    op: str
    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin_bytes: int
    wgmma: bool
    tma: bool
    narrow: int = 0
    """Loads and stores of global memory by 1 or 2 bytes, in the kernel's text."""

    def excess(self, case: AotCase) -> str | None:
        """What exceeds the case's limits, or None."""
        pairs = [
            ("registers", self.registers, case.max_registers),
            ("spilled bytes", self.spill_bytes, case.max_spill_bytes),
            ("shared bytes", self.shared_bytes, case.max_shared_bytes),
        ]
        if case.max_narrow is not None:
            pairs.append(("loads and stores by 1 or 2 bytes", self.narrow, case.max_narrow))
        found = [f"{seen} {what}, at most {limit}" for what, seen, limit in pairs if seen > limit]
        return f"{case.op} {case.name}: {'; '.join(found)}" if found else None


def shipped_cases(*, quick: bool = False, modules: Sequence[str] = MODULES) -> list[AotCase]:
    """All configurations, or one per kernel."""
    cases = [case for name in modules for case in _cases_of(name)]
    return [case for case in cases if case.quick] if quick else cases


def _cases_of(module: str) -> Iterator[AotCase]:
    yield from import_module(f"moe_kernels.{module}.triton").aot_cases()


def compile_case(case: AotCase) -> Resources:
    """Compile for sm_90 and read what ptxas made of it. Raises what Triton raises where it does not build."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attrs)
    options: dict[str, Any] = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    if case.linked:
        options["extern_libs"] = dict(case.linked)
    if case.asserts:
        options |= {"debug": True, "sanitize_overflow": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    registers, spilled = _usage(cubin)
    return Resources(
        case.op,
        case.name,
        registers,
        spilled,
        int(compiled.metadata.shared),
        len(cubin),
        wgmma="wgmma.mma_async" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
        narrow=len(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*\.b(?:8|16)\b", ptx)),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin's only kernel; spilled values live on the stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump -res-usage said: {text}"
    return int(found[1]), int(found[2])


def _compile_numbered(number: int, quick: bool, modules: tuple[str, ...]) -> Resources | str:
    """Cases hold functions, which do not travel between processes: their number does."""
    case = shipped_cases(quick=quick, modules=modules)[number]
    try:
        return compile_case(case)
    except Exception as error:  # noqa: BLE001 - the compiler raises many kinds; each is a complaint
        return f"{case.op} {case.name}: does not build: {type(error).__name__}: {error}"


def compile_all(*, quick: bool, jobs: int, modules: tuple[str, ...] = MODULES) -> tuple[list[Resources], list[str]]:
    """(what each case takes, complaints)."""
    cases = shipped_cases(quick=quick, modules=modules)
    with ProcessPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(_compile_numbered, range(len(cases)), [quick] * len(cases), [modules] * len(cases)))
    resources = [outcome for outcome in outcomes if isinstance(outcome, Resources)]
    complaints = [outcome for outcome in outcomes if isinstance(outcome, str)]
    by_name = {(case.op, case.name): case for case in cases}
    complaints += [text for r in resources if (text := r.excess(by_name[r.op, r.name]))]
    return resources, complaints


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration for sm_90.")
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=MODULES, choices=MODULES, help="operations")
    parser.add_argument("--report", type=Path, help="write one JSON line per configuration")
    options = parser.parse_args(arguments)
    resources, complaints = compile_all(quick=options.quick, jobs=options.jobs, modules=tuple(options.only))
    lines = [json.dumps(asdict(r)) for r in resources]
    for text in complaints:
        sys.stderr.write(text + "\n")
    if options.report is not None:
        options.report.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        sys.stdout.write("".join(line + "\n" for line in lines))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
