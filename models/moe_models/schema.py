"""A strict reader of config.json: every key is read, ignored by name, or an error that names the nearest known key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NoReturn

from moe_runtime.errors import ConfigError, nearest

_MAX_BYTES: Final = 16 * 2**20

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def read_json_object(path: Path) -> dict[str, Json]:
    """Parse a JSON file whose top is an object; duplicate keys, NaN and files over 16 MiB are ConfigErrors."""

    def no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        merged: dict[str, Json] = {}
        for key, value in pairs:
            if key in merged:
                raise ConfigError(f"{path}: key {key!r} is there twice ({merged[key]!r} and {value!r}). Keep one.")
            merged[key] = value
        return merged

    def no_constants(name: str) -> NoReturn:
        raise ConfigError(f"{path}: {name} is not a number that JSON allows. Give a finite value.")

    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes; a configuration file has at most {_MAX_BYTES}.")
        parsed = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constants
        )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Download the file again.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not usable as JSON ({error}). Download the file again.") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: the top is a {type(parsed).__name__}; a configuration is a JSON object {{...}}.")
    return parsed


class ObjectReader:
    """Reads one JSON object key by key and remembers which keys are known; `finish()` refuses the others.

    A getter without a `default` requires the key; one with a default returns it for `null` too. Every getter raises
    ConfigError naming file, key, value, rule and remedy.
    """

    def __init__(self, values: Mapping[str, Json], source: str) -> None:
        self._values = values
        self._source = source
        self._known: set[str] = set()

    def fail(self, key: str, rule: str) -> NoReturn:
        raise ConfigError(f"{self._source}: {key}={self._values.get(key)!r}: {rule}")

    def has(self, key: str) -> bool:
        """True where the key is there and not null."""
        self._known.add(key)
        return self._values.get(key) is not None

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"must be a whole number of at least {minimum}{_spelled_as_text(value)}.")
        if value < minimum:
            self.fail(key, f"must be at least {minimum}.")
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        return self.integer(key, minimum=minimum) if self.has(key) else None

    def number(self, key: str, *, default: float | None = None, zero_allowed: bool = False) -> float:
        """A finite number above 0 (or of at least 0)."""
        value = self._get(key, default)
        rule = "of at least 0" if zero_allowed else "above 0"
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"must be a number {rule}{_spelled_as_text(value)}.")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            self.fail(key, f"must be a finite number {rule}.")
        return float(value)

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "must be true or false (without quotes).")
        return value

    def choice(self, key: str, choices: Iterable[str], *, default: str | None = None) -> str:
        value = self._get(key, default)
        allowed = sorted(choices)
        if not isinstance(value, str) or value not in allowed:
            hint = nearest(value, allowed) if isinstance(value, str) else ""
            self.fail(key, f"must be one of {', '.join(map(repr, allowed))}.{hint}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; null and absent are the empty tuple."""
        if not self.has(key):
            return ()
        value = self._values[key]
        ids = value if isinstance(value, list) else [value]
        found = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
        if len(found) != len(ids):
            self.fail(key, "must be a token id (a whole number of at least 0) or a list of token ids.")
        return found

    def nested(self, key: str) -> ObjectReader | None:
        """A reader of the object under `key`; null and absent are None."""
        if not self.has(key):
            return None
        value = self._values[key]
        if not isinstance(value, dict):
            self.fail(key, 'must be an object {"...": ...} or null.')
        return ObjectReader(value, f"{self._source}: {key}")

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._get(key, None)
        if not isinstance(value, list):
            self.fail(key, "must be a list of whole numbers.")
        found = tuple(i for i in value if isinstance(i, int) and not isinstance(i, bool))
        if len(found) != len(value):
            self.fail(key, "must be a list of whole numbers.")
        return found

    def require(self, key: str, expected: Json, *, because: str) -> None:
        """Accept a key only where it is absent, null or the one value that is supported."""
        if self.has(key) and self._values[key] != expected:
            self.fail(key, f"only {json.dumps(expected)} is supported: {because}.")

    def ignore(self, *keys: str) -> None:
        """Keys that cannot change what the model computes."""
        self._known.update(keys)

    def finish(self) -> None:
        """Raise ConfigError for keys that nobody asked for; keys that start with an underscore are metadata."""
        unknown = sorted(k for k in self._values if k not in self._known and not k.startswith("_"))
        if unknown:
            key = unknown[0]
            more = f" (and {len(unknown) - 1} more: {', '.join(unknown[1:6])})" if len(unknown) > 1 else ""
            raise ConfigError(
                f"{self._source}: unknown key {key!r}={self._values[key]!r}{more}; a key that is not understood could "
                f"have an effect on the result.{nearest(key, self._known)} Correct it, or remove it if it has none."
            )

    def _get(self, key: str, default: Json) -> Json:
        self._known.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            absent = "is null" if key in self._values else "is missing"
            close = nearest(key, (k for k in self._values if k not in self._known))
            raise ConfigError(f"{self._source}: key {key!r} {absent} and the model cannot be built without it.{close}")
        return default


def _spelled_as_text(value: Json) -> str:
    return " (without quotes)" if isinstance(value, str) else ""
