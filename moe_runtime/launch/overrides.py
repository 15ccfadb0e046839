"""The command line's `key=value` words, checked and told apart before Hydra's grammar sees them.

Hydra reads commas, brackets, `=` and blanks in a value as syntax. Keys whose value is a text of the user's own (paths,
stop strings) therefore never reach it: they are taken as they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_runtime.config import keys
from moe_runtime.errors import ConfigError, nearest
from moe_runtime.launch.data import preset_names
from moe_runtime.schema import Key, Report, fail, unknown_key

_HELP = "`python -m moe_runtime --help` lists every key."


@dataclass(frozen=True, slots=True)
class Overrides:
    """`preset`: its name. `verbatim`: dotted key → value as typed. `grammar`: words for Hydra, in order."""

    preset: str
    verbatim: Mapping[str, object]
    grammar: tuple[str, ...]

    @property
    def given(self) -> frozenset[str]:
        """Dotted names of the keys that were set."""
        return frozenset(self.verbatim) | {word.partition("=")[0] for word in self.grammar}


def parse_overrides(words: Sequence[str], *, report: Report = fail) -> Overrides:
    """Sort the words; the last one of a key wins. What is no `key=value` of ours is reported and left out."""
    known = {key.name: key for key in keys()}
    preset, verbatim, grammar = "none", dict[str, object](), dict[str, str]()
    for i, word in enumerate(words):
        try:
            if word.startswith("-"):
                raise ConfigError(_dashes(" ".join(words[i : i + 2]), known))
            name, value = _split(word, known)
            preset = _preset(value) if name == "preset" else preset
        except ConfigError as error:
            report(error)
            continue
        if name == "preset":
            continue
        if _is_verbatim(known[name], value):
            verbatim[name] = _text(known[name], value)
            grammar.pop(name, None)
        else:
            grammar[name] = f"{name}={value}"
            verbatim.pop(name, None)
    return Overrides(preset, verbatim, tuple(grammar.values()))


def _split(word: str, known: Mapping[str, Key]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(_bare_word(word, known))
    if not name or name != name.strip() or (not value and not known.get(name, _NO_KEY).verbatim):
        right = f"{name.strip()}={value.strip() or 'VALUE'}" if name.strip() else "key=value"
        raise ConfigError(f"{word!r}: keys and values are written as key=value without blanks, e.g. {right}.")
    if name[0] in "+~":
        raise ConfigError(f"{word}: keys cannot be added or deleted. Set an existing one: {name.lstrip('+~')}={value}.")
    if name.startswith("hydra"):
        raise ConfigError(f"{word}: Hydra's own settings have no effect here; nothing is written but `output`. {_HELP}")
    if "${" in value and name in known and not _is_verbatim(known[name], value):
        raise ConfigError(f"{word}: values are taken as they stand; ${{…}} is not looked up. Write the value itself.")
    if name not in known:
        inside = [other for other in known if other.startswith(name + ".")]
        if inside:
            raise ConfigError(f"{word}: {name} is a group of keys. Set one of them: {', '.join(inside)}.")
        raise unknown_key(name, known)
    return name, value


def _dashes(words: str, known: Mapping[str, Key]) -> str:
    """`words`: the dashed word and the one after it, which may be its value."""
    option, _, following = words.partition(" ")
    name, equals, value = option.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if name not in known:
        near = nearest(name, ["help", "version", *known])
        return (
            f"{option}: unknown option.{near} Options are --help and --version; settings are written key=value. {_HELP}"
        )
    if not equals and following and "=" not in following:
        option, value = words, following
    return f"{option}: settings are written as key=value, without dashes: {name}={value or 'VALUE'}"


def _bare_word(word: str, known: Mapping[str, Key]) -> str:
    jobs = known["job"].choices
    if word in jobs:
        return f"{word}: write job={word}."
    if word in known:
        return f"{word}: has no value. Write {word}=VALUE, without blanks around the =."
    return f"{word!r}: is no key=value.{nearest(word, [*jobs, *known])} {_HELP}"


def _preset(name: str) -> str:
    names = preset_names()
    if name in names:
        return name
    raise ConfigError(f"preset={name}: no such preset. There are {', '.join(names)}.{nearest(name, names)}")


def _is_verbatim(key: Key, value: str) -> bool:
    """A list may be given as one bare text."""
    return key.verbatim or (key.name == "sampling.stop" and not value.startswith("["))


def _text(key: Key, value: str) -> object:
    if key.optional and value == "null":
        return None
    return value if key.verbatim else [value]


_NO_KEY = Key("", str, None, "", None, None, False, False, "")
