"""A child of the process launcher: one rank that serves. Its place comes on standard input."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import NoReturn

PARENT_GRACE_S = 15.0
"""How long a rank goes on after its parent's pipe has ended: the last step, or the error, comes first."""


def main() -> int:
    """Exit code 0 after the last step, 1 after an error, which rank 0 reports."""
    place = json.loads(sys.stdin.buffer.readline() or "null")
    if place is None:
        return 1
    threading.Thread(target=_leave_with_parent, name="parent-watch", daemon=True).start()
    import torch  # after the watch has begun: importing takes longer than a parent may live

    from moe_runtime.comm.process import init_process, join_store
    from moe_runtime.errors import MoeRuntimeError
    from moe_runtime.launch.build import ProcessParts
    from moe_runtime.launch.executors.process import RUN_KEY, threads_per_process
    from moe_runtime.launch.executors.rank import RankExecutor
    from moe_runtime.launch.wire import decode_run

    try:
        store = join_store(place["host"], place["port"], deadline_s=place["deadline_s"])
        composed = decode_run(store.get(RUN_KEY))
        cuda = composed.config.device == "cuda"
        torch.set_num_threads(threads_per_process(composed, place["world"]))
        process = init_process(
            place["rank"],
            place["world"],
            store=store,
            backend="nccl" if cuda else "gloo",
            deadline_s=place["deadline_s"],
            device=f"cuda:{place['rank']}" if cuda else "cpu",
        )
        parts = ProcessParts.open(composed, ranks_in_process=1)
        RankExecutor(parts, process, owner=None, on_progress=lambda _: None).serve()
    except MoeRuntimeError:
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _leave_with_parent() -> NoReturn:
    while sys.stdin.buffer.read(1):
        pass
    time.sleep(PARENT_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
