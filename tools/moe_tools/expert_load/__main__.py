"""Entry of `python -m moe_tools.expert_load` and of `moe-expert-load`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from moe_runtime.cli.app import ExitCode, run_program, speaks_for_all, with_errors_told


def run() -> NoReturn:
    """The console script: `main` on the process's own arguments."""
    run_program(main)


def main(words: Sequence[str]) -> ExitCode:
    """Run the command that `words` begin with. What a person got wrong is told in one box, without a traceback."""
    if not words or any(word in ("--help", "-h", "help") for word in words):
        from moe_tools.expert_load.usage import help_text

        print(help_text())
        return ExitCode.OK if words else ExitCode.BAD_INPUT
    return with_errors_told(lambda: _command(words))


def _command(words: Sequence[str]) -> ExitCode:
    from moe_runtime.cli.console import open_console
    from moe_tools.expert_load.usage import intro
    from moe_tools.expert_load.words import parse_words

    console, parsed = open_console(), parse_words(words)
    if parsed.command != "top" and speaks_for_all():
        console.line(intro(parsed))
    from moe_tools.expert_load.commands import run_command  # torch: seconds

    run_command(parsed, console)
    return ExitCode.OK


if __name__ == "__main__":
    run()
