"""The parts of a trace: safetensors files of windows, routes and moved experts. Symbols as in trace.py.

w windows, n tokens and c changes of one part, P slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moe_runtime.balance.trace_header import FORMAT, VERSION, TraceHeader
from moe_runtime.errors import TraceError

PHASES: Final = ("decode", "mixed")
"""In the files, a phase is its index here."""

_MOST: Final = 2**53
"""Numbers and their sums are below it: exact as floats, too"""
_AT_ONCE: Final = 8192
"""Tokens whose routes are counted at once: some 30 MB for 58 layers"""
_AGAIN: Final = "The file was changed or mixed up: record again."
_PART: Final = re.compile(r"part-(\d{5,})\.safetensors")


class Column(NamedTuple):
    """A tensor of a part: its first dim is w, n or c, then these of the header."""

    dtype: torch.dtype
    dims: tuple[str, ...] = ()
    least: int = 0
    optional: bool = False
    """Zeros where a part does not have it"""


WINDOW_COLUMNS: Final[Mapping[str, Column]] = MappingProxyType(
    {
        "loads": Column(torch.int64, ("num_layers", "num_logical")),
        "rank_loads": Column(torch.int64, ("num_layers", "ep")),
        "phases": Column(torch.uint8),
        "window_steps": Column(torch.int64, least=1),
        "num_tokens": Column(torch.int64),
        "first_step": Column(torch.int64),
        "last_step": Column(torch.int64),
    }
)
TOKEN_COLUMNS: Final[Mapping[str, Column]] = MappingProxyType(
    {
        "routes": Column(torch.int16, ("num_layers", "top_k"), least=-1),
        "request": Column(torch.int64),
        "position": Column(torch.int64),
        "step": Column(torch.int64),
        "home": Column(torch.int64),
        "is_prompt": Column(torch.bool),
        "window": Column(torch.int64),
        "micro_batch": Column(torch.uint8, optional=True),
    }
)
"""`window` counts within the part there, within the trace in a Trace."""
CHANGE_COLUMNS: Final[Mapping[str, Column]] = MappingProxyType(
    {
        "change_step": Column(torch.int64),
        "change_layer": Column(torch.int64),
        "change_phy2log": Column(torch.int16, ("num_physical",)),
    }
)


class Change(NamedTuple):
    """Experts of one layer that moved while the run served."""

    step: int
    """The first one that ran with them where they are now"""
    layer: int
    """MoE layer"""
    row: tuple[int, ...]
    """[P] logical ids: the layer's row of phy2log from then on"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Window:
    """The loads of some steps of one phase, of all ranks."""

    phase: str
    first_step: int
    last_step: int
    num_steps: int
    num_tokens: int
    loads: Tensor
    """[L, E] int64"""
    rank_loads: Tensor
    """[L, ep] int64"""


class PartsGoneError(TraceError):
    """Parts that the header names are not there: a run that writes has dropped them, or they were never copied."""


def part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def part_bytes(header: TraceHeader, *, windows: int, tokens: int, changes: int = 0) -> int:
    """What so many windows, tokens with routes and moved layers take in a part, but for its few hundred bytes of
    names."""
    total = 0
    for columns, count in ((WINDOW_COLUMNS, windows), (TOKEN_COLUMNS, tokens), (CHANGE_COLUMNS, changes)):
        for column in columns.values():
            total += count * column.dtype.itemsize * _product(header, column.dims)
    return total


def encode_part(windows: Sequence[Window], tokens: Mapping[str, Tensor], changes: Sequence[Change] = ()) -> bytes:
    """A part of these windows; `tokens`: TOKEN_COLUMNS, or nothing."""
    columns = {
        "loads": torch.stack([window.loads for window in windows]),
        "rank_loads": torch.stack([window.rank_loads for window in windows]),
        "phases": torch.tensor([PHASES.index(window.phase) for window in windows], dtype=torch.uint8),
        "window_steps": torch.tensor([window.num_steps for window in windows]),
        "num_tokens": torch.tensor([window.num_tokens for window in windows]),
        "first_step": torch.tensor([window.first_step for window in windows]),
        "last_step": torch.tensor([window.last_step for window in windows]),
        **tokens,
    }
    if changes:
        columns |= {
            "change_step": torch.tensor([change.step for change in changes]),
            "change_layer": torch.tensor([change.layer for change in changes]),
            "change_phy2log": torch.tensor([change.row for change in changes], dtype=torch.int16),
        }
    data: bytes = save(
        {name: column.contiguous() for name, column in columns.items()},
        metadata={"format": FORMAT, "version": str(VERSION)},
    )
    return data


def read_parts(folder: Path, header: TraceHeader) -> list[dict[str, Tensor]]:
    """The checked columns of each part, in order. TraceError; PartsGoneError where one of the header's is missing."""
    found = {int(match[1]): file for file in folder.iterdir() if (match := _PART.fullmatch(file.name))}
    numbers = range(header.first_part, max(header.next_part, *(number + 1 for number in found), 0))
    gone = next((number for number in numbers if number not in found), None)
    if gone is not None:
        missing = len(numbers) - sum(number in numbers for number in found)
        raise PartsGoneError(
            f"{str(folder)!r}: {part_name(gone)} is missing ({missing} parts are), {header.first_part} to "
            f"{numbers.stop - 1} must be there. Copy the whole folder, or record again."
        )
    return [read_part(found[number], header) for number in numbers]


def read_part(file: Path, header: TraceHeader) -> dict[str, Tensor]:
    """The checked columns of one part. TraceError; PartsGoneError where the file has just been dropped."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise PartsGoneError(f"{str(file)!r} is gone.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise TraceError(
            f"{str(file)!r} cannot be read: {error}. It was cut short or is no part of a trace: copy it again, or "
            "record again."
        ) from error
    try:
        return check_columns(header, tensors)
    except TraceError as error:
        raise TraceError(f"{str(file)!r}: {error}") from error


def check_columns(header: TraceHeader, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All columns of a part; those of tokens and of changes are empty where it has none. TraceError where one is not as
    recorded, or they contradict each other."""
    found: dict[str, Tensor] = {}
    for columns, leader in ((WINDOW_COLUMNS, "loads"), (TOKEN_COLUMNS, "routes"), (CHANGE_COLUMNS, "change_step")):
        absent = [name for name, column in columns.items() if name not in tensors and not column.optional]
        if absent and (columns is WINDOW_COLUMNS or any(name in tensors for name in columns)):
            raise TraceError(f"the tensor {absent[0]} is missing. Record again.")
        if absent:
            found |= empty_columns(header, columns)
            continue
        count = tensors[leader].shape[0] if tensors[leader].dim() else 0
        for name, column in columns.items():
            shape = (count, *(getattr(header, dim) for dim in column.dims))
            found[name] = tensors[name] if name in tensors else torch.zeros(shape, dtype=column.dtype)
            _check(name, found[name], column, shape)
    _in_range("phases", found["phases"], len(PHASES))
    _in_range("routes", found["routes"], header.num_logical)
    _in_range("window", found["window"], found["loads"].shape[0])
    _in_range("home", found["home"], header.ep)
    _in_range("change_layer", found["change_layer"], header.num_layers)
    _in_range("change_phy2log", found["change_phy2log"], header.num_logical)
    check_sums(found)
    return found


def check_sums(columns: Mapping[str, Tensor]) -> None:
    """TraceError where the counts of a part contradict each other: a window's rows are its assignments, which its
    tokens chose; where the routes of all its tokens are there, they add up to its loads."""
    loads, rank_loads, num_tokens = columns["loads"], columns["rank_loads"], columns["num_tokens"]
    for name in ("loads", "rank_loads", "num_tokens", "window_steps"):
        if (total := float(columns[name].double().sum())) >= _MOST:
            raise TraceError(f"{name} adds up to {total:.4g}: must be below 2^53. {_AGAIN}")
    assigned, received = loads.sum(2), rank_loads.sum(2)
    if place := _first(assigned != received):
        raise TraceError(
            f"rank_loads{place} adds up to {int(received[tuple(place)])} rows, loads{place} to "
            f"{int(assigned[tuple(place)])} assignments: they must be equal. {_AGAIN}"
        )
    if place := _first((num_tokens == 0) & (assigned > 0).any(1)):
        raise TraceError(f"num_tokens{place} is 0, and loads{place} are not: tokens choose experts. {_AGAIN}")
    if not len(columns["routes"]):
        return
    routed = columns["window"].bincount(minlength=len(loads))
    if place := _first(routed > num_tokens):
        raise TraceError(
            f"num_tokens{place} is {int(num_tokens[tuple(place)])}: {int(routed[tuple(place)])} tokens of that window "
            f"have routes. {_AGAIN}"
        )
    counted = loads_of_routes(columns["routes"], columns["window"], loads.shape)
    whole = (routed == num_tokens).view(-1, 1, 1)
    if place := _first((counted != loads) & whole):
        raise TraceError(
            f"loads{place} is {int(loads[tuple(place)])}: the routes of all its tokens give "
            f"{int(counted[tuple(place)])}. {_AGAIN}"
        )


def loads_of_routes(routes: Tensor, window: Tensor, shape: Sequence[int]) -> Tensor:
    """`[W, L, E] int64`, which is `shape`: assignments that `routes [N, L, K]` of tokens of `window [N]` make."""
    windows, layers, experts = shape
    counts = torch.zeros(windows * layers * (experts + 1), dtype=torch.int64)
    for first in range(0, len(routes), _AT_ONCE):
        ids = routes[first : first + _AT_ONCE].long()
        ids = torch.where(ids < 0, experts, ids)
        place = window[first : first + _AT_ONCE].view(-1, 1, 1) * layers + torch.arange(layers).view(1, -1, 1)
        index = (place * (experts + 1) + ids).flatten()
        counts.scatter_add_(0, index, torch.ones_like(index))
    return counts.view(windows, layers, experts + 1)[:, :, :experts].contiguous()


def _first(wrong: Tensor) -> list[int]:
    """The place of the first True; empty where there is none."""
    places: list[list[int]] = wrong.nonzero()[:1].tolist()
    return places[0] if places else []


def empty_columns(header: TraceHeader, columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """Columns without entries."""
    return {
        name: torch.empty(0, *(getattr(header, dim) for dim in column.dims), dtype=column.dtype)
        for name, column in columns.items()
    }


def _check(name: str, tensor: Tensor, column: Column, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise TraceError(f"{name} is {tuple(tensor.shape)}, the header says {shape}. It is of another trace.")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        where = (~tensor.isfinite()).nonzero()[0].tolist()
        raise TraceError(f"{name}{where} is {float(tensor[tuple(where)])}: counts must be whole numbers. Record again.")
    if tensor.dtype != column.dtype:
        raise TraceError(f"{name} is {tensor.dtype}: must be {column.dtype}. Record again.")
    if tensor.dtype == torch.int64:
        _in_range(name, tensor, _MOST)
    if tensor.dtype != torch.bool and tensor.numel() and int(tensor.min()) < column.least:
        where = (tensor < column.least).nonzero()[0].tolist()
        raise TraceError(
            f"{name}{where} is {int(tensor[tuple(where)])}: must be at least {column.least}. Record again."
        )


def _in_range(name: str, tensor: Tensor, end: int) -> None:
    if tensor.numel() and int(tensor.max()) >= end:
        where = (tensor >= end).nonzero()[0].tolist()
        raise TraceError(f"{name}{where} is {int(tensor[tuple(where)])}: must be below {end}. Record again.")


def _product(header: TraceHeader, dims: Sequence[str]) -> int:
    total = 1
    for dim in dims:
        total *= int(getattr(header, dim))
    return total


def stray_parts(folder: Path) -> Iterator[Path]:
    """Parts in `folder`, whoever wrote them."""
    return (file for file in folder.iterdir() if _PART.fullmatch(file.name))
