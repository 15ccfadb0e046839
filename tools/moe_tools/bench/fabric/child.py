"""One part in a process of its own: `python -P -m moe_tools.bench.fabric.child NAME`.

Its standard input is a pipe that ends with the parent, however that ends, and the process with it. What it measured
goes out as JSON lines behind a mark; everything else that libraries print is for a failure's report.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict

from moe_tools.bench.fabric.parts import parts

MEASURED, SKIPPED = "@measured ", "@skipped "


def watch_parent() -> None:
    """End this process as soon as its standard input ends."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(name: str, report: Callable[[str], None]) -> int:
    """Run the part `name`; the exit code."""
    part = next(part for part in parts() if part.name == name)
    if (why := part.obstacle()) is not None:
        report(SKIPPED + why)
        return 0
    try:
        for measured in part.run():
            report(MEASURED + json.dumps(asdict(measured)))
    except Exception:  # noqa: BLE001 - the parent reports it and goes on with the other parts
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def out(line: str) -> None:
    """To the parent, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    watch_parent()
    code = main(sys.argv[1], out)
    sys.stdout.flush()
    os._exit(code)  # libraries of fabrics may hang while they unload, and what was measured is out
