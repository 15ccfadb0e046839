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
from moe_runtime.schema import read_tree, unknown_key

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
_FINE_TUNE: Final = "true: the other model is a fine-tune, with another name and the same shape"
_NUM_ROUTED: Final = "experts of a layer, where another program's record does not say and model= is not given"
OWN_KEYS: Final[Mapping[Command, Mapping[str, str]]] = MappingProxyType(
    {
        "record": {
            "output": "folder for the trace; default: runs/expert_load",
            **WORKLOAD_KEYS,
        },
        "report": {
            "trace": "folder of a recording, or another program's record (below); without it, the launch's keys say "
            "what to record first",
            "plan": "placement file to show as the plan; without it, one is computed",
            "output": "the HTML page; pictures are written beside it",
            "fine_tune": _FINE_TUNE,
            "num_routed": _NUM_ROUTED,
            **WORKLOAD_KEYS,
        },
        "plan": {
            "trace": "folder of a recording, or another program's record (below)",
            "move_budget": "most slots that may change; the plan then has the recording's slots",
            "groups": "true: expert groups stay on one node where they can, as live rebalancing places them; false: "
            "ranks are alike",
            "output": "placement file to write",
            "fine_tune": _FINE_TUNE,
            "num_routed": _NUM_ROUTED,
        },
        "apply": {
            "trace": "folder of the recording whose run is repeated; without it, the launch's keys say what runs",
            "plan": "placement file",
            "output": "folder for the new trace; default: PLAN-applied",
            "fine_tune": _FINE_TUNE,
            **WORKLOAD_KEYS,
        },
        "compare": {
            "trace": "folder of the recording that the plan was made from",
            "plan": "placement file",
            "measured": "folder of a recording under the plan; default: where apply wrote it",
            "fine_tune": _FINE_TUNE,
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
            {"model", "ep", "ranks_per_node", "placement.num_redundant_experts", "placement.file", "balance.policy"}
        ),
        "apply": None,
        "compare": frozenset(),
        "top": frozenset({"snapshot_file"}),
    }
)
"""Keys of the launch that a command takes; None: all but the ones that it sets itself."""
_SET_HERE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "job": "this tool's commands are its jobs. Leave it out, or ask the runtime: python -m moe_runtime job=doctor",
        "balance.trace": "output= names the folder of the trace",
    }
)


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
        raise ConfigError(f"{self.command}: {key}= is missing ({about}). Add {key}={_example(self.command, key)}.")

    def whole(self, key: str, default: int | None, *, least: int) -> int | None:
        """A whole number of at least `least`."""
        text = self.own.get(key)
        if text is None:
            return default
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise ConfigError(f"{key}={text}: must be a whole number of at least {least}. Example: {key}={least}.")
        return int(text)

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first one by default."""
        text = self.own.get(key, choices[0])
        if text not in choices:
            raise ConfigError(f"{key}={text}: must be one of {', '.join(choices)}.{nearest(text, choices)}")
        return text

    def flag(self, key: str) -> bool:
        """true or false; false by default."""
        return self.one_of(key, ("false", "true")) == "true"

    def value(self, key: str) -> str | None:
        """The text that the launch's key `key` was given, the last one counts; None where it was not."""
        return next((text for name, _, text in (w.partition("=") for w in self.launch[::-1]) if name == key), None)

    def gives(self, key: str) -> bool:
        """Whether the launch's key `key` was given."""
        return self.value(key) is not None


def parse_words(words: Sequence[str]) -> Words:
    """`command key=value …`. ConfigError where there is no such command or key, or a key is given twice."""
    name, *rest = words or [""]
    if name not in COMMANDS:
        said = f"{name!r} is no command" if name else "which command?"
        raise ConfigError(f"{said}: give one of {', '.join(COMMANDS)}.{nearest(name, COMMANDS)} {HELP}")
    command: Command = COMMANDS[COMMANDS.index(name)]
    own, launch, seen = dict[str, str](), list[str](), dict[str, str]()
    for word in rest:
        key, equals, value = word.partition("=")
        if key in OWN_KEYS[command] and equals:
            if not value:
                raise ConfigError(f"{word}: has no value. Write {key}={_example(command, key)}.")
            own[key] = value
        else:
            _check_launch_word(word, command)
            launch.append(word)
        if equals and key in seen:
            raise ConfigError(f"{word}: {seen[key]} was given before. Leave one of them out.")
        seen[key] = word
    parse_overrides(launch)
    return Words(command, MappingProxyType(own), tuple(launch))


def _check_launch_word(word: str, command: Command) -> None:
    """ConfigError where `word` is an own key without its value, belongs elsewhere, or is no key at all. The launch
    checks the rest."""
    key, equals, value = word.partition("=")
    own, allowed, known = OWN_KEYS[command], LAUNCH[command], [one.name for one in keys()]
    bare = key.lstrip("-").replace("-", "_")
    if bare in own:
        raise ConfigError(f"{word}: is written as {bare}={value or _example(command, bare)}, without dashes or blanks.")
    if equals and allowed is None and key in _SET_HERE:
        raise ConfigError(f"{word}: {_SET_HERE[key]}.")
    if allowed is not None and key not in allowed:
        takes = [*own, *sorted(allowed)]
        hint = "" if key in known else nearest(key, takes)
        raise ConfigError(f"{word}: {command} takes {', '.join(f'{k}=' for k in takes)}.{hint}")
    if key not in known and (other := next((c for c in COMMANDS if key in OWN_KEYS[c]), None)):
        raise ConfigError(f"{word}: {key}= belongs to {other}, not to {command}. {HELP}")
    is_group = any(name.startswith(f"{key}.") for name in known)
    if equals and key.replace(".", "_").isidentifier() and key not in known and not is_group:
        raise unknown_key(key, [*own, *known], program=PROGRAM)


def config_of(words: Sequence[str], *, ep: int, tp: int, dp: int, ranks_per_node: int) -> RuntimeConfig:
    """The configuration of launch words without a look at the model, in the mesh given."""
    return build_config(asked(words) | {"ep": ep, "tp": tp, "dp": dp, "ranks_per_node": ranks_per_node})


def asked(words: Sequence[str]) -> dict[str, Any]:
    """The checked value of each launch key, its default where `words` do not set it."""
    return read_tree(keys(), compose_tree(parse_overrides(words)))


def _example(command: Command, key: str) -> str:
    return _EXAMPLES.get(f"{command} {key}", _EXAMPLES.get(key, "FILE"))


PROGRAM: Final = "python -m moe_tools.expert_load"
HELP: Final = f"`{PROGRAM} --help` lists every key."
_EXAMPLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "trace": "runs/expert_load",
        "plan": "plan.json",
        "record output": "runs/load",
        "report output": "report.html",
        "plan output": "plan.json",
        "apply output": "runs/applied",
        "measured": "plan-applied",
        "workload": "synthetic",
        "requests": "64",
        "prompt_tokens": "128",
        "move_budget": "32",
        "num_routed": "256",
        "fine_tune": "true",
        "groups": "false",
        "once": "true",
    }
)
