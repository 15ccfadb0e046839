"""A child of the process launcher: one rank that serves. Its place comes on standard input."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

PARENT_GRACE_S = 5.0
"""How long a rank goes on after its parent's pipe has ended: it leaves by itself after the last step or an error."""
_STDIN = 0


def main() -> int:
    """Exit code 0 after the last step, EXIT_TOLD after an error that rank 0 reports, 1 after any other."""
    place = _read_place()
    if place is None:
        return 1
    threading.Thread(target=_leave_with_parent, name="parent-watch", daemon=True).start()
    return _serve(place)


def _serve(place: Mapping[str, Any]) -> int:
    # After the watch has begun: importing torch takes longer than a parent may live.
    from moe_runtime.comm.process import init_process, join_store
    from moe_runtime.errors import MoeRuntimeError
    from moe_runtime.launch.build import ProcessParts
    from moe_runtime.launch.device import process_device
    from moe_runtime.launch.env import gloo_on_loopback
    from moe_runtime.launch.executors.process import EXIT_TOLD, RUN_KEY, ready_key
    from moe_runtime.launch.executors.rank import Rank
    from moe_runtime.launch.executors.threads import threads_per_process
    from moe_runtime.launch.wire import decode_run

    rank, world = place["rank"], place["world"]
    store = join_store("127.0.0.1", place["port"], deadline_s=place["deadline_s"])
    composed = decode_run(store.get(RUN_KEY))
    config, device = composed.config, process_device(composed.config.device, local_rank=rank)
    store.set(ready_key(rank), "yes")
    try:
        with gloo_on_loopback():
            process = init_process(
                rank,
                world,
                store=store,
                backend="nccl" if config.device == "cuda" else "gloo",
                deadline_s=place["deadline_s"],
                device=device,
            )
            served = Rank(
                lambda: ProcessParts.open(composed, ranks_in_process=1, local_rank=rank),
                process,
                mesh=composed.topology.mesh(rank),
                owner=None,
                num_threads=threads_per_process(config, world),
                load_timeout_s=config.load_timeout_s,
                on_progress=lambda _: None,
            )
        served.serve()
    except MoeRuntimeError:
        return EXIT_TOLD
    return 0


def _read_place() -> dict[str, Any] | None:
    """The first line. Read from the descriptor: a thread blocked in `sys.stdin` would hold its lock at exit."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(_STDIN, 1)):
            return None
        line += byte
    place: dict[str, Any] = json.loads(line)
    return place


def _leave_with_parent() -> NoReturn:
    while os.read(_STDIN, 1):
        pass
    time.sleep(PARENT_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
