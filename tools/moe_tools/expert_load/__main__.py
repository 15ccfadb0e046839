"""Entry of `python -m moe_tools.expert_load` and of `moe-expert-load`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moe_runtime.cli.app import ExitCode
from moe_runtime.errors import CheckpointError, ConfigError, MoeRuntimeError, RequestError, TraceError


def run() -> NoReturn:
    """The console script: `main` on the process's own arguments."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(int(main(sys.argv[1:])))


def main(words: Sequence[str]) -> ExitCode:
    """Run the command that `words` begin with. What a person got wrong is told in one box, without a traceback."""
    if not words or any(word in ("--help", "-h", "help") for word in words):
        from moe_tools.expert_load.words import help_text

        print(help_text())
        return ExitCode.OK if words else ExitCode.BAD_INPUT
    from moe_runtime.cli.console import open_console

    try:
        from moe_tools.expert_load.commands import run_command
        from moe_tools.expert_load.words import parse_words

        run_command(parse_words(words), open_console())
    except (ConfigError, CheckpointError, RequestError, TraceError) as error:
        open_console(sys.stderr).error(f"{type(error).__name__}: {error}")
        return ExitCode.BAD_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.OUTPUT_CLOSED
    except (MoeRuntimeError, OSError) as error:
        open_console(sys.stderr).error(f"{type(error).__name__}: {error}")
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.OK


if __name__ == "__main__":
    run()
