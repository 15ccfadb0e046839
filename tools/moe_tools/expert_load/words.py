"""The tool's own words, told apart from the launch's keys, which go through the launch's own reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from moe_runtime.config import RuntimeConfig, build_config, keys
from moe_runtime.errors import ConfigError, nearest
from moe_runtime.launch.compose import compose_tree
from moe_runtime.launch.overrides import parse_overrides
from moe_runtime.schema import read_tree

Command = Literal["record", "report", "plan", "apply", "compare", "top"]
COMMANDS: Final[tuple[Command, ...]] = get_args(Command)

WORKLOAD_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "workload": "prompts: those of prompts=FILE or the model's own; synthetic: random tokens",
        "requests": "synthetic: how many prompts",
        "prompt_tokens": "synthetic: tokens of each",
    }
)
"""Of the commands that run a model."""
OWN_KEYS: Final[Mapping[Command, Mapping[str, str]]] = MappingProxyType(
    {
        "record": {
            "output": "folder for the trace",
            **WORKLOAD_KEYS,
        },
        "report": {
            "trace": "folder of a recording; without it, the launch's keys say what to record first",
            "plan": "placement file to show as the plan; without it, one is computed",
            "output": "the HTML page; pictures are written beside it",
            **WORKLOAD_KEYS,
        },
        "plan": {
            "trace": "folder of a recording",
            "move_budget": "most slots that may change, where the recording has as many slots",
            "output": "placement file to write",
        },
        "apply": {
            "trace": "folder of the recording whose run is repeated; without it, the launch's keys say what runs",
            "plan": "placement file",
            "output": "folder for the new trace",
            **WORKLOAD_KEYS,
        },
        "compare": {
            "trace": "folder of the recording that the plan was made from",
            "plan": "placement file",
            "measured": "folder of a recording under the plan; default: where apply writes it",
        },
        "top": {
            "trace": "folder that a running engine writes its trace to",
            "once": "true: show it once and end",
        },
    }
)
LAUNCH: Final[Mapping[Command, frozenset[str] | None]] = MappingProxyType(
    {
        "record": None,
        "report": None,
        "plan": frozenset(
            {"model", "ep", "tp", "dp", "ranks_per_node", "placement.num_redundant_experts", "balance.policy"}
        ),
        "apply": None,
        "compare": frozenset(),
        "top": frozenset({"snapshot_file"}),
    }
)
"""Keys of the launch that a command takes; None: all."""


@dataclass(frozen=True, slots=True)
class Words:
    """A command line. `own`: key → value; `launch`: words for the launch."""

    command: Command
    own: Mapping[str, str]
    launch: tuple[str, ...]

    def need(self, key: str) -> str:
        """The value of an own key. ConfigError where it was not given."""
        if key in self.own:
            return self.own[key]
        about = OWN_KEYS[self.command][key]
        raise ConfigError(f"{self.command}: {key}= is missing ({about}). Add {key}={_EXAMPLES[key]}.")

    def whole(self, key: str, default: int | None, *, least: int) -> int | None:
        """A whole number of at least `least`."""
        text = self.own.get(key)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(f"{key}={text}: must be a whole number of at least {least}. Example: {key}={least}.")
        return int(text)

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first one by default."""
        text = self.own.get(key, choices[0])
        if text not in choices:
            raise ConfigError(f"{key}={text}: must be one of {', '.join(choices)}.{nearest(text, choices)}")
        return text

    def gives(self, key: str) -> bool:
        """Whether the launch's key `key` was given."""
        return any(word.partition("=")[0] == key for word in self.launch)


def parse_words(words: Sequence[str]) -> Words:
    """`command key=value …`. ConfigError where there is no such command or key."""
    name, *rest = words or [""]
    if name not in COMMANDS:
        said = f"{name!r} is no command" if name else "which command?"
        raise ConfigError(f"{said}: give one of {', '.join(COMMANDS)}.{nearest(name, COMMANDS)} {_HELP}")
    command: Command = COMMANDS[COMMANDS.index(name)]
    own, launch, allowed = dict[str, str](), list[str](), LAUNCH[command]
    for word in rest:
        key, equals, value = word.partition("=")
        if key in OWN_KEYS[command] and equals:
            if not value:
                raise ConfigError(f"{word}: has no value. Write {key}={_EXAMPLES[key]}.")
            own[key] = value
            continue
        if allowed is not None and key not in allowed:
            known = [*OWN_KEYS[command], *sorted(allowed)]
            raise ConfigError(f"{word}: {command} takes {', '.join(f'{k}=' for k in known)}.{nearest(key, known)}")
        if other := next((c for c in COMMANDS if key in OWN_KEYS[c] and key not in _launch_names()), None):
            raise ConfigError(f"{word}: {key}= belongs to {other}, not to {command}. {_HELP}")
        launch.append(word)
    parse_overrides(launch)
    return Words(command, MappingProxyType(own), tuple(launch))


def config_of(words: Sequence[str], *, ep: int, tp: int, dp: int, ranks_per_node: int) -> RuntimeConfig:
    """The configuration of launch words without a look at the model, in the mesh given."""
    return build_config(asked(words) | {"ep": ep, "tp": tp, "dp": dp, "ranks_per_node": ranks_per_node})


def asked(words: Sequence[str]) -> dict[str, Any]:
    """The checked value of each launch key, its default where `words` do not set it."""
    return read_tree(keys(), compose_tree(parse_overrides(words)))


def _launch_names() -> frozenset[str]:
    return frozenset(key.name for key in keys())


def help_text() -> str:
    """The tool's --help."""
    lines = [_USAGE]
    for command in COMMANDS:
        lines.append(f"{command}: {_ABOUT[command]}")
        lines += [f"  {key + '=':<15} {about}" for key, about in OWN_KEYS[command].items()]
        allowed = LAUNCH[command]
        if allowed is None:
            lines.append("  and every key of the launch (python -m moe_runtime --help)")
        elif allowed:
            lines.append(f"  and of the launch's keys: {', '.join(sorted(allowed))}")
        lines.append("")
    return "\n".join(lines).rstrip()


_HELP: Final = "`python -m moe_tools.expert_load --help` lists every key."
_EXAMPLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "trace": "runs/expert_load",
        "plan": "plan.json",
        "output": "FILE",
        "measured": "runs/expert_load-planned",
        "workload": "synthetic",
        "requests": "64",
        "prompt_tokens": "128",
        "move_budget": "32",
        "once": "true",
    }
)
_USAGE: Final = """\
expert_load: where a model's tokens go, what balancing would change, and whether it did

  python -m moe_tools.expert_load report ep=32                    record the demo model, write a page about it
  python -m moe_tools.expert_load record model=demo ep=32 output=runs/load
  python -m moe_tools.expert_load report trace=runs/load output=report.html
  python -m moe_tools.expert_load plan trace=runs/load ep=32 placement.num_redundant_experts=32 output=plan.json
  python -m moe_tools.expert_load apply trace=runs/load plan=plan.json
  python -m moe_tools.expert_load compare trace=runs/load plan=plan.json
  python -m moe_tools.expert_load top trace=runs/load
"""
_ABOUT: Final[Mapping[Command, str]] = MappingProxyType(
    {
        "record": "run a model and save the trace of its experts' loads",
        "report": "one HTML page, pictures and a summary of a recording",
        "plan": "a placement file made for a recording",
        "apply": "run again under a plan, and record that",
        "compare": "what a plan promised and what was measured under it",
        "top": "watch a running engine",
    }
)
