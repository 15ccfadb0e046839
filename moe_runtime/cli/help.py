"""The text of --help: every key in a line, from the schema. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from moe_runtime.config import keys
from moe_runtime.launch.data import data_path, preset_names
from moe_runtime.schema import Key, shown

_WIDTH = 118
_USAGE = """\
moe_runtime: expert-parallel inference for DeepSeek-style mixture-of-experts models

  python -m moe_runtime ep=320                            text from the demo model on 320 virtual ranks
  python -m moe_runtime model=FOLDER prompts=FILE output=FILE.jsonl
  python -m moe_runtime job=doctor model=deepseek_v3 preset=v3_decode_ep320
  torchrun --nproc-per-node 4 -m moe_runtime ep=4 tp=2

Settings are key=value, in any order. Defaults < preset < command line. --help, --version.
Paths are taken as they are: prompts='my prompts,v2.txt' needs the shell's quotes only.
"""
_EXIT_CODES = """\
Exit codes
  0    done
  1    failed while running
  2    bad input: a setting, a checkpoint, a prompt; nothing was run
  3    done, but some requests failed
  130  interrupted
  141  standard output was closed early
"""


def help_text() -> str:
    """The whole help."""
    return "\n".join([_USAGE, *_settings(), "", *_presets(), "", _EXIT_CODES.rstrip()])


def _settings() -> Iterator[str]:
    every = keys()
    yield "Settings (default in brackets)"
    section = ""
    width = max(len(key.name) for key in every)
    for key in every:
        if key.name.rpartition(".")[0] != section:
            section = key.name.rpartition(".")[0]
            yield ""
        yield f"  {key.name:<{width}}  {key.help}{_values(key)} [{_default(key)}]"


def _values(key: Key) -> str:
    return f" ({'|'.join(key.choices)})" if key.choices else ""


def _default(key: Key) -> str:
    if key.follows:
        return key.follows
    if key.size_in_bytes and isinstance(key.default, int):
        return f"{key.default // 2**20}MiB"
    return shown(key.default)


def _presets() -> Iterator[str]:
    yield "Presets (preset=NAME)"
    width = max(map(len, preset_names()))
    for name in preset_names():
        lines = data_path("configs", "preset", f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        about = [line.lstrip("# ") for line in lines if line.startswith("# ") and "@package" not in line]
        first, *rest = wrap(" ".join(about), _WIDTH - width - 4)
        yield f"  {name:<{width}}  {first}"
        yield from (" " * (width + 4) + line for line in rest)
