"""The command line's `key=value` words, checked and told apart before Hydra's grammar sees them.

Hydra reads commas, brackets, `=` and blanks in a value as syntax. Keys whose value is a text of the user's own (paths,
stop strings) therefore never reach it: they are taken as they stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from moe_runtime.config import keys
from moe_runtime.errors import ConfigError, nearest
from moe_runtime.launch.data import preset_names
from moe_runtime.schema import Key, Report, fail, unknown_key

_HELP = "`python -m moe_runtime --help` lists every key."


@dataclass(frozen=True, slots=True)
class Overrides:
    """`preset`: its name. `verbatim`: dotted key → its value, read here. `grammar`: words for Hydra, in order."""

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
    left = list(words)
    while left:
        word = left.pop(0)
        try:
            if word.startswith("-"):
                option, _, following = word.partition(" ")
                if not following and left and _is_value_of(option, left[0], known):
                    following = left.pop(0)
                raise ConfigError(_dashes(option, following, known))
            name, value = _split(word, known)
            preset = _preset(value) if name == "preset" else preset
            found = None if name == "preset" else _value(known[name], value)
            if found is None and "${" in value:
                raise ConfigError(f"{word}: values are not looked up by ${{…}}. Write the value itself.")
        except ConfigError as error:
            report(error)
            continue
        if name == "preset":
            continue
        verbatim.pop(name, None)
        grammar.pop(name, None)
        if found is None:
            grammar[name] = word
        else:
            verbatim[name] = found.value
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
    if name not in known:
        inside = [other for other in known if other.startswith(name + ".")]
        if inside:
            raise ConfigError(f"{word}: {name} is a group of keys. Set one of them: {', '.join(inside)}.")
        raise unknown_key(name, known)
    return name, value


def _is_value_of(option: str, following: str, known: Mapping[str, Key]) -> bool:
    """`--ep 320`: whether the second word belongs to the first."""
    return "=" not in option + following and not following.startswith("--") and _undashed(option) in known


def _undashed(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _dashes(option: str, following: str, known: Mapping[str, Key]) -> str:
    """`following`: the word after it where that is its value, else empty."""
    dashed, _, value = option.partition("=")
    name = _undashed(dashed)
    if name not in known:
        near = nearest(name, ["help", "version", *known])
        return (
            f"{dashed}: unknown option.{near} Options are --help and --version; settings are written key=value. {_HELP}"
        )
    shown = f"{option} {following}".rstrip()
    return f"{shown}: settings are written as key=value, without dashes: {name}={value or following or 'VALUE'}"


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


@dataclass(frozen=True, slots=True)
class _Value:
    value: object


def _value(key: Key, text: str) -> _Value | None:
    """The value of a key that does not go through Hydra's grammar: a text of the user's own, or a list as JSON.

    A key of texts may be given as one bare text. None: for Hydra. Raises ConfigError where list and text look alike.
    """
    if text == "null" and (key.is_list or (key.verbatim and key.optional)):
        return _Value([] if key.is_list and not key.optional else None)
    if key.verbatim:
        return _Value(text)
    if not key.is_list:
        return None
    if text.startswith("["):
        with suppress(ValueError, RecursionError):
            return _Value(json.loads(text))
    if key.name != "sampling.stop":
        return None
    if not text.startswith("["):
        return _Value([text])
    inner = text.removeprefix("[").removesuffix("]").strip()
    if inner.startswith(("'", '"')):
        return None
    raise ConfigError(
        f"{key.name}={text}: texts in a list stand in quotes. For a list: '{key.name}={json.dumps([inner])}'; "
        f"for this text itself: '{key.name}={json.dumps([text])}'."
    )


_NO_KEY = Key("", str, None, "", None, None, False, False, "")
