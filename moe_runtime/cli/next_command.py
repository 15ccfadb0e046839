"""The command worth trying after this one."""

from __future__ import annotations

import shlex

from moe_runtime.launch.compose import Composed

_PROGRAM = "python -m moe_runtime"


def next_command(composed: Composed) -> str:
    """One shell line, with the user's own settings kept where they still apply."""
    config, words = composed.config, [word for word in composed.words if not word.startswith("job=")]
    if config.job == "doctor":
        runnable = words if composed.has_weights else [word for word in words if not word.startswith("model=")]
        return _line(runnable)
    if config.ep < 32:
        mesh = ("ep=", "tp=", "dp=", "preset=")
        return _line([word for word in words if not word.startswith(mesh)], "ep=320")
    if config.preset == "none":
        return f"{_PROGRAM} preset=v3_decode_ep320"
    return f"{_PROGRAM} job=doctor model=deepseek_v3 preset={config.preset}"


def _line(words: list[str], *more: str) -> str:
    return " ".join([_PROGRAM, *map(shlex.quote, [*words, *more])])
