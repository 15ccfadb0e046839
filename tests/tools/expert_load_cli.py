"""The expert-load tool's command line, as tests type it."""

from __future__ import annotations

import shlex

import pytest
from moe_tools.expert_load.__main__ import main

from moe_runtime.cli.app import ExitCode


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a successful command prints."""
    code = main(words)
    said = capsys.readouterr()
    assert code is ExitCode.OK, said.err
    return said.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of bad input."""
    assert main(words) is ExitCode.BAD_INPUT
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err


def next_words(out: str) -> list[str]:
    """The command that `out` says to run next, without its program."""
    line = next(line for line in out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words[:3] == ["python", "-m", "moe_tools.expert_load"]
    return words[3:]
