"""A dataclass as a strict schema: its fields under dotted names, their documentation, the reading of plain trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_runtime.errors import ConfigError, nearest

_BYTE_UNITS = (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))


def setting(
    default: Any,
    help_text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    size_in_bytes: bool = False,
    verbatim: bool = False,
    follows: str = "",
) -> Any:
    """A dataclass field with its documentation and range.

    `verbatim`: the command line's text is the value, whatever characters it holds. `follows`: may be unset (null), and
    then comes from the other keys; the text says how.
    """
    metadata = {
        "help": help_text,
        "minimum": minimum,
        "maximum": maximum,
        "size_in_bytes": size_in_bytes,
        "verbatim": verbatim,
        "follows": follows,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Key:
    """One setting under its dotted name."""

    name: str
    annotation: Any
    default: object
    help: str
    minimum: float | None
    maximum: float | None
    size_in_bytes: bool
    verbatim: bool
    follows: str

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return bool(self.follows) or NoneType in get_args(self.annotation)

    @property
    def is_list(self) -> bool:
        return get_origin(_plain_type(self.annotation)) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """The closed set of values, or nothing where it is open."""
        kind = _plain_type(self.annotation)
        return get_args(kind) if get_origin(kind) is Literal else ()

    def check(self, value: object) -> object:
        """`value` in the field's type. Raises ConfigError with the value, the rule and an example."""
        if value is None and self.optional:
            return None
        checked = _convert(self, value)
        if isinstance(checked, int | float) and not isinstance(checked, bool):
            low, high = self.minimum, self.maximum
            if (low is not None and not checked >= low) or (high is not None and not checked <= high):
                limit = low if low is not None and not checked >= low else high
                raise ConfigError(
                    f"{self.name}={value}: must be {self._range()}. Nearest: {self.name}={_plain(limit)}."
                )
        return checked

    def rule(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices) + (", or null" if self.optional else "")
        kind = _plain_type(self.annotation)
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        text = words.get(kind, "a list of texts" if get_args(kind)[:1] == (str,) else "a list of whole numbers")
        if self.size_in_bytes:
            text += " of bytes, or a size such as 512MiB"
        if kind in (int, float) and self._range():
            text += f", {self._range()}"
        return text + (", or null" if self.optional and not self.follows else "")

    def _range(self) -> str:
        match self.minimum, self.maximum:
            case None, None:
                return ""
            case low, None:
                return f"at least {_plain(low)}"
            case None, high:
                return f"at most {_plain(high)}"
            case low, high:
                return f"between {_plain(low)} and {_plain(high)}"


def keys_of(section: type, prefix: str = "") -> tuple[Key, ...]:
    """Every setting of a dataclass made of `setting` fields and of such dataclasses, in the order of the fields."""
    found: list[Key] = []
    hints = get_type_hints(section)
    for item in fields(section):
        name, annotation = prefix + item.name, hints[item.name]
        if is_dataclass(annotation):
            assert isinstance(annotation, type), f"{name}: a section is a dataclass, not an instance of one"
            found += keys_of(annotation, name + ".")
            continue
        meta = dict(item.metadata)
        default = None if meta["follows"] else item.default
        found.append(Key(name=name, annotation=annotation, default=default, **meta))
    return tuple(found)


Report = Callable[[ConfigError], None]
"""Where a problem goes: raised by default; a caller that collects them gets a stand-in value and the next problem."""


def fail(error: ConfigError) -> None:
    """The report that stops at the first problem."""
    raise error


def read_tree(keys: Iterable[Key], tree: Mapping[str, object], *, report: Report = fail) -> dict[str, object]:
    """`tree` (nested mappings) as checked values under dotted names; absent and wrong ones take their defaults.

    Reports an unknown key (naming the nearest one) and a value of a wrong type or range.
    """
    known = {key.name: key for key in keys}
    values = {name: key.default for name, key in known.items()}
    for name, value in _flatten(tree, "", {name.rpartition(".")[0] for name in known} - {""}, report):
        if name not in known:
            report(unknown_key(name, known))
            continue
        try:
            values[name] = known[name].check(value)
        except ConfigError as error:
            report(error)
    return values


def unknown_key(name: str, known: Iterable[str], *, program: str = "python -m moe_runtime") -> ConfigError:
    """The error for a key that does not exist, with the nearest existing one. `program`: whose --help lists them."""
    names = list(known)
    leaves = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f" Did you mean {leaves[0]!r}?" if leaves else _nearest_key(name, names)
    return ConfigError(f"{name}: unknown key.{hint} `{program} --help` lists every key.")


def _nearest_key(name: str, names: Iterable[str]) -> str:
    """The hint at the closest dotted name or last part of one. On a tie the first letter decides: epp is ep, not pp."""

    def closeness(other: str) -> float:
        parts = (other, other.rpartition(".")[2])
        return max(SequenceMatcher(None, name, part).ratio() + 0.01 * (part[0] == name[0]) for part in parts)

    best = max(names, key=closeness)
    return f" Did you mean {best!r}?" if closeness(best) >= 0.6 else ""


def _flatten(
    tree: Mapping[str, object], prefix: str, sections: set[str], report: Report
) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted not in sections:
            yield dotted, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, dotted + ".", sections, report)
        else:
            report(ConfigError(f"{dotted}={value!r}: is a group of keys. Set one of them, e.g. {dotted}.…=…."))


def _plain_type(annotation: Any) -> Any:
    """`X` of `X | None`, else the annotation."""
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _convert(key: Key, value: object) -> object:
    kind = _plain_type(key.annotation)
    if key.choices:
        if value in key.choices:
            return value
        raise ConfigError(f"{key.name}={shown(value)}: must be {key.rule()}.{nearest(str(value), key.choices)}")
    if key.size_in_bytes and isinstance(value, str):
        value = _parse_bytes(value)
    match value:
        case bool() if kind is bool:
            return value
        case bool():
            pass
        case int() if kind is int:
            return value
        case int() | float() if kind is float:
            return float(value)
        case str() if kind is str and value:
            return value
        case list() | tuple() if get_origin(kind) is tuple:
            element = get_args(kind)[0]
            if all(isinstance(part, element) and not isinstance(part, bool) and part != "" for part in value):
                return tuple(value)
    raise ConfigError(f"{key.name}={shown(value)}: must be {key.rule()}. Example: {key.name}={_example(key)}")


def _parse_bytes(text: str) -> object:
    """A size such as 1.5GiB in bytes; the text itself where it is none."""
    for unit, scale in _BYTE_UNITS:
        number = text.removesuffix(unit).strip()
        if number != text.strip() and number.replace(".", "", 1).isdecimal():
            return int(float(number) * scale)
    return text


def _example(key: Key) -> str:
    if key.size_in_bytes:
        return "512MiB"
    default = key.default
    if default is None and not key.is_list:
        kind = _plain_type(key.annotation)
        return "8" if kind is int else "my_file.jsonl"
    if default is not None and default != ():
        return shown(default)
    return "'[\"end\"]'" if get_args(_plain_type(key.annotation))[:1] == (str,) else "[1,7]"


def shown(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case "":
            return "(nothing)"
        case list() | tuple():
            return "[" + ",".join(map(str, value)) + "]"
        case _:
            return str(value)


def _plain(number: int | float | None) -> str:
    if isinstance(number, int):
        return str(number)
    return f"{number:g}" if number is not None else ""
