"""The command line: `python -m moe_runtime key=value …`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NoReturn

from moe_runtime.errors import CheckpointError, ConfigError, MoeRuntimeError, RequestError, TraceError


class ExitCode(IntEnum):
    """What the process tells its caller."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    SOME_REQUESTS_FAILED = 3
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141


def run() -> NoReturn:
    """The console script: `main` on the process's own arguments."""
    run_program(main)


def run_program(main: Callable[[Sequence[str]], ExitCode]) -> NoReturn:
    """`main` on the process's own arguments, then the process's end with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    show_log()
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = ExitCode.OUTPUT_CLOSED
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(int(code))


def show_log() -> None:
    """What the runtime logs while it serves, such as decisions to move experts, as lines on standard error."""
    log = logging.getLogger("moe_runtime")
    log.addHandler(_Lines())
    log.setLevel(logging.INFO)


class _Lines(logging.Handler):
    """On what is standard error at that time: a progress display puts itself in front of it."""

    def emit(self, record: logging.LogRecord) -> None:
        from moe_runtime.cli.console import printable

        print(printable(self.format(record)), file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> ExitCode:
    """Run the job that `words` name. Errors of the user's are printed in one box, without a traceback."""
    if any(word in ("--help", "-h", "help") for word in words):
        from moe_runtime.cli.help import help_text

        print(help_text())
        return ExitCode.OK
    if "--version" in words:
        from importlib.metadata import version

        print(f"moe_runtime {version('moe-runtime')}")
        return ExitCode.OK
    return with_errors_told(lambda: _job(words))


def with_errors_told(work: Callable[[], ExitCode]) -> ExitCode:
    """The code of `work`, or of its error, which is printed in one box, without a traceback."""
    try:
        return work()
    except (ConfigError, CheckpointError, RequestError, TraceError) as error:
        if speaks_for_all():
            _say(error)
        return ExitCode.BAD_INPUT
    except MoeRuntimeError as error:
        _say(error)
        return ExitCode.FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.OUTPUT_CLOSED
    except OSError as error:
        _say(error)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _job(words: Sequence[str]) -> ExitCode:
    from moe_runtime.launch.env import torchrun_env

    torchrun = torchrun_env()
    if [word for word in words if word.startswith("job=")][-1:] == ["job=doctor"]:
        if torchrun is not None and torchrun.rank:
            return ExitCode.OK  # one report is enough
        from moe_runtime.cli.doctor import doctor

        return ExitCode.BAD_INPUT if doctor(words, torchrun=torchrun) else ExitCode.OK
    from moe_runtime.cli.generate import generate
    from moe_runtime.launch.meeting import decide

    composed, meeting = decide(words, torchrun=torchrun)
    failed = generate(composed, meeting=meeting)
    return ExitCode.SOME_REQUESTS_FAILED if failed else ExitCode.OK


def speaks_for_all() -> bool:
    """False under torchrun but on rank 0: bad input is the same on every rank, and told once."""
    from moe_runtime.launch.env import torchrun_env

    try:
        place = torchrun_env()
    except ConfigError:
        return True
    return place is None or place.rank == 0


def _say(error: Exception) -> None:
    from moe_runtime.cli.console import open_console

    open_console(sys.stderr).error(f"{type(error).__name__}: {error}")
