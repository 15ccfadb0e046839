"""Runs README.md's ```sh lines and ```python blocks, so that none goes stale. Blocks marked ```text are not run.

`make test` is what .ci/run does anyway, and cloning is done: both are passed over. Each command runs in the checkout,
must exit with 0 and must leave nothing behind but the files that its `output=` names.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = ("git clone", "cd ", "make test", "make full")
LIMIT_S = 300


def commands() -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = []
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", readme, re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append(f"python -c {shlex.quote(block)}")
            continue
        lines = (line.partition("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
        found += [line for line in lines if line and not line.startswith(("#", *SKIPPED))]
    return found


def leftovers() -> set[str]:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return set(status.stdout.splitlines())


def main() -> int:
    found = commands()
    if not found:
        print("README.md: no command found")
        return 1
    environment = os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    failures = 0
    for command in found:
        before, began = leftovers(), time.monotonic()
        try:
            done = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
            code, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            code, output = -1, f"{error}"
        for name in re.findall(r"output=(\S+)", command):
            (ROOT / name.strip("'\"")).unlink(missing_ok=True)
        litter = leftovers() - before
        ok = code == 0 and not litter
        failures += not ok
        print(f"{'ok    ' if ok else 'FAILED'} {time.monotonic() - began:6.1f} s  {command.splitlines()[0]}")
        if not ok:
            print(f"exit code {code}, left behind {sorted(litter)}\n{output[-3000:]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
