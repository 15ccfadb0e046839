"""A process that makes one decision: `launch.planning` asks on standard input and reads standard output.

Its argument is the number of seconds after which it ends, whether or not its parent still lives.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

_NICE: Final = 10


def main() -> int:
    """Exit code 0 with an answer, an error of the question's among them."""
    signal.alarm(int(sys.argv[1]))
    os.nice(_NICE)  # where it shares a core with a rank, the rank goes first
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    import torch

    from moe_runtime.launch.planning import answer

    torch.set_num_threads(1)
    out.write(answer(sys.stdin.buffer))
    out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
