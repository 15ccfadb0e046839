"""Hardware entries: datasheet rates and measured tables from configs/hardware, each number with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_runtime.errors import ConfigError, nearest
from moe_runtime.launch.data import data_path
from moe_tools.bench.floor import Hardware
from moe_tools.plan.hardware_tables import check_tables, is_number, known_keys

_RATES: Final = ("memory_bytes_per_s", "bf16_flops", "fp8_flops", "nvlink_bytes_per_s", "network_bytes_per_s")
_COUNTS: Final = ("memory_bytes", "nvlink_ranks", "host_ranks")
_KEYS: Final = ("name", *_RATES, *_COUNTS, "kernels", "wire")
MEASURED: Final = "h200"
"""The entry whose kernel and wire tables serve the others, scaled by the floors."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU and its links. `kernels`, `wire`: measured tables, as the file has them; empty where nobody measured."""

    key: str
    rates: Hardware
    memory_bytes: int
    nvlink_ranks: int
    """Ranks that reach each other over NVLink."""
    host_ranks: int
    """GPUs of one host: processes that one launcher starts."""
    kernels: Mapping[str, Mapping[str, Any]]
    wire: Mapping[str, Mapping[str, Any]]
    sources: tuple[tuple[str, str], ...]
    """(number or table, where it is from)."""


def hardware_names() -> tuple[str, ...]:
    """The entries that ship with the project, sorted."""
    return tuple(sorted(path.stem for path in data_path("configs", "hardware").glob("*.json")))


def load_machine(name: str) -> Machine:
    """The entry `name`, or a JSON file of the same form.

    Raises ConfigError where it is unknown, lacks a number, or holds a key, a value or a table that is none.
    """
    known = hardware_names()
    if name in known:
        path = data_path("configs", "hardware", f"{name}.json")
    elif name.endswith(".json") and Path(name).is_file():
        path = Path(name)
    else:
        raise ConfigError(
            f"hardware={name}: no such entry. There are {', '.join(known)}; or give a JSON file of the same form."
            f"{nearest(name, known)}"
        )
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"hardware={name}: cannot be read ({error}). Give a JSON file.") from error
    return _machine(name, entry)


def _machine(name: str, entry: object) -> Machine:
    if not isinstance(entry, dict):
        raise ConfigError(f"hardware={name}: must be a JSON object. Copy configs/hardware/{MEASURED}.json and edit it.")
    known_keys(f"hardware={name}", entry, _KEYS)
    rates = [_number(name, entry, key) for key in _RATES]
    memory, nvlink_ranks, host_ranks = (_count(name, entry, key) for key in _COUNTS)
    kernels, wire = (check_tables(f"hardware={name}", part, entry.get(part, {})) for part in ("kernels", "wire"))
    gpu = Hardware(str(entry.get("name", name)), *rates)
    return Machine(name, gpu, memory, nvlink_ranks, host_ranks, kernels, wire, tuple(_sources("", entry)))


def _number(name: str, entry: Mapping[str, Any], key: str) -> float:
    found = entry.get(key)
    value = source = None
    if isinstance(found, dict):
        known_keys(f"hardware={name}: {key}", found, ("value", "source"))
        value, source = found.get("value"), found.get("source")
    if not is_number(value) or not isinstance(source, str) or not source:
        raise ConfigError(
            f"hardware={name}: {key}={_shown(found)}: must be "
            f'{{"value": a finite number above 0, "source": where it is from}}.'
        )
    return float(value)


def _count(name: str, entry: Mapping[str, Any], key: str) -> int:
    value = _number(name, entry, key)
    if not value.is_integer():
        raise ConfigError(
            f"hardware={name}: {key}={value:g}: must be a whole number of at least 1. Nearest: {max(1, round(value))}."
        )
    return int(value)


def _shown(found: object) -> str:
    return "nothing" if found is None else json.dumps(found)


def _sources(prefix: str, entry: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in entry.items():
        if isinstance(value, dict):
            if "source" in value:
                found.append((prefix + key, str(value["source"])))
            found += _sources(f"{prefix}{key}.", value)
    return found
