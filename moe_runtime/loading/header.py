"""The header of one safetensors file, parsed and checked by hand.

The safetensors library accepts duplicate names (the last one wins) and its errors name no file; a body cut short is
found by comparing the header's offsets with the size of the file, so no weights are read here.
Layout: 8 bytes little-endian header length, that many bytes of JSON, the data; offsets count from the data's start.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from moe_runtime.errors import CheckpointError, nearest

# About 91,000 tensors of a 671B FP8 checkpoint take some 12 MB of header: a single file that held them all would fit.
_MAX_HEADER_BYTES: Final = 64 * 2**20
_MAX_TENSORS: Final = 1_000_000
_LENGTH_BYTES: Final = 8
_MAX_COMPARED: Final = 1000

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)

AGAIN: Final = "Download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `num_bytes` bytes from `offset` (counted from the start of `file`), row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file by name. Raises CheckpointError naming file, tensor, expected and got."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = _header_length(file, size, stream.read(_LENGTH_BYTES))
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Check the path and permissions.") from error
    data_start = _LENGTH_BYTES + length
    infos = {name: _entry(file, name, entry, data_start) for name, entry in _parse(file, raw).items()}
    _check_layout(file, infos, data_start, size)
    return infos


def _header_length(file: Path, size: int, prefix: bytes) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointError(f"{file}: expected at least {_LENGTH_BYTES} bytes of safetensors, got {size}. {AGAIN}.")
    if prefix == b"version ":
        raise CheckpointError(f"{file}: expected a safetensors file, got a Git LFS pointer to it. Run `git lfs pull`.")
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length} "
            f"from its first 8 bytes. {AGAIN}."
        )
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: truncated inside its header: expected {length} header bytes, got {size - _LENGTH_BYTES}. {AGAIN}."
        )
    return length


def _parse(file: Path, raw: bytes) -> dict[str, object]:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        merged: dict[str, object] = {}
        for key, value in pairs:
            if key in merged:
                raise CheckpointError(
                    f"{file}: tensor {key!r}: expected one entry in the header, got {merged[key]!r:.80} and "
                    f"{value!r:.80}. {AGAIN}."
                )
            merged[key] = value
        return merged

    try:
        header = json.loads(raw, object_pairs_hook=no_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not JSON ({error}). {AGAIN}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is a {type(header).__name__}; expected a JSON object. {AGAIN}.")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{file}: {len(header)} tensors; expected at most {_MAX_TENSORS} in one file.")
    return header


def _entry(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected fields dtype, shape and data_offsets, got {entry!r:.120}. {AGAIN}.")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        hint = nearest(str(entry["dtype"]), _DTYPES)
        raise CheckpointError(
            f"{where}: expected a dtype of {', '.join(_DTYPES)}, got {entry['dtype']!r}.{hint} Convert it to BF16."
        )
    shape, offsets = _naturals(entry["shape"]), _naturals(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: expected a shape and two ascending offsets in whole numbers of at least 0, "
            f"got shape {entry['shape']!r:.80} and data_offsets {entry['data_offsets']!r:.80}. {AGAIN}."
        )
    expected, got = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if expected != got:
        raise CheckpointError(
            f"{where}: expected {expected} bytes for {entry['dtype']} {list(shape)}, got {got} bytes from its offsets "
            f"{list(offsets)}. {AGAIN}."
        )
    return TensorInfo(name, dtype, shape, file, data_start + offsets[0], got)


def _check_layout(file: Path, infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors must tile the data: no overlap, no hole, nothing missing at the end, nothing after it."""
    end, previous = data_start, "the header"
    for info in sorted(infos.values(), key=lambda i: (i.offset, i.num_bytes)):
        if info.offset != end:
            fault = "overlaps" if info.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor {info.name!r} {fault} {previous}: expected it to start at byte {end - data_start} of "
                f"the data, got {info.offset - data_start}. {AGAIN}."
            )
        if info.offset + info.num_bytes > size:
            raise CheckpointError(
                f"{file}: truncated inside tensor {info.name!r}: expected a file of at least "
                f"{info.offset + info.num_bytes} bytes, got {size}. {AGAIN}."
            )
        end, previous = info.offset + info.num_bytes, repr(info.name)
    if end != size:
        raise CheckpointError(f"{file}: expected {end} bytes up to the end of {previous}, got {size}. {AGAIN}.")


def _naturals(value: object) -> tuple[int, ...] | None:
    """`value` as whole numbers of at least 0 that fit 63 bits, or None."""
    if not isinstance(value, list):
        return None
    found = tuple(i for i in value if type(i) is int and 0 <= i < 2**63)
    return found if len(found) == len(value) else None


def similar_name(name: str, names: Iterable[str]) -> str:
    """`nearest` among the names that differ in one dotted part: comparing with all of 90,000 would take seconds."""
    parts = name.split(".")
    close = (n for n in names if len(theirs := n.split(".")) == len(parts) and _num_different(theirs, parts) <= 1)
    return nearest(name, itertools.islice(close, _MAX_COMPARED))


def _num_different(left: list[str], right: list[str]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))
