"""The command worth trying after this one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import Composed, compose

_PROGRAM = "python -m moe_runtime"
_LOAD_PROGRAM = "python -m moe_tools.expert_load"
_OF_TRACE = ("balance.trace", "balance.record=", "balance.window_steps=")
"""A folder takes one trace; the others are about what goes into it."""
_OF_ONE_RUN = ("job=", "output=", "snapshot_file=", "balance.save_placement=")
"""Settings that name a run's own files."""
_OF_ONE_MESH = ("ep=", "tp=", "dp=", "ranks_per_node=", "preset=", "launcher=", "dispatch=", "placement.")
"""Settings that were made for the mesh at hand, with the cache's size: they rarely fit another one."""


def next_command(composed: Composed) -> str:
    """One shell line that this machine can run, with the user's own settings kept where they still apply."""
    for words in _ideas(composed):
        if _fits(words):
            return " ".join([_PROGRAM, *map(shlex.quote, words)])
    return _PROGRAM


def load_command(composed: Composed) -> str | None:
    """One shell line that shows this run's expert load as a page: from its trace, else it runs again. None where no one
    process could."""
    if (trace := composed.config.balance.trace) is not None:
        return f"{_LOAD_PROGRAM} report trace={shlex.quote(trace)}"
    if composed.config.ep == 1 or composed.topology.launcher == "torchrun":
        return None
    words = [word for word in composed.words if not word.startswith((*_OF_ONE_RUN, *_OF_TRACE))]
    return " ".join([f"{_LOAD_PROGRAM} report", *map(shlex.quote, words)])


def _ideas(composed: Composed) -> Iterator[Sequence[str]]:
    """The best one first."""
    config, words = composed.config, [word for word in composed.words if not word.startswith("job=")]
    if config.job == "doctor":
        yield words
        yield [word for word in words if not word.startswith("model=")]
    elif config.ep < 32:
        dropped = (*_OF_ONE_MESH, *_OF_TRACE, "engine.kv_cache_bytes=")
        yield [*(word for word in words if not word.startswith(dropped)), "ep=320"]
    elif config.preset == "none":
        yield ["preset=v3_decode_ep320"]
    else:
        yield ["job=doctor", "model=deepseek_v3", f"preset={config.preset}"]


def _fits(words: Sequence[str]) -> bool:
    try:
        composed = compose(words)
    except ConfigError:
        return False
    return composed.has_weights or composed.config.job == "doctor"
