"""A folder of safetensors files: what is in it, and regions of its tensors.

A region is read with pread straight into the tensor that is returned, so host memory grows by exactly that region.
Memory mapping would count touched pages of the file as this process's and end it by SIGBUS when the file shrinks.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from moe_runtime.errors import CheckpointError
from moe_runtime.loading.header import AGAIN, TensorInfo, read_header, similar_name

__all__ = ["Checkpoint", "Region", "TensorInfo"]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_MAX_INDEX_BYTES: Final = 256 * 2**20
# Linux reads at most this many bytes in one call.
_MAX_READ_BYTES: Final = 0x7FFF_F000

Region = tuple[slice, ...]
"""One slice of step 1 per dim, as for indexing; missing dims are whole."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one folder. Only headers have been read; the object holds no open files and is thread-safe."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @staticmethod
    def open(folder: Path | str) -> Checkpoint:
        """Check the index against its shards and every header against its file.

        Raises CheckpointError naming file, tensor, expected, got and the fix.
        """
        root = Path(folder)
        index = root / _INDEX
        if index.is_file():
            tensors = _open_sharded(root, _read_index(index))
        elif (root / _SINGLE).is_file():
            tensors = read_header(root / _SINGLE)
        else:
            raise CheckpointError(_nothing_found(root))
        return Checkpoint(root, MappingProxyType(tensors))

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError where the checkpoint has no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r}: expected it in the checkpoint, got no tensor of that name."
                f"{similar_name(name, self.tensors)} Download the whole checkpoint, or use its own config.json."
            )
        return info

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """The region of one tensor, contiguous, in its stored dtype, reading only the region's bytes.

        Only the first two dims may be cut. Raises CheckpointError where the file cannot be read or has shrunk.
        """
        info = self.info(name)
        bounds = _bounds(info, region or ())
        shape = tuple(stop - start for start, stop in bounds)
        out = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        if out.numel():
            try:
                _read_into(out, info, bounds)
            except OSError as error:
                raise CheckpointError(f"{info.file}: tensor {name!r}: cannot be read ({error.strerror}).") from error
        return out.view(info.dtype).view(shape)


def _bounds(info: TensorInfo, region: Region) -> list[tuple[int, int]]:
    """First and last index of every dim, clipped to the tensor as Python's slices are."""
    if len(region) > len(info.shape):
        raise ValueError(f"region {region} of {info.name!r} has more dims than its shape {info.shape}")
    bounds = [(0, size) for size in info.shape]
    for dim, cut in enumerate(region):
        start, stop, step = cut.indices(info.shape[dim])
        if step != 1 or (dim >= 2 and (start, stop) != bounds[dim]):
            raise ValueError(f"region {region} of {info.name!r} {info.shape}: only step 1 and only in dims 0 and 1")
        bounds[dim] = (start, max(start, stop))
    return bounds


def _read_into(out: Tensor, info: TensorInfo, bounds: list[tuple[int, int]]) -> None:
    """Whole rows are one run of bytes; a cut of dim 1 is one run per row."""
    view = memoryview(out.numpy())  # type: ignore[arg-type]
    row_bytes = info.num_bytes // info.shape[0] if info.shape else info.num_bytes
    first, last = bounds[0] if bounds else (0, 1)
    fd = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if len(bounds) < 2 or bounds[1] == (0, info.shape[1]):
            _read_run(fd, view, info, info.offset + first * row_bytes)
            return
        column_bytes = row_bytes // info.shape[1]
        skip, width = bounds[1][0] * column_bytes, (bounds[1][1] - bounds[1][0]) * column_bytes
        for i, row in enumerate(range(first, last)):
            _read_run(fd, view[i * width : (i + 1) * width], info, info.offset + row * row_bytes + skip)
    finally:
        os.close(fd)


def _read_run(fd: int, view: memoryview, info: TensorInfo, offset: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _MAX_READ_BYTES]], offset + done)
        if got == 0:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r}: expected {len(view)} bytes at byte {offset}, got {done}; the file "
                f"has shrunk since it was opened. {AGAIN}, and do not change it during a run."
            )
        done += got


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name → shard file name, as the index says."""

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        merged: dict[str, object] = {}
        for key, value in pairs:
            if key in merged:
                raise CheckpointError(
                    f"{index}: tensor {key!r}: expected one shard, got {merged[key]!r} and {value!r}. {AGAIN}."
                )
            merged[key] = value
        return merged

    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{index}: {index.stat().st_size} bytes; expected at most {_MAX_INDEX_BYTES}.")
        parsed = json.loads(index.read_bytes(), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}).") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not JSON ({error}). {AGAIN}.") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object 'weight_map' of tensor names to file names. {AGAIN}.")
    for name, file in weight_map.items():
        # A shard lies beside its index: no path may lead out of the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name!r}: expected the name of a .safetensors file, got {file!r}.")
    return weight_map


def _open_sharded(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    expected: defaultdict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        expected[file].add(name)
    strays = {p.name for p in folder.glob("model-*-of-*.safetensors")} - expected.keys()
    if strays:
        raise CheckpointError(
            f"{folder / min(strays)}: expected every shard to be in {_INDEX}, got one that is not named there. "
            f"{AGAIN.replace('file', 'index')}, or remove the shard."
        )
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(expected):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / file}: missing: {_INDEX} expects it with {len(expected[file])} tensors such as "
                f"{min(expected[file])!r}, got no such file. Download it."
            )
        found = read_header(folder / file)
        _check_shard(folder / file, expected[file], found, weight_map, tensors)
        tensors.update(found)
    return tensors


def _check_shard(
    file: Path,
    expected: set[str],
    found: Mapping[str, TensorInfo],
    weight_map: Mapping[str, str],
    before: Mapping[str, TensorInfo],
) -> None:
    for name in sorted(found.keys() & before.keys()):
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected in one shard only, got it in {before[name].file.name} too. {AGAIN}."
        )
    for name in sorted(expected - found.keys()):
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected in this shard by {_INDEX}, got {len(found)} tensors without it."
            f"{similar_name(name, found)} {AGAIN}."
        )
    for name in sorted(found.keys() - expected):
        says = f"the index says {weight_map[name]}" if name in weight_map else "the index does not name it"
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected only what {_INDEX} lists here, got it in this shard ({says}). {AGAIN}."
        )


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: expected a checkpoint folder, got no such folder."
    wanted = f"expected {_SINGLE}, or shards with {_INDEX}"
    shards = _names(folder.glob("*.safetensors"))
    if shards:
        return f"{folder}: {wanted}, got {shards} without an index. Download {_INDEX} too."
    pickles = _names(p for ending in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ending))
    if pickles:
        return f"{folder}: {wanted}, got {pickles}. Pickled weights can run code and are not read; convert them."
    return f"{folder}: {wanted}, got neither. Download the weights into this folder."


def _names(paths: Iterable[Path]) -> str:
    names = sorted(p.name for p in paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
