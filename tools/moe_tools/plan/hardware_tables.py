"""The form of the measured tables of a hardware entry, checked when it is read: wrong files fail here, with names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeGuard

from moe_runtime.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Form:
    """`axes`: lists of rising numbers. `values`: lists of as many numbers, nested in the order of the axes.
    `numbers`: single ones; `fixed_us` must lie below every microsecond."""

    axes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    points: int | None = None
    """Entries of each axis, where it is not free."""

    @property
    def fields(self) -> tuple[str, ...]:
        return ("source", *self.axes, *self.values, *self.numbers)


_FIXED: Final = ("fixed_us",)
_VALUE: Final = Form(numbers=("value",))
_FORMS: Final[Mapping[str, Mapping[str, Form]]] = MappingProxyType(
    {
        "kernels": MappingProxyType(
            {
                "masked": Form(("slots", "rows"), ("us",), _FIXED),
                "fused_cutlass": Form(("slots", "rows"), ("us",), _FIXED),
                "contiguous": Form(("ep",), ("flops_per_s",), _FIXED),
                "linear_fp8": Form(("weights", "rows"), ("us",), _FIXED),
                "linear_bf16": Form(("weights", "rows"), ("us",), _FIXED),
                "absorb": Form(("rows",), ("us",), _FIXED),
                "mla_decode": Form(("seqs",), ("us",), _FIXED),
                "mla_decode_fp8": Form(("seqs",), ("us",), _FIXED),
                "mla_prefill": Form(("tokens",), ("us",), points=2),
                "shared": Form(("rows",), ("us",), _FIXED),
            }
        ),
        "wire": MappingProxyType(
            {
                "low_latency": Form(("ep",), ("dispatch_us", "combine_us"), ("tokens",)),
                "normal_nvlink": Form(numbers=("dispatch_bytes_per_s", "combine_bytes_per_s")),
                "normal_network": Form(numbers=("dispatch_bytes_per_s", "combine_bytes_per_s")),
                "nvlink_rate": _VALUE,
                "nvlink_fixed_us": _VALUE,
                "network_fixed_us": _VALUE,
                "collective_fixed_us": _VALUE,
            }
        ),
    }
)


def is_number(value: object) -> TypeGuard[int | float]:
    """A finite number above 0, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def known_keys(place: str, entry: Iterable[str], known: Sequence[str]) -> None:
    """ConfigError for the first key that is none of `known`, with the nearest one."""
    for key in entry:
        if key not in known:
            raise ConfigError(f"{place}: {key}: unknown key.{nearest(key, known)} There are {', '.join(known)}.")


def check_tables(place: str, part: str, tables: object) -> Mapping[str, Mapping[str, Any]]:
    """`tables`, the entry's "kernels" or "wire". ConfigError where one of them is unknown or not of its form."""
    forms = _FORMS[part]
    if not isinstance(tables, dict):
        raise ConfigError(f"{place}: {part} must be a JSON object of tables, or be left out.")
    known_keys(f"{place}: {part}", tables, tuple(forms))
    for name, table in tables.items():
        _check(f"{place}: {part}.{name}", table, forms[name])
    return tables


def _check(place: str, table: object, form: Form) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{place}: must be a JSON object with {', '.join(form.fields)}.")
    known_keys(place, table, form.fields)
    if missing := [field for field in form.fields if field not in table]:
        raise ConfigError(f"{place}: lacks {', '.join(missing)}. It must have {', '.join(form.fields)}.")
    if not isinstance(table["source"], str) or not table["source"]:
        raise ConfigError(f"{place}.source: must say where the numbers are from.")
    for field in form.numbers:
        if not is_number(table[field]):
            raise ConfigError(f"{place}.{field}={table[field]!r}: must be a finite number above 0.")
    for axis in form.axes:
        _check_axis(f"{place}.{axis}", table[axis], form.points)
    lengths = [len(table[axis]) for axis in form.axes]
    for field in form.values:
        least = _least(f"{place}.{field}", table[field], lengths)
        if "fixed_us" in form.numbers and field.endswith("us") and least <= table["fixed_us"]:
            raise ConfigError(f"{place}.fixed_us={table['fixed_us']:g}: must be below the least of {field}, {least:g}.")


def _check_axis(place: str, values: object, points: int | None) -> None:
    rising = isinstance(values, list) and all(map(is_number, values)) and values == sorted(set(values))
    if not rising or not isinstance(values, list) or len(values) < 2 or len(values) != (points or len(values)):
        count = "at least 2" if points is None else str(points)
        raise ConfigError(f"{place}={values!r}: must be a list of {count} finite numbers above 0, each above the last.")


def _least(place: str, values: object, lengths: Sequence[int]) -> float:
    """The least of the numbers, which must be nested lists of `lengths`."""
    if not isinstance(values, list) or len(values) != lengths[0]:
        seen = f"{len(values)}" if isinstance(values, list) else repr(values)
        raise ConfigError(f"{place}: has {seen} entries; its axis has {lengths[0]}. Give a list of as many.")
    if len(lengths) > 1:
        return min(_least(f"{place}[{index}]", value, lengths[1:]) for index, value in enumerate(values))
    if bad := [value for value in values if not is_number(value)]:
        raise ConfigError(f"{place}: {bad[0]!r}: must be a finite number above 0.")
    return float(min(values))
